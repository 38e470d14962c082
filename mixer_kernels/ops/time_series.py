"""The operators of PatchTSMixer: a mixer, a layer, and their backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import backends
from ..backends import relatives
from .library import absent, define, differentiate, new_gradients, new_like, or_absent, or_none


def _mixer(first: int, second: int, half: str) -> str:
    """The schema of a mixer's parameters; its weights are ``w<first>`` and ``w<second>``."""
    return (
        f"Tensor? gamma{half}, Tensor? beta{half}, Tensor w{first}, Tensor? b{first}, Tensor w{second}, "
        f"Tensor? b{second}, Tensor? w_gate{half}, Tensor? b_gate{half}"
    )


def _backward(backend: str, name: str, dtype: torch.dtype) -> Callable:
    """The backend's own backward pass, or that which puts its kernels in order."""
    module = backends.load(backend)
    own = getattr(module, "BACKWARD", {}).get(name)
    return own or functools.partial(getattr(relatives, name), module.relatives_kernels(dtype))


# -------------------------------------------------------------------------------------------- one mixer: gated_mixing

_MIXING = (
    f"{_mixer(1, 2, '')}, int axis, bool gate_first, float eps, str approximate, ScalarType dtype, float dropout_p,"
    " Tensor? seed"
)


def _gated_mixing(
    x, gamma, beta, w1, b1, w2, b2, w_gate, b_gate, axis, gate_first, eps, approximate, dtype,
    dropout_p, seed, backend
):  # fmt: skip
    return backends.load(backend).gated_mixing_forward(
        x, gamma, beta, w1, b1, w2, b2, w_gate, b_gate,
        axis=axis, gate_first=gate_first, eps=eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def _gated_mixing_backward(
    dy, x, gamma, beta, w1, b1, w2, b2, w_gate, b_gate, axis, gate_first, eps, approximate, dtype,
    dropout_p, seed, backend, wanted,
):  # fmt: skip
    gradients = _backward(backend, "gated_mixing_backward", dtype)(
        dy, x, gamma, beta, w1, b1, w2, b2, w_gate, b_gate,
        axis=axis, gate_first=gate_first, eps=eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, seed=seed, wanted=wanted,
    )  # fmt: skip
    return or_absent(gradients, x)


def _gated_mixing_backward_fake(dy, *inputs):
    return new_gradients(inputs[:9], inputs[-1])


gated_mixing = define(
    "gated_mixing", f"(Tensor x, {_MIXING}, str backend) -> Tensor", _gated_mixing, lambda x, *_: new_like(x)
)
gated_mixing_backward = define(
    "gated_mixing_backward",
    f"(Tensor dy, Tensor x, {_MIXING}, str backend, bool[] wanted) -> Tensor[]",
    _gated_mixing_backward,
    _gated_mixing_backward_fake,
)


def _gated_mixing_save(ctx, inputs, output) -> None:
    *tensors, axis, gate_first, eps, approximate, dtype, dropout_p, seed, backend = inputs
    ctx.save_for_backward(*tensors, seed)
    ctx.options = (axis, gate_first, eps, approximate, dtype, dropout_p)
    ctx.backend = backend


def _gated_mixing_differentiate(ctx, dy):
    wanted = ctx.needs_input_grad[:9]
    *tensors, seed = ctx.saved_tensors
    gradients = gated_mixing_backward(dy, *tensors, *ctx.options, seed, ctx.backend, list(wanted))
    return *or_none(gradients, wanted), *(None,) * 8


differentiate("gated_mixing", _gated_mixing_differentiate, _gated_mixing_save)
differentiate("gated_mixing_backward")


# ------------------------------------------------------------------------------------------ a layer: gated_mixer_layer

_LAYER = (
    f"{_mixer(1, 2, '1')}, {_mixer(3, 4, '2')}, float eps1, float eps2, str approximate, ScalarType dtype,"
    " float dropout_p, Tensor? seed"
)


def _gated_mixer_layer(x, *arguments):
    *parameters, eps1, eps2, approximate, dtype, dropout_p, seed, backend, keep_u = arguments
    y, u = backends.load(backend).gated_mixer_layer_forward(
        x, parameters[:8], parameters[8:], eps=(eps1, eps2), approximate=approximate, dtype=dtype, dropout_p=dropout_p,
        seed=seed, keep_u=keep_u,
    )  # fmt: skip
    return y, absent(x) if u is None else u


def _gated_mixer_layer_fake(x, *arguments):
    return new_like(x), new_like(x) if arguments[-1] else absent(x)


def _gated_mixer_layer_backward(dy, u, x, *arguments):
    *parameters, eps1, eps2, approximate, dtype, dropout_p, seed, backend, wanted = arguments
    gradients = _backward(backend, "gated_mixer_layer_backward", dtype)(
        dy, u, x, parameters[:8], parameters[8:], eps=(eps1, eps2),
        approximate=approximate, dtype=dtype, dropout_p=dropout_p, seed=seed, wanted=wanted,
    )  # fmt: skip
    return or_absent(gradients, x)


def _gated_mixer_layer_backward_fake(dy, u, *inputs):
    return new_gradients(inputs[:17], inputs[-1])


gated_mixer_layer = define(
    "gated_mixer_layer",
    f"(Tensor x, {_LAYER}, str backend, bool keep_u) -> (Tensor, Tensor)",
    _gated_mixer_layer,
    _gated_mixer_layer_fake,
)
gated_mixer_layer_backward = define(
    "gated_mixer_layer_backward",
    f"(Tensor dy, Tensor? u, Tensor x, {_LAYER}, str backend, bool[] wanted) -> Tensor[]",
    _gated_mixer_layer_backward,
    _gated_mixer_layer_backward_fake,
)


def _gated_mixer_layer_save(ctx, inputs, output) -> None:
    *tensors, eps1, eps2, approximate, dtype, dropout_p, seed, backend, keep_u = inputs
    u = output[1]
    ctx.save_for_backward(u if keep_u else None, *tensors, seed)
    ctx.mark_non_differentiable(u)
    ctx.options = (eps1, eps2, approximate, dtype, dropout_p)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _gated_mixer_layer_differentiate(ctx, dy, _):
    wanted = ctx.needs_input_grad[:17]
    if dy is None:
        return (None,) * 25
    *tensors, seed = ctx.saved_tensors
    gradients = gated_mixer_layer_backward(dy, *tensors, *ctx.options, seed, ctx.backend, list(wanted))
    return *or_none(gradients, wanted), *(None,) * 8


differentiate("gated_mixer_layer", _gated_mixer_layer_differentiate, _gated_mixer_layer_save)
differentiate("gated_mixer_layer_backward")
