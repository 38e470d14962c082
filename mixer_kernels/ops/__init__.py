"""The torch.library operators ``mixer_kernels::*`` of the Mixer and its relatives, and their backward.

One operator per call of the functional API, so that ``torch.compile`` and ``torch.export`` see one node whatever the
backend does inside. Operators take tensors that ``functional`` has checked, the dtype of the products and the name of
a backend with kernels; they return new contiguous tensors.

Halves and layers have gradients; ``mixer_block`` is for when none is wanted. ResMLP's and gMixer's other halves are
``token_mixing`` and ``channel_mixing`` with another norm or activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import backward, relatives
from ..backends.arguments import AffineLinear, FeatureMixer, GatedHalf, Half, Options, SpatialGate, TimeMixer
from ..backends.new_tensors import new_like, new_statistics, new_z
from .operator import Operator


def _like_x(x: Tensor, *_, **__):
    return (new_like(x),)


def _token_mixing_fake(x: Tensor, half: Half, options: Options):
    return new_like(x), *new_statistics(x)


def _channel_mixing_fake(x: Tensor, half: Half, options: Options, keep_z: bool):
    statistics = (None, None) if options.norm == "affine" else new_statistics(x)
    return new_like(x), *statistics, new_z(x, half.w_in.shape[0], options) if keep_z else None


def _spatial_gating_fake(x: Tensor, gate: SpatialGate, options: Options):
    return (x.new_empty(x.shape[0], x.shape[1], x.shape[2] // 2),)


def _gated_channel_mixing_fake(x: Tensor, half: Half, gate: SpatialGate, options: Options, gate_eps, keep_z: bool):
    return new_like(x), *new_statistics(x), new_z(x, half.w_in.shape[0], options) if keep_z else None


def _gated_mixer_layer_fake(x: Tensor, *_, keep_u: bool, **__):
    return new_like(x), new_like(x) if keep_u else None


def _time_mixing_fake(x: Tensor, mixer: TimeMixer, options: Options, norm_first: bool, keep_z: bool):
    return new_like(x), x.new_empty(x.shape, dtype=torch.float32) if keep_z else None


def _feature_mixing_fake(x: Tensor, mixer: FeatureMixer, options: Options, norm_first: bool, keep_z: bool):
    def of(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(*x.shape[:2], width, dtype=dtype)

    y, z = of(mixer.w_out.shape[0], x.dtype), of(mixer.w_in.shape[0]) if keep_z else None
    return y, z, of(mixer.w_out.shape[0]) if keep_z and not norm_first else None


def _tsmixer_layer_fake(
    x: Tensor, time: TimeMixer, features: FeatureMixer, options: Options, eps2, norm_first: bool, keep_z: bool
):
    _, z1 = _time_mixing_fake(x, time, options, norm_first, keep_z)
    y, *of_features = _feature_mixing_fake(x, features, options, norm_first, keep_z)
    return y, new_like(x) if keep_z else None, z1, *of_features


token_mixing, token_mixing_backward = Operator(
    "token_mixing",
    (Half,),
    _token_mixing_fake,
    kept=2,  # mean, rstd
    backward=backward.token_mixing_backward,
).define()
channel_mixing, channel_mixing_backward = Operator(
    "channel_mixing",
    (Half,),
    _channel_mixing_fake,
    further="bool keep_z",
    kept=3,  # mean, rstd, z
    backward=backward.channel_mixing_backward,
).define()
mixer_block, _ = Operator("mixer_block", (Half, Half), _like_x, further="float eps2").define()
token_linear, token_linear_backward = Operator(
    "token_linear", (AffineLinear,), _like_x, backward=relatives.token_linear_backward
).define()
spatial_gating, spatial_gating_backward = Operator(
    "spatial_gating", (SpatialGate,), _spatial_gating_fake, backward=relatives.spatial_gating_backward
).define()
gated_channel_mixing, gated_channel_mixing_backward = Operator(
    "gated_channel_mixing",
    (Half, SpatialGate),
    _gated_channel_mixing_fake,
    further="float gate_eps, bool keep_z",
    kept=3,  # mean, rstd, z
    backward=relatives.gated_channel_mixing_backward,
).define()
gated_mixing, gated_mixing_backward = Operator(
    "gated_mixing",
    (GatedHalf,),
    _like_x,
    further="int axis, bool gate_first",
    backward=relatives.gated_mixing_backward,
).define()
gated_mixer_layer, gated_mixer_layer_backward = Operator(
    "gated_mixer_layer",
    (GatedHalf, GatedHalf),
    _gated_mixer_layer_fake,
    further="float eps2, bool keep_u",
    kept=1,  # u
    backward=relatives.gated_mixer_layer_backward,
).define()
time_mixing, time_mixing_backward = Operator(
    "time_mixing",
    (TimeMixer,),
    _time_mixing_fake,
    further="bool norm_first, bool keep_z",
    kept=1,  # z
    backward=relatives.time_mixing_backward,
).define()
feature_mixing, feature_mixing_backward = Operator(
    "feature_mixing",
    (FeatureMixer,),
    _feature_mixing_fake,
    further="bool norm_first, bool keep_z",
    kept=2,  # z, what a last norm takes
    backward=relatives.feature_mixing_backward,
).define()
tsmixer_layer, tsmixer_layer_backward = Operator(
    "tsmixer_layer",
    (TimeMixer, FeatureMixer),
    _tsmixer_layer_fake,
    further="float eps2, bool norm_first, bool keep_z",
    kept=4,  # u, what the mixers keep
    backward=relatives.tsmixer_layer_backward,
).define()
