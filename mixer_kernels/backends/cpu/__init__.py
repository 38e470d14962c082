"""The ``cpu`` backend: kernels in C++ (csrc/cpu), for mixers of time series forward and backward, and for the token
half of MLP-Mixer's blocks in inference.

A call does all of a mixer, or of a layer, tile of series by tile of series, on PyTorch's threads; results do not depend
on how many. x is read as it is where its features lie side by side, else from a contiguous copy; weights are packed in
the call, or read where they are in a small one; those of a frozen block once. Everything is computed in IEEE float32,
whatever ``torch.get_float32_matmul_precision()`` says: 16-bit tensors are converted, results rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import torch as torch_backend
from ..arguments import GatedHalf, Half, Options
from .library import emulates, instruction_set, loaded, multiplies, why_not, why_not_auto
from .plan import (
    ForwardPlan,
    Packing,
    address,
    dense,
    in_float32,
    input_of,
    mixers_of,
    new_float32,
    noise_and_form,
    readable,
)
from .tsmixer import (
    feature_mixing_backward,
    feature_mixing_forward,
    feature_mixing_plan,
    time_mixing_backward,
    time_mixing_forward,
    time_mixing_plan,
    tsmixer_layer_forward,
    tsmixer_layer_plan,
)

__all__ = [
    "Packing",
    "emulates",
    "feature_mixing_backward",
    "feature_mixing_forward",
    "feature_mixing_plan",
    "gated_mixer_layer_backward",
    "gated_mixer_layer_forward",
    "gated_mixer_layer_plan",
    "gated_mixing_backward",
    "gated_mixing_forward",
    "gated_mixing_plan",
    "has",
    "mixer_block_forward",
    "multiplies",
    "time_mixing_backward",
    "time_mixing_forward",
    "time_mixing_plan",
    "token_mixing_forward",
    "token_mixing_plan",
    "tsmixer_layer_forward",
    "tsmixer_layer_plan",
    "why_not",
    "why_not_auto",
]

_FEATURES = {
    "packs", "gated_mixing", "gated_mixing_backward", "gated_mixer_layer", "gated_mixer_layer_backward",
    "token_mixing", "mixer_block", "time_mixing", "feature_mixing", "tsmixer_layer", "gate='sigmoid'", "norm='affine'",
}  # fmt: skip


def has(feature: str) -> bool:
    """Mixers of time series and inference of MLP-Mixer's blocks, of any size, and packs of those that are frozen."""
    return feature in _FEATURES or feature.startswith("an axis of ")


def token_mixing_forward(
    x: Tensor, half: Half, options: Options, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``u [B, S, C]``, contiguous, and mean and rstd ``[B * S]`` of ``x [B, S, C]``."""
    _, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, options.eps)
    return token_mixing_plan(x, half, options, packing)(x), mean.flatten(), rstd.flatten()


def token_mixing_plan(x: Tensor, half: Half, options: Options, packing: Packing | None = None) -> ForwardPlan:
    """``token_mixing_forward``'s u on every ``x`` of this layout, parameters where they are now: patches without a gate
    are tokens."""
    return ForwardPlan(x, 2, (GatedHalf(*half, None, None),), (options.eps,), options, False, packing)


def mixer_block_forward(
    x: Tensor, tokens: Half, channels: Half, options: Options, eps2: float, packing: Packing | None = None
) -> Tensor:
    """``y [B, S, C]``. The channel half is PyTorch's, whose products of large matrices are nearly all of it: in float32
    where the CPU has no others."""
    u = token_mixing_plan(x, tokens, options, packing)(x)
    dtype = torch.float32 if emulates(options.dtype) else options.dtype
    return torch_backend.channel_mixing_forward(u, channels, options._replace(eps=eps2, dtype=dtype)).to(x.dtype)


def gated_mixing_forward(
    x: Tensor, half: GatedHalf, options: Options, axis: int, gate_first: bool, packing: Packing | None = None
) -> Tensor:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, mixed along ``axis`` 1, 2 or 3."""
    return gated_mixing_plan(x, half, options, axis, gate_first, packing)(x)


def gated_mixing_plan(
    x: Tensor, half: GatedHalf, options: Options, axis: int, gate_first: bool, packing: Packing | None = None
) -> ForwardPlan:
    """``gated_mixing_forward`` on every ``x`` of this layout, parameters where they are now."""
    return ForwardPlan(x, axis, (half,), (options.eps,), options, gate_first, packing)


def gated_mixer_layer_forward(
    x: Tensor,
    patches: GatedHalf,
    features: GatedHalf,
    options: Options,
    eps2: float,
    keep_u: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, and u, what the patches' mixer gives, if kept."""
    u = torch.empty(x.shape, dtype=torch.float32, device="cpu") if keep_u else None
    y = gated_mixer_layer_plan(x, patches, features, options, eps2, packing=packing).run(x, u)
    return y, u.to(x.dtype) if keep_u else None


def gated_mixer_layer_plan(
    x: Tensor,
    patches: GatedHalf,
    features: GatedHalf,
    options: Options,
    eps2: float,
    keep_u: bool = False,
    packing: Packing | None = None,
) -> ForwardPlan:
    """``gated_mixer_layer_forward``'s y on every ``x`` of this layout, parameters where they are now."""
    return ForwardPlan(x, 2, (patches, features), (options.eps, eps2), options, False, packing)


def gated_mixing_backward(
    dy: Tensor, x: Tensor, half: GatedHalf, options: Options, wanted: Sequence[bool], axis: int, gate_first: bool
) -> list[Tensor | None]:
    """Gradients of x and the eight parameters in order from ``dy``; everything is computed again from x."""
    return _backward(dy, None, x, axis, (half,), (options.eps,), options, gate_first, wanted)


def gated_mixer_layer_backward(
    dy: Tensor,
    u: Tensor | None,
    x: Tensor,
    patches: GatedHalf,
    features: GatedHalf,
    options: Options,
    wanted: Sequence[bool],
    eps2: float,
) -> list[Tensor | None]:
    """Gradients of x and the parameters of both mixers, eight each, from ``dy``; ``u`` None: recompute it."""
    return _backward(dy, u, x, 2, (patches, features), (options.eps, eps2), options, False, wanted)


def _backward(dy, u, x, axis, mixers, eps, options, gate_first, wanted) -> list[Tensor | None]:
    tensors = [x, *(parameter for mixer in mixers for parameter in mixer)]
    dtypes = [t.dtype if want and t is not None else None for want, t in zip(wanted, tensors, strict=True)]
    dx, *gradients = [
        new_float32(t) if dtype is not None or t is x else None for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    if x.numel() == 0:
        gradients = [None if gradient is None else gradient.zero_() for gradient in gradients]
    else:
        x, dy, mixers = readable(x.float()), dense(dy), [in_float32(mixer) for mixer in mixers]
        addresses = [tuple(map(address, gradients[i : i + 8])) for i in range(0, len(gradients), 8)]
        u = None if u is None else dense(u)
        loaded().backward(
            instruction_set(), dy.data_ptr(), input_of(x), axis, mixers_of(mixers, eps),
            noise_and_form(options, gate_first), address(u), dx.data_ptr(), tuple(addresses), torch.get_num_threads(),
        )  # fmt: skip
    return [
        t if dtype is torch.float32 else None if dtype is None else t.to(dtype)
        for t, dtype in zip((dx, *gradients), dtypes, strict=True)
    ]
