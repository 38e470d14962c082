"""The operators of MLP-Mixer's relatives for images: ResMLP's, gMLP's, and their backward.

ResMLP's and gMixer's other halves are kinds of ``token_mixing`` and ``channel_mixing``.
"""

from __future__ import annotations

from .. import backends
from ..backends import relatives
from .library import (
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

# ---------------------------------------------------------------------------------------------- ResMLP: token_linear

_LINEAR = "Tensor? alpha, Tensor? beta, Tensor w, Tensor? b, Tensor? scale"


def _token_linear(x, alpha, beta, w, b, scale, dtype, drop_path_p, seed, backend):
    return backends.load(backend).token_linear_forward(
        x, alpha, beta, w, b, scale, dtype=dtype, drop_path_p=drop_path_p, seed=seed
    )


def _token_linear_backward(du, x, alpha, beta, w, b, scale, dtype, drop_path_p, seed, backend, wanted):
    gradients = relatives.token_linear_backward(
        backends.load(backend).relatives_kernels(dtype), du, x, alpha, beta, w, b, scale,
        dtype=dtype, drop_path_p=drop_path_p, seed=seed, wanted=wanted,
    )  # fmt: skip
    return or_absent(gradients, x)


def _token_linear_backward_fake(du, x, alpha, beta, w, b, scale, dtype, drop_path_p, seed, backend, wanted):
    return new_gradients((x, alpha, beta, w, b, scale), wanted)


token_linear = define(
    "token_linear",
    f"(Tensor x, {_LINEAR}, ScalarType dtype, float drop_path_p, Tensor? seed, str backend) -> Tensor",
    _token_linear,
    lambda x, *_: new_like(x),
)
token_linear_backward = define(
    "token_linear_backward",
    f"(Tensor du, Tensor x, {_LINEAR}, ScalarType dtype, float drop_path_p, Tensor? seed, str backend, bool[] wanted)"
    f" -> {results(6)}",
    _token_linear_backward,
    _token_linear_backward_fake,
)


def _token_linear_save(ctx, inputs, output) -> None:
    *tensors, dtype, drop_path_p, seed, backend = inputs
    ctx.save_for_backward(*tensors, seed)
    ctx.options = (dtype, drop_path_p)
    ctx.backend = backend


def _token_linear_differentiate(ctx, du):
    wanted = ctx.needs_input_grad[:6]
    *tensors, seed = ctx.saved_tensors
    gradients = token_linear_backward(du, *tensors, *ctx.options, seed, ctx.backend, list(wanted))
    return *or_none(gradients, wanted), *(None,) * 4


# ---------------------------------------------------------------------------------------------- gMLP: spatial_gating

_GATE = "Tensor? gate_gamma, Tensor? gate_beta, Tensor w_gate, Tensor? b_gate"


def _spatial_gating(h, gamma, beta, w, b, eps, dtype, backend):
    return backends.load(backend).spatial_gating_forward(h, gamma, beta, w, b, eps=eps, dtype=dtype)


def _spatial_gating_fake(h, *_):
    return h.new_empty(h.shape[0], h.shape[1], h.shape[2] // 2)


def _spatial_gating_backward(ds, h, gamma, beta, w, b, eps, dtype, backend, wanted):
    gradients = relatives.spatial_gating_backward(
        backends.load(backend).relatives_kernels(dtype), ds, h, gamma, beta, w, b, eps=eps, dtype=dtype, wanted=wanted
    )
    return or_absent(gradients, h)


def _spatial_gating_backward_fake(ds, h, gamma, beta, w, b, eps, dtype, backend, wanted):
    return new_gradients((h, gamma, beta, w, b), wanted)


spatial_gating = define(
    "spatial_gating",
    f"(Tensor h, {_GATE}, float eps, ScalarType dtype, str backend) -> Tensor",
    _spatial_gating,
    _spatial_gating_fake,
)
spatial_gating_backward = define(
    "spatial_gating_backward",
    f"(Tensor ds, Tensor h, {_GATE}, float eps, ScalarType dtype, str backend, bool[] wanted) -> {results(5)}",
    _spatial_gating_backward,
    _spatial_gating_backward_fake,
)


def _spatial_gating_save(ctx, inputs, output) -> None:
    *tensors, eps, dtype, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (eps, dtype, backend)


def _spatial_gating_differentiate(ctx, ds):
    wanted = ctx.needs_input_grad[:5]
    gradients = spatial_gating_backward(ds, *ctx.saved_tensors, *ctx.options, list(wanted))
    return *or_none(gradients, wanted), *(None,) * 3


# ---------------------------------------------------------------------------------------- gMLP: gated_channel_mixing

_BLOCK = (
    f"Tensor? gamma, Tensor? beta, Tensor w_in, Tensor? b_in, {_GATE}, Tensor w_out, Tensor? b_out,"
    " float eps, float gate_eps, str approximate, ScalarType dtype"
)


def _gated_channel_mixing(
    x, gamma, beta, w1, b1, gate_gamma, gate_beta, w_gate, b_gate, w2, b2, eps, gate_eps, approximate, dtype,
    dropout_p, drop_path_p, seed, backend, keep_z,
):  # fmt: skip
    y, mean, rstd, z = backends.load(backend).gated_channel_mixing_forward(
        x, gamma, beta, w1, b1, gate_gamma, gate_beta, w_gate, b_gate, w2, b2, eps=eps, gate_eps=gate_eps,
        approximate=approximate, dtype=dtype, dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, keep_z=keep_z,
    )  # fmt: skip
    return y, mean, rstd, absent(x) if z is None else z


def _gated_channel_mixing_fake(
    x, gamma, beta, w1, b1, gate_gamma, gate_beta, w_gate, b_gate, w2, b2, eps, gate_eps, approximate, dtype,
    dropout_p, drop_path_p, seed, backend, keep_z,
):  # fmt: skip
    z = aligned_rows(x.shape[0] * x.shape[1], w1.shape[0], dtype, x) if keep_z else absent(x)
    return new_like(x), *new_statistics(x), z


def _gated_channel_mixing_backward(
    dy, mean, rstd, z, x, gamma, beta, w1, b1, gate_gamma, gate_beta, w_gate, b_gate, w2, b2, eps, gate_eps,
    approximate, dtype, dropout_p, drop_path_p, seed, backend, wanted,
):  # fmt: skip
    gradients = relatives.gated_channel_mixing_backward(
        backends.load(backend).relatives_kernels(dtype), dy, x, mean, rstd, z, gamma, beta, w1, b1, gate_gamma,
        gate_beta, w_gate, b_gate, w2, b2, gate_eps=gate_eps, approximate=approximate, dtype=dtype,
        dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed, wanted=wanted,
    )  # fmt: skip
    return or_absent(gradients, x)


def _gated_channel_mixing_backward_fake(dy, mean, rstd, z, *inputs):
    return new_gradients(inputs[:11], inputs[-1])


gated_channel_mixing = define(
    "gated_channel_mixing",
    f"(Tensor x, {_BLOCK}, {NOISE}, str backend, bool keep_z) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_channel_mixing,
    _gated_channel_mixing_fake,
)
gated_channel_mixing_backward = define(
    "gated_channel_mixing_backward",
    f"(Tensor dy, Tensor mean, Tensor rstd, Tensor? z, Tensor x, {_BLOCK}, {NOISE}, str backend, bool[] wanted)"
    f" -> {results(11)}",
    _gated_channel_mixing_backward,
    _gated_channel_mixing_backward_fake,
)


def _gated_channel_mixing_save(ctx, inputs, output) -> None:
    *tensors, eps, gate_eps, approximate, dtype, dropout_p, drop_path_p, seed, backend, keep_z = inputs
    _, mean, rstd, z = output
    ctx.save_for_backward(mean, rstd, z if keep_z else None, *tensors, seed)
    ctx.mark_non_differentiable(mean, rstd, z)
    ctx.options = (eps, gate_eps, approximate, dtype, dropout_p, drop_path_p)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _gated_channel_mixing_differentiate(ctx, dy, *_):
    wanted = ctx.needs_input_grad[:11]
    if dy is None:
        return (None,) * 20
    *tensors, seed = ctx.saved_tensors
    gradients = gated_channel_mixing_backward(dy, *tensors, *ctx.options, seed, ctx.backend, list(wanted))
    return *or_none(gradients, wanted), *(None,) * 9


differentiate("token_linear", _token_linear_differentiate, _token_linear_save)
differentiate("spatial_gating", _spatial_gating_differentiate, _spatial_gating_save)
differentiate("gated_channel_mixing", _gated_channel_mixing_differentiate, _gated_channel_mixing_save)
for _name in ("token_linear", "spatial_gating", "gated_channel_mixing"):
    differentiate(f"{_name}_backward")
