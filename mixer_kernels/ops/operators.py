"""The operators of MLP-Mixer and its relatives: a declaration each.

Halves and layers have gradients; ``mixer_block`` is for when none is wanted. ResMLP's and gMixer's other halves are
``token_mixing`` and ``channel_mixing`` with another norm or activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import backward, relatives
from .operator import Operator, new_like

_HALF = "Tensor? gamma, Tensor? beta, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"
_HALF_1 = "Tensor? gamma1, Tensor? beta1, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2"
_HALF_2 = "Tensor? gamma2, Tensor? beta2, Tensor w3, Tensor? b3, Tensor w4, Tensor? b4"
_GATE = "Tensor? gate_gamma, Tensor? gate_beta, Tensor w_gate, Tensor? b_gate"
_NOISE = "float dropout_p, float drop_path_p, Tensor? seed"
_OPTIONS = f"float eps, str approximate, ScalarType dtype, {_NOISE}, str backend"


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of the rows of ``x [B, S, C]``."""
    rows = x.shape[0] * x.shape[1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _aligned_rows(rows: int, columns: int, dtype: torch.dtype, x: Tensor) -> Tensor:
    """``[rows, columns]`` whose rows start on 16 bytes, as backends make z."""
    multiple = 16 // dtype.itemsize
    return x.new_empty(rows, (columns + multiple - 1) // multiple * multiple, dtype=dtype)[:, :columns]


def _like_x(x, *_, **__):
    return (new_like(x),)


# -------------------------------------------------------------------------------------------------- MLP-Mixer's block


def _token_mixing_fake(x, *_, **__):
    return new_like(x), *_new_statistics(x)


def _channel_mixing_fake(
    u, gamma, beta, w_in, b_in, w_out, b_out, *, dtype, keep_z, activation="gelu", norm="layer", **_
):
    statistics = (None, None) if norm == "affine" else _new_statistics(u)
    rows, z = u.shape[0] * u.shape[1], None
    if keep_z and activation == "swiglu":
        z = _aligned_rows(2 * rows, w_out.shape[1], dtype, u).unflatten(0, (rows, 2))
    elif keep_z:
        z = _aligned_rows(rows, w_in.shape[0], dtype, u)
    return new_like(u), *statistics, z


def _mixer_block(backend, x, *parameters, eps1, eps2, **options):
    if hasattr(backend, "mixer_block_forward"):  # as one call
        return backend.mixer_block_forward(x, *parameters, eps1=eps1, eps2=eps2, **options)
    u = backend.token_mixing_forward(x, *parameters[:6], eps=eps1, **options)[0]
    return backend.channel_mixing_forward(u, *parameters[6:], eps=eps2, **options)[0]


token_mixing, token_mixing_backward = Operator(
    "token_mixing",
    f"Tensor x, {_HALF}",
    f"{_OPTIONS}, str activation='gelu'",
    _token_mixing_fake,
    kept=2,  # mean, rstd
    backward=backward.token_mixing_backward,
    forward_only=("eps",),
).define()
channel_mixing, channel_mixing_backward = Operator(
    "channel_mixing",
    f"Tensor u, {_HALF}",
    f"{_OPTIONS}, bool keep_z, str activation='gelu', str norm='layer'",
    _channel_mixing_fake,
    kept=3,  # mean, rstd, z
    backward=backward.channel_mixing_backward,
    forward_only=("eps", "keep_z", "norm"),
).define()
mixer_block = Operator(
    "mixer_block",
    f"Tensor x, {_HALF_1}, {_HALF_2}",
    "float eps1, float eps2, str approximate, ScalarType dtype, str backend, str activation='gelu'",
    _like_x,
    forward=_mixer_block,
).define()[0]

# ------------------------------------------------------------------------------------------- ResMLP's tokens, and gMLP


def _spatial_gating_fake(h, *_, **__):
    return (h.new_empty(h.shape[0], h.shape[1], h.shape[2] // 2),)


def _gated_channel_mixing_fake(x, gamma, beta, w_in, *_, dtype, keep_z, **__):
    z = _aligned_rows(x.shape[0] * x.shape[1], w_in.shape[0], dtype, x) if keep_z else None
    return new_like(x), *_new_statistics(x), z


token_linear, token_linear_backward = Operator(
    "token_linear",
    "Tensor x, Tensor? alpha, Tensor? beta, Tensor w, Tensor? b, Tensor? scale",
    "ScalarType dtype, float drop_path_p, Tensor? seed, str backend",
    _like_x,
    backward=relatives.token_linear_backward,
    kernels="relatives_kernels",
).define()
spatial_gating, spatial_gating_backward = Operator(
    "spatial_gating",
    f"Tensor h, {_GATE}",
    "float eps, ScalarType dtype, str backend",
    _spatial_gating_fake,
    backward=relatives.spatial_gating_backward,
    kernels="relatives_kernels",
).define()
gated_channel_mixing, gated_channel_mixing_backward = Operator(
    "gated_channel_mixing",
    f"Tensor x, Tensor? gamma, Tensor? beta, Tensor w_in, Tensor? b_in, {_GATE}, Tensor w_out, Tensor? b_out",
    f"float eps, float gate_eps, str approximate, ScalarType dtype, {_NOISE}, str backend, bool keep_z",
    _gated_channel_mixing_fake,
    kept=3,  # mean, rstd, z
    backward=relatives.gated_channel_mixing_backward,
    kernels="relatives_kernels",
    forward_only=("eps", "keep_z"),
).define()

# -------------------------------------------------------------------------------------------------------- PatchTSMixer


def _gated_mixer_layer_fake(x, *_, keep_u, **__):
    return new_like(x), new_like(x) if keep_u else None


def _gated_mixer_layer(backend, x, *parameters, eps1, eps2, **options):
    return backend.gated_mixer_layer_forward(x, parameters[:8], parameters[8:], eps=(eps1, eps2), **options)


gated_mixing, gated_mixing_backward = Operator(
    "gated_mixing",
    "Tensor x, Tensor? gamma, Tensor? beta, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate,"
    " Tensor? b_gate",
    "int axis, bool gate_first, float eps, str approximate, ScalarType dtype, float dropout_p, Tensor? seed,"
    " str backend",
    _like_x,
    backward=relatives.gated_mixing_backward,
    kernels="relatives_kernels",
).define()
gated_mixer_layer, gated_mixer_layer_backward = Operator(
    "gated_mixer_layer",
    f"Tensor x, {_HALF_1}, Tensor? w_gate1, Tensor? b_gate1, {_HALF_2}, Tensor? w_gate2, Tensor? b_gate2",
    "float eps1, float eps2, str approximate, ScalarType dtype, float dropout_p, Tensor? seed, str backend,"
    " bool keep_u",
    _gated_mixer_layer_fake,
    forward=_gated_mixer_layer,
    kept=1,  # u
    backward=relatives.gated_mixer_layer_backward,
    kernels="relatives_kernels",
    forward_only=("keep_u",),
).define()
