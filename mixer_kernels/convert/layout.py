"""The state_dict of a Mixer in timm's keys: what has to be in it, in which shapes, and what that says of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..words import one_of
from .checkpoints import kind_of, unwrapped

StateDict = dict[str, Tensor]

# What the models of each origin are built with, where FusedMixer's defaults, which are timm's, are not it.
ORIGINS: dict[str, dict[str, Any]] = {
    "timm": {},
    "google": {"act_layer": partial(nn.GELU, approximate="tanh")},  # flax.linen.gelu's default; LayerNorm's eps is 1e-6
    "lucidrains": {"norm_layer": nn.LayerNorm},  # with PyTorch's own eps, 1e-5
}
NAMED_AT_MOST = 20
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Mixer as its weights tell them. ``num_classes`` is 0 if there is no head."""

    num_blocks: int
    in_chans: int
    patch_size: tuple[int, int]
    S: int
    C: int
    D_S: int
    D_C: int
    num_classes: int
    stem_norm: bool = False

    def __str__(self) -> str:
        patch = "x".join(map(str, self.patch_size))
        head = f"{self.num_classes} classes" if self.num_classes else "no head"
        return (
            f"{self.num_blocks} blocks, patches of {patch} pixels and {self.in_chans} channels, "
            f"S={self.S}, C={self.C}, D_S={self.D_S}, D_C={self.D_C}, {head}"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key and its shape."""
        shapes = {"stem.proj.weight": (self.C, self.in_chans, *self.patch_size), "stem.proj.bias": (self.C,)}
        if self.stem_norm:
            shapes |= _norm("stem.norm", self.C)
        for i in range(self.num_blocks):
            block = f"blocks.{i}"
            shapes |= _norm(f"{block}.norm1", self.C) | _mlp(f"{block}.mlp_tokens", self.S, self.D_S)
            shapes |= _norm(f"{block}.norm2", self.C) | _mlp(f"{block}.mlp_channels", self.C, self.D_C)
        shapes |= _norm("norm", self.C)
        if self.num_classes:
            shapes |= {"head.weight": (self.num_classes, self.C), "head.bias": (self.num_classes,)}
        return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _mlp(name: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.fc1.weight": (hidden, width), f"{name}.fc1.bias": (hidden,),
        f"{name}.fc2.weight": (width, hidden), f"{name}.fc2.bias": (width,),
    }  # fmt: skip


def from_timm(checkpoint: Mapping[str, Any]) -> StateDict:
    """The state_dict of a timm ``mixer_*`` model, checked; the keys stay.

    Args:
        checkpoint: a state_dict, or what a trainer saves. Then the averaged weights (``state_dict_ema``) are taken if
            there are any, else ``state_dict``, ``model`` or ``model_state_dict``, as ``timm.models.load_checkpoint``
            does. The prefixes of DistributedDataParallel and torch.compile are dropped, and so is the prefix of a Mixer
            inside another module: Lightning's ``model.`` and ``net.``, PEFT's ``base_model.model.``.

    Raises:
        ValueError: keys are missing or left over, or shapes do not fit; the message names them.
        TypeError: something is not a tensor of floating-point numbers.
    """
    return to_timm(unwrapped(checkpoint, anchor="stem.proj.weight"))


def to_timm(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The state_dict of a ``FusedMixer`` for timm's ``MlpMixer``, checked; the keys are the same.

    Raises:
        ValueError, TypeError: as ``from_timm``.
    """
    sizes_of(state_dict)
    return dict(state_dict)


def model_arguments(
    state_dict: Mapping[str, Tensor], *, grid: tuple[int, int] | None = None, origin: str = "timm"
) -> dict[str, Any]:
    """Arguments for ``FusedMixer`` or timm's ``MlpMixer`` that these weights fit.

    Args:
        state_dict: what a function of this package returned.
        grid: rows and columns of tokens; None if there are as many of both.
        origin: where the weights were trained, "timm", "google" or "lucidrains": Google's models have the tanh form
            of GELU, lucidrains' an eps of 1e-5 in LayerNorm.

    Raises:
        ValueError: unknown ``origin``; a grid of another number of tokens; no grid, and S is not a square.
    """
    one_of("origin", origin, tuple(ORIGINS))
    sizes = sizes_of(state_dict)
    grid = square_grid(sizes.S) if grid is None else checked_grid(grid, sizes.S)
    rows, columns = sizes.patch_size
    return {
        "num_classes": sizes.num_classes,
        "img_size": (grid[0] * rows, grid[1] * columns),
        "in_chans": sizes.in_chans,
        "patch_size": sizes.patch_size,
        "num_blocks": sizes.num_blocks,
        "embed_dim": sizes.C,
        "mlp_ratio": (_ratio(sizes.D_S, sizes.C), _ratio(sizes.D_C, sizes.C)),
        "stem_norm": sizes.stem_norm,
        **ORIGINS[origin],
    }


def sizes_of(state_dict: Mapping[str, Tensor], theirs: Mapping[str, str] | None = None) -> Sizes:
    """The sizes of the Mixer with these weights, after a check of every key and shape.

    Args:
        theirs: what a key was called where it came from, for messages.

    Raises:
        ValueError, TypeError: as ``from_timm``.
    """
    present = {int(match[1]) for match in map(_BLOCK.match, state_dict) if match}
    num_blocks = max(present, default=0) + 1  # of an unrelated dictionary, one block's keys are missing
    stem_norm = any(name.startswith("stem.norm.") for name in state_dict)
    head = any(name.startswith("head.") for name in state_dict)
    keys = Sizes(num_blocks, 1, (1, 1), 1, 1, 1, 1, int(head), stem_norm).shapes()
    check_keys("Mixer", keys, state_dict)
    for name in keys:
        check_tensor(_called(name, theirs), state_dict[name], len(keys[name]))
    stem, fc1_tokens = state_dict["stem.proj.weight"], state_dict["blocks.0.mlp_tokens.fc1.weight"]
    sizes = Sizes(
        num_blocks=num_blocks,
        in_chans=stem.shape[1],
        patch_size=(stem.shape[2], stem.shape[3]),
        S=fc1_tokens.shape[1],
        C=stem.shape[0],
        D_S=fc1_tokens.shape[0],
        D_C=state_dict["blocks.0.mlp_channels.fc1.weight"].shape[0],
        num_classes=state_dict["head.weight"].shape[0] if head else 0,
        stem_norm=stem_norm,
    )
    wrong = [
        f"{_called(name, theirs)} has shape {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in sizes.shapes().items()
        if tuple(state_dict[name].shape) != shape
    ]
    if wrong:
        gated = sizes.D_S == 2 * state_dict["blocks.0.mlp_tokens.fc2.weight"].shape[1]
        hint = "; this is a gMixer: build it by timm (gmixer_*) and give that to fuse_" if gated else ""
        raise ValueError(f"shapes do not fit a Mixer of {sizes}: {_listed(wrong, '; ')}{hint}")
    return sizes


def check_keys(what: str, expected: Mapping[str, Any] | Sequence[str], got: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the keys that ``got`` lacks and those that do not belong there."""
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in set(expected)]
    if missing or extra:
        parts = [f"missing: {_listed(missing)}"] if missing else []
        parts += [f"not expected: {_listed(extra)}"] if extra else []
        kind = kind_of(extra, nothing_fits=len(missing) == len(expected))
        parts += [kind] if kind else []
        raise ValueError(f"not the weights of a {what}; {'; '.join(parts)}")


def check_tensor(name: str, value: Any, dims: int) -> None:
    """Raise an error unless ``value`` is a floating-point tensor of that many dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")


@dataclass(frozen=True)
class Rename:
    """One tensor's way: its name there and here, how many dimensions it has there, and what is done with it."""

    theirs: str
    ours: str
    dims: int
    change: Callable[[Tensor], Tensor] | None = None


def layer(
    theirs: str, ours: str, dims: int, change: Callable[[Tensor], Tensor] | None = None, *, names=(".weight", ".bias")
) -> list[Rename]:
    """The weight, which has so many dimensions there, and the bias of one layer, which have these ``names`` there."""
    weight, bias = (theirs + name for name in names)
    return [Rename(weight, f"{ours}.weight", dims, change), Rename(bias, f"{ours}.bias", 1)]


def rename(what: str, table: Sequence[Rename], theirs: Mapping[str, Tensor]) -> StateDict:
    """``theirs`` in timm's keys and shapes, checked: new contiguous tensors where they change, else the same ones."""
    check_keys(what, [entry.theirs for entry in table], theirs)
    ours = {}
    for entry in table:
        value = theirs[entry.theirs]
        check_tensor(entry.theirs, value, entry.dims)
        ours[entry.ours] = value if entry.change is None else entry.change(value).contiguous()
    sizes_of(ours, {entry.ours: entry.theirs for entry in table})
    return ours


def square_grid(tokens: int) -> tuple[int, int]:
    """As many rows as columns of so many tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not form a square: pass grid=(rows, columns)")
    return side, side


def checked_grid(grid: Sequence[int], tokens: int, name: str = "grid") -> tuple[int, int]:
    """``grid`` as a pair, if it has so many tokens."""
    if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(f"{name} must be (rows, columns), got {grid}")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"built for {tokens} tokens, but {name}={tuple(grid)} has {grid[0] * grid[1]}")
    return grid[0], grid[1]


def _ratio(hidden: int, width: int) -> float:
    # The model rounds ratio * width down, which may miss by one.
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _called(name: str, theirs: Mapping[str, str] | None) -> str:
    return name if theirs is None or theirs[name] == name else f"{theirs[name]} (as {name})"


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - NAMED_AT_MOST
    return separator.join(names[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
