"""The torch.library operators ``mixer_kernels::{token_mixing, channel_mixing, mixer_block}`` and their backward.

One operator per call of the functional API, so that ``torch.compile`` and ``torch.export`` see one node whatever the
backend does inside. Operators take tensors that ``functional`` has checked, the dtype of the products and the name of
a backend with kernels; they return new contiguous tensors. ``Library.define`` rather than ``custom_op``: a call costs a
third.

The halves have gradients; ``mixer_block`` is for when none is wanted. What a half's backward needs is returned beside
its result: the row statistics, and z of the channel half where memory allows it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends
from .backends import backward

_library = torch.library.Library("mixer_kernels", "DEF")

_HALF = "Tensor? gamma, Tensor? beta, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"
_NOISE = "float dropout_p, float drop_path_p, Tensor? seed"


def _define(name: str, schema: str, implementation: Callable, fake: Callable) -> Callable:
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixer_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.mixer_kernels, name).default


# ------------------------------------------------------------------------------------------------------ token mixing


def _token_mixing(x, gamma, beta, w1, b1, w2, b2, eps, approximate, dtype, dropout_p, drop_path_p, seed, backend):
    return backends.load(backend).token_mixing_forward(
        x, gamma, beta, w1, b1, w2, b2, eps=eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed,
    )  # fmt: skip


def _token_mixing_fake(x, *_):
    return _like(x), *_statistics_like(x)


def _token_mixing_backward(
    du, x, mean, rstd, gamma, beta, w1, b1, w2, b2, approximate, dtype, dropout_p, drop_path_p, seed, backend, wanted
):
    gradients = backward.token_mixing_backward(
        backends.load(backend).backward_kernels(dtype), du, x, mean, rstd, gamma, beta, w1, b1, w2, b2,
        approximate=approximate, dtype=dtype, dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, wanted=wanted,
    )  # fmt: skip
    return _present(gradients, x)


def _token_mixing_backward_fake(du, x, mean, rstd, gamma, beta, w1, b1, w2, b2, *rest):
    return _gradients_like((x, gamma, beta, w1, b1, w2, b2), rest[-1])


token_mixing = _define(
    "token_mixing",
    f"(Tensor x, {_HALF}, float eps, str approximate, ScalarType dtype, {_NOISE}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _token_mixing,
    _token_mixing_fake,
)
token_mixing_backward = _define(
    "token_mixing_backward",
    f"(Tensor du, Tensor x, Tensor mean, Tensor rstd, {_HALF}, str approximate, ScalarType dtype, {_NOISE},"
    " str backend, bool[] wanted) -> Tensor[]",
    _token_mixing_backward,
    _token_mixing_backward_fake,
)


def _token_mixing_save(ctx, inputs, output) -> None:
    *tensors, _, approximate, dtype, dropout_p, drop_path_p, seed, backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.options = (approximate, dtype, dropout_p, drop_path_p)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _token_mixing_differentiate(ctx, du, *_):
    wanted = ctx.needs_input_grad[:7]
    if du is None:
        return (None,) * 14
    *tensors, mean, rstd, seed = ctx.saved_tensors
    x, *parameters = tensors
    gradients = token_mixing_backward(du, x, mean, rstd, *parameters, *ctx.options, seed, ctx.backend, list(wanted))
    return *_wanted(gradients, wanted), *(None,) * 7


# ---------------------------------------------------------------------------------------------------- channel mixing


def _channel_mixing(
    u, gamma, beta, w3, b3, w4, b4, eps, approximate, dtype, dropout_p, drop_path_p, seed, backend, keep_z
):
    y, mean, rstd, z = backends.load(backend).channel_mixing_forward(
        u, gamma, beta, w3, b3, w4, b4, eps=eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, keep_z=keep_z,
    )  # fmt: skip
    return y, mean, rstd, _absent(u) if z is None else z


def _channel_mixing_fake(u, gamma, beta, w3, *rest):
    dtype, keep_z = rest[5], rest[-1]
    z = _absent(u)
    if keep_z:
        rows, hidden = u.shape[0] * u.shape[1], w3.shape[0]
        multiple = 16 // dtype.itemsize
        z = u.new_empty(rows, (hidden + multiple - 1) // multiple * multiple, dtype=dtype)[:, :hidden]
    return _like(u), *_statistics_like(u), z


def _channel_mixing_backward(
    dy, u, mean, rstd, z, gamma, beta, w3, b3, w4, b4, approximate, dtype, dropout_p, drop_path_p, seed, backend, wanted
):
    gradients = backward.channel_mixing_backward(
        backends.load(backend).backward_kernels(dtype), dy, u, mean, rstd, z, gamma, beta, w3, b3, w4, b4,
        approximate=approximate, dtype=dtype, dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, wanted=wanted,
    )  # fmt: skip
    return _present(gradients, u)


def _channel_mixing_backward_fake(dy, u, mean, rstd, z, gamma, beta, w3, b3, w4, b4, *rest):
    return _gradients_like((u, gamma, beta, w3, b3, w4, b4), rest[-1])


channel_mixing = _define(
    "channel_mixing",
    f"(Tensor u, {_HALF}, float eps, str approximate, ScalarType dtype, {_NOISE}, str backend, bool keep_z)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _channel_mixing,
    _channel_mixing_fake,
)
channel_mixing_backward = _define(
    "channel_mixing_backward",
    f"(Tensor dy, Tensor u, Tensor mean, Tensor rstd, Tensor? z, {_HALF}, str approximate, ScalarType dtype, {_NOISE},"
    " str backend, bool[] wanted) -> Tensor[]",
    _channel_mixing_backward,
    _channel_mixing_backward_fake,
)


def _channel_mixing_save(ctx, inputs, output) -> None:
    *tensors, _, approximate, dtype, dropout_p, drop_path_p, seed, backend, keep_z = inputs
    _, mean, rstd, z = output
    ctx.save_for_backward(*tensors, mean, rstd, z if keep_z else None, seed)
    ctx.mark_non_differentiable(mean, rstd, z)
    ctx.options = (approximate, dtype, dropout_p, drop_path_p)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _channel_mixing_differentiate(ctx, dy, *_):
    wanted = ctx.needs_input_grad[:7]
    if dy is None:
        return (None,) * 15
    *tensors, mean, rstd, z, seed = ctx.saved_tensors
    u, *parameters = tensors
    gradients = channel_mixing_backward(
        dy, u, mean, rstd, z, *parameters, *ctx.options, seed, ctx.backend, list(wanted)
    )
    return *_wanted(gradients, wanted), *(None,) * 8


# ------------------------------------------------------------------------------------------------------- whole block


def _mixer_block(
    x, gamma1, beta1, w1, b1, w2, b2, gamma2, beta2, w3, b3, w4, b4, eps1, eps2, approximate, dtype, backend
):
    run = backends.load(backend)
    options = {"approximate": approximate, "dtype": dtype}
    if hasattr(run, "mixer_block_forward"):  # as one call
        parameters = (gamma1, beta1, w1, b1, w2, b2, gamma2, beta2, w3, b3, w4, b4)
        return run.mixer_block_forward(x, *parameters, eps1=eps1, eps2=eps2, **options)
    u = run.token_mixing_forward(x, gamma1, beta1, w1, b1, w2, b2, eps=eps1, **options)[0]
    return run.channel_mixing_forward(u, gamma2, beta2, w3, b3, w4, b4, eps=eps2, **options)[0]


mixer_block = _define(
    "mixer_block",
    "(Tensor x, Tensor? gamma1, Tensor? beta1, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2,"
    " Tensor? gamma2, Tensor? beta2, Tensor w3, Tensor? b3, Tensor w4, Tensor? b4,"
    " float eps1, float eps2, str approximate, ScalarType dtype, str backend) -> Tensor",
    _mixer_block,
    lambda x, *_: _like(x),
)


# ---------------------------------------------------------------------------------------------------------- autograd


def _no_gradient(ctx, *_):
    raise RuntimeError(
        "the fused mixer operators have no gradient here (a second derivative, or mixer_block called as an operator): "
        "use backend='torch', which autograd differentiates any number of times"
    )


for _name, _backward, _setup in (
    ("token_mixing", _token_mixing_differentiate, _token_mixing_save),
    ("channel_mixing", _channel_mixing_differentiate, _channel_mixing_save),
    ("token_mixing_backward", _no_gradient, None),
    ("channel_mixing_backward", _no_gradient, None),
    ("mixer_block", _no_gradient, None),
):
    torch.library.register_autograd(f"mixer_kernels::{_name}", _backward, setup_context=_setup, lib=_library)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _statistics_like(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _absent(like: Tensor) -> Tensor:
    """An operator's result cannot be None: an empty tensor stands for it."""
    return like.new_empty(0)


def _present(gradients: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [_absent(like) if gradient is None else gradient.contiguous() for gradient in gradients]


def _gradients_like(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor]:
    return [_like(t) if want else _absent(inputs[0]) for t, want in zip(inputs, wanted, strict=True)]


def _wanted(gradients: list[Tensor], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
