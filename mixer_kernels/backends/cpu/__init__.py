"""The ``cpu`` backend: float32 kernels for mixers of time series, forward and backward, in C++ (csrc/cpu).

A call does all of a mixer, or of a layer, tile of series by tile of series, on PyTorch's threads; results do not
depend on how many. x is read as it is where its features lie side by side, else from a contiguous copy; parameters are
read where they are. Products are IEEE float32 whatever ``torch.get_float32_matmul_precision()`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import instruction_set, loaded, why_not

__all__ = [
    "BACKWARD",
    "FUNCTIONS",
    "gated_mixer_layer_backward",
    "gated_mixer_layer_forward",
    "gated_mixing_backward",
    "gated_mixing_forward",
    "why_not",
]

FUNCTIONS = ("gated_mixing", "gated_mixer_layer")  # of the functional API; each any size


def gated_mixing_forward(
    x: Tensor,
    *parameters: Tensor | None,
    axis: int,
    gate_first: bool,
    eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, mixed along ``axis`` 1, 2 or 3."""
    options = _options(gate_first, approximate, dropout_p, seed)
    return _forward(x, axis, (parameters,), (eps,), options, keep_u=False)[0]


def gated_mixer_layer_forward(
    x: Tensor,
    of_patches: Sequence[Tensor | None],
    of_features: Sequence[Tensor | None],
    *,
    eps: tuple[float, float],
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep_u: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, and u, what the patches' mixer gives, if kept."""
    options = _options(False, approximate, dropout_p, seed)
    return _forward(x, 2, (of_patches, of_features), eps, options, keep_u)


def gated_mixing_backward(
    dy: Tensor,
    x: Tensor,
    *parameters: Tensor | None,
    axis: int,
    gate_first: bool,
    eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x and the eight parameters in order from ``dy``; everything is computed again from x."""
    options = _options(gate_first, approximate, dropout_p, seed)
    return _backward(dy, None, x, axis, (parameters,), (eps,), options, wanted)


def gated_mixer_layer_backward(
    dy: Tensor,
    u: Tensor | None,
    x: Tensor,
    of_patches: Sequence[Tensor | None],
    of_features: Sequence[Tensor | None],
    *,
    eps: tuple[float, float],
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x and the parameters of both mixers, eight each, from ``dy``; ``u`` None: recompute it."""
    options = _options(False, approximate, dropout_p, seed)
    return _backward(dy, u, x, 2, (of_patches, of_features), eps, options, wanted)


# Those of ``backends.relatives`` put kernels in order; these are a call each.
BACKWARD = {
    "gated_mixing_backward": gated_mixing_backward,
    "gated_mixer_layer_backward": gated_mixer_layer_backward,
}


def _options(
    gate_first: bool, approximate: str, dropout_p: float, seed: Tensor | None
) -> tuple[bool, bool, float, Tensor | None]:
    return gate_first, approximate == "tanh", dropout_p, seed


def _forward(x, axis, mixers, eps, options, keep_u) -> tuple[Tensor, Tensor | None]:
    y = torch.empty(x.shape, dtype=x.dtype)
    u = torch.empty(x.shape, dtype=x.dtype) if keep_u else None
    if x.numel() > 0:
        x, mixers = _readable(x), [_contiguous(mixer) for mixer in mixers]
        loaded().forward(
            instruction_set(), _input(x), axis, _mixers(mixers, eps), _with_address(options), y.data_ptr(),
            _address(u), torch.get_num_threads(),
        )  # fmt: skip
    return y, u


def _backward(dy, u, x, axis, mixers, eps, options, wanted) -> list[Tensor | None]:
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
            instruction_set(), dy.data_ptr(), _input(x), axis, _mixers(mixers, eps), _with_address(options),
            _address(u), dx.data_ptr(), tuple(addresses), torch.get_num_threads(),
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


def _with_address(options: tuple) -> tuple:
    return (*options[:3], _address(options[3]))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
