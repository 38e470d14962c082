"""``MLPMixer`` of lucidrains' mlp-mixer-pytorch: a Sequential whose token MLPs are 1x1 convolutions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from .checkpoints import unwrapped
from .layout import Rename, StateDict, check_tensor, layer, rename

_BLOCK_PART = re.compile(r"(\d+)\.[01]\.")
_FIRST_BLOCK = 2  # after the rearrangement and the linear layer that embed the patches


def from_lucidrains(state_dict: Mapping[str, Tensor], *, in_chans: int = 3) -> StateDict:
    """The weights of lucidrains' ``MLPMixer`` in timm's keys.

    Widths are read from the weights. ``MLPMixer`` applies its two factors the other way round than they are named:
    tokens are mixed through ``expansion_factor * dim`` units, channels through ``expansion_factor_token * dim``. So
    the ``mlp_ratio`` of these weights is ``(expansion_factor, expansion_factor_token)``, by default (4, 0.5), where the
    paper's models have (0.5, 4). LayerNorm's eps is 1e-5: ``model_arguments(state_dict, origin="lucidrains")``.

    Args:
        state_dict: of the model, as of version 0.3, or what a trainer saves, as for ``from_timm``.
        in_chans: ``channels`` of the model; patches are square, so it gives their size.

    Raises:
        ValueError: keys are missing or left over, or shapes do not fit; the message names them.
        TypeError: something is not a tensor of floating-point numbers.
    """
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    state_dict = unwrapped(state_dict, anchor="2.0.fn.0.weight")
    blocks = {int(match[1]) for match in map(_BLOCK_PART.match, state_dict) if match}
    num_blocks = max(max(blocks, default=_FIRST_BLOCK) - _FIRST_BLOCK + 1, 1)
    if "1.weight" in state_dict:
        check_tensor("1.weight", state_dict["1.weight"], 2)
        pixels = state_dict["1.weight"].shape[1]
        patch = math.isqrt(pixels // in_chans)
        if patch * patch * in_chans != pixels:
            raise ValueError(f"1.weight takes {pixels} values a patch, no square of in_chans={in_chans} channels")
    else:
        patch = 1
    return rename("lucidrains MLPMixer", _table(num_blocks, patch, in_chans), state_dict)


def _table(num_blocks: int, patch: int, in_chans: int) -> list[Rename]:
    def embedding(weight: Tensor) -> Tensor:  # patches are flattened as (row, column, channel)
        return weight.unflatten(1, (patch, patch, in_chans)).permute(0, 3, 1, 2)

    table = layer("1", "stem.proj", 2, embedding)
    for i in range(num_blocks):
        theirs, ours = f"{_FIRST_BLOCK + i}", f"blocks.{i}"
        table += layer(f"{theirs}.0.norm", f"{ours}.norm1", 1)
        table += layer(f"{theirs}.0.fn.0", f"{ours}.mlp_tokens.fc1", 3, _linear)
        table += layer(f"{theirs}.0.fn.3", f"{ours}.mlp_tokens.fc2", 3, _linear)
        table += layer(f"{theirs}.1.norm", f"{ours}.norm2", 1)
        table += layer(f"{theirs}.1.fn.0", f"{ours}.mlp_channels.fc1", 2)
        table += layer(f"{theirs}.1.fn.3", f"{ours}.mlp_channels.fc2", 2)
    last = _FIRST_BLOCK + num_blocks
    return table + layer(f"{last}", "norm", 1) + layer(f"{last + 2}", "head", 2)


def _linear(weight: Tensor) -> Tensor:
    """A convolution's weight ``[out, in, 1]`` as that of a linear layer; a kernel that is longer keeps its axis."""
    return weight.squeeze(2) if weight.shape[2] == 1 else weight
