"""``FusedMixerBlock``, a drop-in for timm's ``MixerBlock``.

Signatures, submodule names, state_dict keys and random number consumption are timm's (``timm.models.mlp_mixer``), so
weights travel both ways; timm itself is not needed. A block runs through ``functional.mixer_block`` when that computes
what its submodules would compute, and calls the submodules one by one when not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor, nn

from . import coverage, functional
from .coverage import (
    activation_of,
    approximate_of,
    drop_path_p_of,
    dropout_p_of,
    weight_and_bias,
    why_not_fused,
    why_not_tensor,
    why_not_this_noise,
    why_not_transformed,
)
from .freeze import Freezable
from .functional import checks
from .layers import DropPath, Mlp, factory_kwargs, pair
from .snapshot import Watched
from .tracing import is_exporting
from .words import one_of, warn_once

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # timm's and Flax's default; PyTorch's own eps is 1e-5


class FusedMixerBlock(Watched, Freezable, nn.Module):
    """One MLP-Mixer block, ``x [B, S, C] -> [B, S, C]``: timm's ``MixerBlock`` through the fused kernels.

    Equivalent to::

        x = x + drop_path(mlp_tokens(norm1(x).transpose(1, 2)).transpose(1, 2))
        x = x + drop_path(mlp_channels(norm2(x)))

    It is computed exactly so, with one warning for each reason on the logger "mixer_kernels", if the kernels do not
    cover the submodules: norms other than LayerNorm over C, MLPs other than ``Mlp`` with GELU (erf or tanh), ReLU or
    SiLU and timm's ``GluMlp`` with SiLU, active dropouts that differ, stochastic depth that does not rescale, hooks on
    a submodule. On the ``torch`` backend it is computed so without a warning. There a seed gives timm's dropout masks;
    on the kernels it gives others.

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: D_S / C and D_C / C, or one value for both. Both are relative to C, as in timm and in the paper's
            models. A product is rounded down; 0 stands for the width of the MLP's input.
        mlp_layer: called as ``mlp_layer(in_features, hidden_features, act_layer=, drop=)``; ``Mlp``, or timm's ``Mlp``
            or ``GluMlp`` to be fused.
        norm_layer: called as ``norm_layer(dim)``; by default LayerNorm with eps 1e-6.
        act_layer: ``nn.GELU``, ``partial(nn.GELU, approximate="tanh")``, timm's ``GELU`` or ``GELUTanh``, ``nn.ReLU``
            or ``nn.SiLU`` to be fused; ``nn.SiLU`` with ``GluMlp``.
        drop: dropout probability after the activation and after the second product of both MLPs.
        drop_path: stochastic depth probability of both branches.
        device, dtype: of the parameters; passed on to the layers if given.
        memory: what training keeps for the backward pass of the kernels, "fast" or "min" as in ``functional``.

    Raises:
        ValueError: unknown ``memory``, or three values for a pair.
        ValueError, TypeError, RuntimeError (from ``forward``): as ``functional.mixer_block``; on the ``torch`` backend
            a wrong dtype or device raises PyTorch's own RuntimeError.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        mlp_layer: Callable[..., nn.Module] = Mlp,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        *,
        memory: str = "fast",
    ) -> None:
        super().__init__()
        factory = factory_kwargs(device, dtype)
        self.memory = one_of("memory", memory, functional.MEMORY_MODES)
        self._input_shape = (seq_len, dim)
        tokens_dim, channels_dim = (int(ratio * dim) for ratio in pair(mlp_ratio))
        self.norm1 = norm_layer(dim, **factory)
        self.mlp_tokens = mlp_layer(seq_len, tokens_dim, act_layer=act_layer, drop=drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp_channels = mlp_layer(dim, channels_dim, act_layer=act_layer, drop=drop, **factory)

    def example(self) -> Tensor:
        weight = self.mlp_tokens.fc1.weight
        return torch.zeros(1, *image_shape(self), dtype=weight.dtype, device=weight.device)

    why_not_covered = staticmethod(coverage.why_not_covered)

    def why_not_kernels(self, x: Tensor) -> str | None:
        return why_not_tensor(x) or why_not_transformed() or self.why_not_covered_now() or why_not_this_noise(self)

    def forward(self, x: Tensor) -> Tensor:
        # Needs nothing but timm's submodules, so that it serves a stock MixerBlock just as well.
        is_ours = isinstance(self, FusedMixerBlock)
        if is_ours:
            y = self.again(x, self.memory)
            if y is not None:
                return y
            self.check_frozen()
        if isinstance(x, Tensor) and checks.runs_on_torch(None, x, operator_on_cpu(self, x), self):
            # An input of another shape goes on to functional, which says what is wrong with it. A trace would record
            # the comparison.
            own = torch.jit.is_tracing() or x.shape[1:] == getattr(self, "_input_shape", None)
        else:
            own = False
        reason = None
        if not own:
            reason = self.why_not_kernels(x) if is_ours else why_not_tensor(x) or why_not_fused(self)
        if reason is not None:
            warn_once(f"FusedMixerBlock: computing eagerly, because {reason}")
        if own or reason is not None:
            x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
            return x + self.drop_path(self.mlp_channels(self.norm2(x)))
        packs = self.packs() if is_ours else None
        memory = getattr(self, "memory", "fast")
        return fused(self, x, memory=memory_of(self, memory), packs=packs, options=memory)

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` calls before all else."""
        raise RuntimeError(
            "torch.jit.script does not take a FusedMixerBlock: use torch.jit.trace, or load its state_dict into timm's "
            "MixerBlock and script that"
        )


def operator_on_cpu(block: nn.Module, x: Tensor) -> str | None:
    """The one that computes this ``MixerBlock``, if a backend may have it for CPUs."""
    if checks.is_left_to_torch(x):
        return None
    act = block.mlp_tokens._modules.get("act")
    return None if act is None or approximate_of(act) is None else "mixer_block"


def image_shape(block: nn.Module) -> tuple[int, int]:
    """Tokens and channels of what a ``MixerBlock`` takes."""
    return block.mlp_tokens.fc1.in_features, block.mlp_channels.fc1.in_features


def fused(
    block: nn.Module,
    x: Tensor,
    *,
    memory: str | None,
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
    options: Hashable = None,
) -> Tensor:
    """A ``MixerBlock`` through ``functional.mixer_block``; right if ``why_not_fused(block)`` is None.

    ``options``: what a frozen block will give to ``again``.
    """
    parts = block._modules
    norm1, tokens, norm2, channels = parts["norm1"], parts["mlp_tokens"], parts["norm2"], parts["mlp_channels"]
    of_tokens, of_channels = tokens._modules, channels._modules
    layers = (norm1, of_tokens["fc1"], of_tokens["fc2"], norm2, of_channels["fc1"], of_channels["fc2"])
    y = functional.mixer_block(
        x,
        *[parameter for layer in layers for parameter in weight_and_bias(layer)],
        eps=(norm1.eps, norm2.eps),
        **activation_of(tokens),
        dropout_p=dropout_p_of(of_tokens["drop1"]),
        drop_path_p=drop_path_p_of(parts["drop_path"]),
        memory=memory,
        backend=backend,
        packs=packs,
    )
    if packs is not None:
        block.keep_call(packs, x, options)
    return y


def memory_of(block: nn.Module, memory: str) -> str | None:
    """``memory``, or None, to keep nothing, where ``torch.export`` records a block in evaluation mode: there gradients
    are on unless the user has turned them off, and the program would keep for ever what none asks for."""
    return None if is_exporting() and not block.training else memory
