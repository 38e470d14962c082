"""The ``cpu`` backend: float32 kernels for mixers of time series, forward and backward, in C++ (csrc/cpu).

A call does all of a mixer, or of a layer, tile of series by tile of series, on PyTorch's threads; results do not depend
on how many. x is read as it is where its features lie side by side, else from a contiguous copy; weights are packed in
the call, or read where they are in a small one. Products are IEEE float32 whatever
``torch.get_float32_matmul_precision()`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import GatedHalf, Options
from .library import instruction_set, loaded, why_not

__all__ = [
    "gated_mixer_layer_backward",
    "gated_mixer_layer_forward",
    "gated_mixing_backward",
    "gated_mixing_forward",
    "has",
    "why_not",
]

_FEATURES = {"gated_mixing", "gated_mixing_backward", "gated_mixer_layer", "gated_mixer_layer_backward"}


def has(feature: str) -> bool:
    """Mixers of time series, of any size."""
    return feature in _FEATURES or feature.startswith("an axis of ")


def gated_mixing_forward(x: Tensor, half: GatedHalf, options: Options, axis: int, gate_first: bool) -> Tensor:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, mixed along ``axis`` 1, 2 or 3."""
    return _forward(x, axis, (half,), (options.eps,), options, gate_first, keep_u=False)[0]


def gated_mixer_layer_forward(
    x: Tensor, patches: GatedHalf, features: GatedHalf, options: Options, eps2: float, keep_u: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, and u, what the patches' mixer gives, if kept."""
    return _forward(x, 2, (patches, features), (options.eps, eps2), options, gate_first=False, keep_u=keep_u)


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


def _forward(x, axis, mixers, eps, options, gate_first, keep_u) -> tuple[Tensor, Tensor | None]:
    y = torch.empty(x.shape, dtype=x.dtype)
    u = torch.empty(x.shape, dtype=x.dtype) if keep_u else None
    if x.numel() > 0:
        x, mixers = _readable(x), [_contiguous(mixer) for mixer in mixers]
        loaded().forward(
            instruction_set(), _input(x), axis, _mixers(mixers, eps), _noise_and_form(options, gate_first),
            y.data_ptr(), _address(u), torch.get_num_threads(),
        )  # fmt: skip
    return y, u


def _backward(dy, u, x, axis, mixers, eps, options, gate_first, wanted) -> list[Tensor | None]:
    parameters = [parameter for mixer in mixers for parameter in mixer]
    gradients = [
        torch.empty(parameter.shape, dtype=x.dtype) if want and parameter is not None else None
        for want, parameter in zip(wanted[1:], parameters, strict=True)
    ]
    dx = torch.empty(x.shape, dtype=x.dtype)
    if x.numel() == 0:
        gradients = [None if gradient is None else gradient.zero_() for gradient in gradients]
    else:
        x, dy, mixers = _readable(x), dy.contiguous(), [_contiguous(mixer) for mixer in mixers]
        addresses = [tuple(map(_address, gradients[i : i + 8])) for i in range(0, len(gradients), 8)]
        loaded().backward(
            instruction_set(), dy.data_ptr(), _input(x), axis, _mixers(mixers, eps),
            _noise_and_form(options, gate_first), _address(u), dx.data_ptr(), tuple(addresses), torch.get_num_threads(),
        )  # fmt: skip
    return [dx if wanted[0] else None, *gradients]


def _readable(x: Tensor) -> Tensor:
    """``x`` with its features side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _contiguous(mixer: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if parameter is None else parameter.contiguous() for parameter in mixer]


def _input(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.shape, *x.stride()[:3])


def _mixers(mixers: Sequence[Sequence[Tensor | None]], eps: Sequence[float]) -> tuple[tuple, ...]:
    return tuple(
        (*map(_address, mixer), mixer[2].shape[0], one_eps) for mixer, one_eps in zip(mixers, eps, strict=True)
    )


def _noise_and_form(options: Options, gate_first: bool) -> tuple[bool, bool, float, int]:
    return gate_first, options.tanh, options.dropout_p, _address(options.seed)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
