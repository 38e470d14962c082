"""The operators of the Mixer: ``token_mixing``, ``channel_mixing``, ``mixer_block`` and their backward.

The halves have gradients; ``mixer_block`` is for when none is wanted. What a half's backward needs is returned beside
its result: the row statistics, and z of the channel half where memory allows it.
"""

from __future__ import annotations

from .. import backends
from ..backends import backward
from .library import (
    HALF,
    NOISE,
    absent,
    aligned_rows,
    define,
    differentiate,
    new_gradients,
    new_like,
    new_statistics,
    or_absent,
    or_none,
    results,
)

_WANTED = 6  # of a backward operator's options: after approximate, dtype, dropout_p, drop_path_p, seed, backend

# ------------------------------------------------------------------------------------------------------ token mixing


def _token_mixing(
    x, gamma, beta, w1, b1, w2, b2, eps, approximate, dtype, dropout_p, drop_path_p, seed, backend, activation="gelu"
):
    return backends.load(backend).token_mixing_forward(
        x, gamma, beta, w1, b1, w2, b2, eps=eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, **_kind(activation),
    )  # fmt: skip


def _token_mixing_fake(x, *_):
    return new_like(x), *new_statistics(x)


def _token_mixing_backward(
    du, x, mean, rstd, gamma, beta, w1, b1, w2, b2, approximate, dtype, dropout_p, drop_path_p, seed, backend, wanted,
    activation="gelu",
):  # fmt: skip
    gradients = backward.token_mixing_backward(
        backends.load(backend).backward_kernels(dtype), du, x, mean, rstd, gamma, beta, w1, b1, w2, b2,
        approximate=approximate, dtype=dtype, dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, wanted=wanted,
        activation=activation,
    )  # fmt: skip
    return or_absent(gradients, x)


def _token_mixing_backward_fake(du, x, mean, rstd, gamma, beta, w1, b1, w2, b2, *options):
    return new_gradients((x, gamma, beta, w1, b1, w2, b2), options[_WANTED])


token_mixing = define(
    "token_mixing",
    f"(Tensor x, {HALF}, float eps, str approximate, ScalarType dtype, {NOISE}, str backend,"
    " str activation='gelu') -> (Tensor, Tensor, Tensor)",
    _token_mixing,
    _token_mixing_fake,
)
token_mixing_backward = define(
    "token_mixing_backward",
    f"(Tensor du, Tensor x, Tensor mean, Tensor rstd, {HALF}, str approximate, ScalarType dtype, {NOISE},"
    f" str backend, bool[] wanted, str activation='gelu') -> {results(7)}",
    _token_mixing_backward,
    _token_mixing_backward_fake,
)


def _token_mixing_save(ctx, inputs, output) -> None:
    *tensors, _, approximate, dtype, dropout_p, drop_path_p, seed, backend, activation = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.options = (approximate, dtype, dropout_p, drop_path_p)
    ctx.backend, ctx.activation = backend, activation
    ctx.set_materialize_grads(False)


def _token_mixing_differentiate(ctx, du, *_):
    wanted = ctx.needs_input_grad[:7]
    if du is None:
        return (None,) * 15
    *tensors, mean, rstd, seed = ctx.saved_tensors
    x, *parameters = tensors
    gradients = token_mixing_backward(
        du, x, mean, rstd, *parameters, *ctx.options, seed, ctx.backend, list(wanted), ctx.activation
    )
    return *or_none(gradients, wanted), *(None,) * 8


# ---------------------------------------------------------------------------------------------------- channel mixing


def _channel_mixing(
    u, gamma, beta, w3, b3, w4, b4, eps, approximate, dtype, dropout_p, drop_path_p, seed, backend, keep_z,
    activation="gelu", norm="layer",
):  # fmt: skip
    y, mean, rstd, z = backends.load(backend).channel_mixing_forward(
        u, gamma, beta, w3, b3, w4, b4, eps=eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, keep_z=keep_z, **_kind(activation, norm),
    )  # fmt: skip
    return y, *(absent(u) if t is None else t for t in (mean, rstd, z))


def _channel_mixing_fake(
    u, gamma, beta, w3, b3, w4, b4, eps, approximate, dtype, dropout_p, drop_path_p, seed, backend, keep_z,
    activation="gelu", norm="layer",
):  # fmt: skip
    statistics = (absent(u), absent(u)) if norm == "affine" else new_statistics(u)
    rows = u.shape[0] * u.shape[1]
    if not keep_z:
        z = absent(u)
    elif activation == "swiglu":
        z = aligned_rows(2 * rows, w4.shape[1], dtype, u).unflatten(0, (rows, 2))
    else:
        z = aligned_rows(rows, w3.shape[0], dtype, u)
    return new_like(u), *statistics, z


def _channel_mixing_backward(
    dy, u, mean, rstd, z, gamma, beta, w3, b3, w4, b4, approximate, dtype, dropout_p, drop_path_p, seed, backend,
    wanted, activation="gelu",
):  # fmt: skip
    gradients = backward.channel_mixing_backward(
        backends.load(backend).backward_kernels(dtype), dy, u, mean, rstd, z, gamma, beta, w3, b3, w4, b4,
        approximate=approximate, dtype=dtype, dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, wanted=wanted,
        activation=activation,
    )  # fmt: skip
    return or_absent(gradients, u)


def _channel_mixing_backward_fake(dy, u, mean, rstd, z, gamma, beta, w3, b3, w4, b4, *options):
    return new_gradients((u, gamma, beta, w3, b3, w4, b4), options[_WANTED])


channel_mixing = define(
    "channel_mixing",
    f"(Tensor u, {HALF}, float eps, str approximate, ScalarType dtype, {NOISE}, str backend, bool keep_z,"
    " str activation='gelu', str norm='layer') -> (Tensor, Tensor, Tensor, Tensor)",
    _channel_mixing,
    _channel_mixing_fake,
)
channel_mixing_backward = define(
    "channel_mixing_backward",
    f"(Tensor dy, Tensor u, Tensor? mean, Tensor? rstd, Tensor? z, {HALF}, str approximate, ScalarType dtype, {NOISE},"
    f" str backend, bool[] wanted, str activation='gelu') -> {results(7)}",
    _channel_mixing_backward,
    _channel_mixing_backward_fake,
)


def _channel_mixing_save(ctx, inputs, output) -> None:
    *tensors, _, approximate, dtype, dropout_p, drop_path_p, seed, backend, keep_z, activation, norm = inputs
    _, mean, rstd, z = output
    statistics = (None, None) if norm == "affine" else (mean, rstd)
    ctx.save_for_backward(*tensors, *statistics, z if keep_z else None, seed)
    ctx.mark_non_differentiable(mean, rstd, z)
    ctx.options = (approximate, dtype, dropout_p, drop_path_p)
    ctx.backend, ctx.activation = backend, activation
    ctx.set_materialize_grads(False)


def _channel_mixing_differentiate(ctx, dy, *_):
    wanted = ctx.needs_input_grad[:7]
    if dy is None:
        return (None,) * 17
    *tensors, mean, rstd, z, seed = ctx.saved_tensors
    u, *parameters = tensors
    gradients = channel_mixing_backward(
        dy, u, mean, rstd, z, *parameters, *ctx.options, seed, ctx.backend, list(wanted), ctx.activation
    )
    return *or_none(gradients, wanted), *(None,) * 10


# ------------------------------------------------------------------------------------------------------- whole block


def _mixer_block(
    x, gamma1, beta1, w1, b1, w2, b2, gamma2, beta2, w3, b3, w4, b4, eps1, eps2, approximate, dtype, backend,
    activation="gelu",
):  # fmt: skip
    run = backends.load(backend)
    options = {"approximate": approximate, "dtype": dtype, **_kind(activation)}
    if hasattr(run, "mixer_block_forward"):  # as one call
        parameters = (gamma1, beta1, w1, b1, w2, b2, gamma2, beta2, w3, b3, w4, b4)
        return run.mixer_block_forward(x, *parameters, eps1=eps1, eps2=eps2, **options)
    u = run.token_mixing_forward(x, gamma1, beta1, w1, b1, w2, b2, eps=eps1, **options)[0]
    return run.channel_mixing_forward(u, gamma2, beta2, w3, b3, w4, b4, eps=eps2, **options)[0]


mixer_block = define(
    "mixer_block",
    "(Tensor x, Tensor? gamma1, Tensor? beta1, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2,"
    " Tensor? gamma2, Tensor? beta2, Tensor w3, Tensor? b3, Tensor w4, Tensor? b4,"
    " float eps1, float eps2, str approximate, ScalarType dtype, str backend, str activation='gelu') -> Tensor",
    _mixer_block,
    lambda x, *_: new_like(x),
)


def _kind(activation: str, norm: str = "layer") -> dict[str, str]:
    """What differs from the Mixer: backends that have no other kinds need not know the words."""
    kind = {} if activation == "gelu" else {"activation": activation}
    return kind if norm == "layer" else {**kind, "norm": norm}


differentiate("token_mixing", _token_mixing_differentiate, _token_mixing_save)
differentiate("channel_mixing", _channel_mixing_differentiate, _channel_mixing_save)
for _name in ("token_mixing_backward", "channel_mixing_backward", "mixer_block"):
    differentiate(_name)
