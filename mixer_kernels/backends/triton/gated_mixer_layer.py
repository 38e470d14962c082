"""A PatchTSMixer layer in one kernel, for small tiles: equations (30) to (32) of docs/maths.md, twice.

::

    u = x + (gate1(fc2(GELU(fc1(LN1(x)')))))'         by columns: along the patches
    y = u + gate2(fc4(GELU(fc3(LN2(u)))))             by rows: along the features

A program owns a series of one image, ``[PATCHES, FEATURES]``: x is read once, y is written once, and what is between
never leaves the chip. Only where a backward pass will ask for it is u written too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import GatedMixingConfig, gated_mixer_layer_config, padded_extent
from ...tuning.target import target_of
from ..arguments import GatedHalf, Options
from ..new_tensors import new_like
from ..relatives import halves_of_layer
from ..rounding import round_up
from .activation import activation_of
from .gated_mixing import eps_of, gate_of, gated_mixing, mlp_of_rows, normalised_rows, pack_gated_mixing
from .launch import launch, needs_int64
from .noise import dropout_arguments, with_next_seed
from .pack import Packing
from .prepack import GatedMixingWeights, gated_mixing_weights


@triton.jit
def _gated_mixer_layer_kernel(
    x_ptr,  # any strides, as below
    gamma1_ptr,  # [features] or None
    beta1_ptr,  # [features] or None
    w1_ptr,  # [HIDDEN1, PATCHES], zero-padded
    b1_ptr,  # [HIDDEN1] float32, zero-padded
    w2_ptr,  # [PATCHES, HIDDEN1], zero-padded
    b2_ptr,  # [PATCHES] float32, zero-padded
    gate1_ptr,  # [PATCHES, PATCHES], zero-padded, or None
    gate1_bias_ptr,  # [PATCHES] float32, zero-padded, or None
    gamma2_ptr,  # [features] or None
    beta2_ptr,  # [features] or None
    w3_ptr,  # [HIDDEN2, FEATURES], zero-padded
    b3_ptr,  # [HIDDEN2] float32, zero-padded
    w4_ptr,  # [FEATURES, HIDDEN2], zero-padded
    b4_ptr,  # [FEATURES] float32, zero-padded
    gate2_ptr,  # [FEATURES, FEATURES], zero-padded, or None
    gate2_bias_ptr,  # [FEATURES] float32, zero-padded, or None
    u_ptr,  # contiguous, in the shape of x, or None
    y_ptr,  # contiguous, in the shape of x
    patches,
    features,
    inner,  # series of an image
    stride_outer,  # of x
    stride_inner,
    stride_patch,
    stride_feature,
    eps1,  # or None for an affine map without statistics
    eps2,
    noise,  # noise.dropout_arguments, with a seed to each mixer
    SIGMOID: tl.constexpr,  # the gates, else softmax
    PATCHES: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN1: tl.constexpr,
    HIDDEN2: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    INT64: tl.constexpr,
):
    series = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, PATCHES)
    offs_f = tl.arange(0, FEATURES)
    mask = (offs_p < patches)[:, None] & (offs_f < features)[None, :]
    offs_y = series * patches * features + offs_p[:, None] * features + offs_f[None, :]
    x_ptr += (series // inner) * stride_outer + (series % inner) * stride_inner
    if INT64:
        offs_x = offs_p.to(tl.int64)[:, None] * stride_patch + offs_f.to(tl.int64)[None, :] * stride_feature
    else:
        offs_x = offs_p[:, None] * stride_patch + offs_f[None, :] * stride_feature

    x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    n = tl.trans(normalised_rows(x, gamma1_ptr, beta1_ptr, mask, features, eps1, FEATURES))
    # Rows and images of the random numbers as gated_mixing counts them, whose backward draws them again.
    v = mlp_of_rows(
        n, w1_ptr, b1_ptr, w2_ptr, b2_ptr, offs_f, series, noise, FEATURES, PATCHES, HIDDEN1, BLOCK_D, STAGES, ACT,
        PRECISION, DROPOUT,
    )  # fmt: skip
    if gate1_ptr is not None:
        v *= gate_of(v, gate1_ptr, gate1_bias_ptr, patches, SIGMOID, FEATURES, PATCHES, PRECISION)
    u = x + tl.trans(v)
    if u_ptr is not None:
        tl.store(u_ptr + offs_y, u.to(u_ptr.dtype.element_ty), mask=mask)

    noise2 = with_next_seed(noise) if DROPOUT else noise
    n = normalised_rows(u, gamma2_ptr, beta2_ptr, mask, features, eps2, FEATURES)
    v = mlp_of_rows(
        n, w3_ptr, b3_ptr, w4_ptr, b4_ptr, series * patches + offs_p, 0 * series, noise2,
        PATCHES, FEATURES, HIDDEN2, BLOCK_D, STAGES, ACT, PRECISION, DROPOUT,
    )  # fmt: skip
    if gate2_ptr is not None:
        v *= gate_of(v, gate2_ptr, gate2_bias_ptr, features, SIGMOID, PATCHES, FEATURES, PRECISION)
    tl.store(y_ptr + offs_y, (u + v).to(y_ptr.dtype.element_ty), mask=mask)


def gated_mixer_layer(
    x: Tensor,
    of_patches: GatedHalf,
    of_features: GatedHalf,
    options: Options,
    eps2: float,
    keep_u: bool,
    packing: Packing,
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, and u if kept.

    A tile that does not fit the registers goes by ``gated_mixing``, twice.
    """
    _, channels, patches, features = x.shape
    config = gated_mixer_layer_config(
        target_of(x.device), options.dtype, x.dtype, patches, features, options.exact, dropout=options.dropout_p > 0
    )
    if config is None:
        first, second = halves_of_layer(options, eps2)
        weights1 = pack_gated_mixing(packing, x, of_patches, first, 2, "2.")
        weights2 = pack_gated_mixing(packing, x, of_features, second, 3, "3.")
        packing.run()
        u = gated_mixing(x, of_patches, weights1, first, axis=2, gate_first=False)
        y = gated_mixing(u, of_features, weights2, second, axis=3, gate_first=False)
        return y, u if keep_u else None
    y = new_like(x)
    u = torch.empty_like(y) if keep_u else None
    weights1 = _weights(packing, of_patches, patches, config, "2.")
    weights2 = _weights(packing, of_features, features, config, "3.")
    packing.run()
    launch(
        _gated_mixer_layer_kernel, x.shape[0] * channels,
        x, *of_patches[:2], *weights1, *of_features[:2], *weights2, u, y, patches, features, channels, *x.stride(),
        eps_of(options.eps, options), eps_of(eps2, options), **dropout_arguments(options), **config.launch_options(),
        SIGMOID=options.gate == "sigmoid", PATCHES=padded_extent(patches), FEATURES=padded_extent(features),
        HIDDEN1=weights1.w1.shape[0], HIDDEN2=weights2.w1.shape[0], ACT=activation_of(options).function,
        PRECISION=options.precision, INT64=needs_int64((patches, features), x.stride()[2:]),
    )  # fmt: skip
    return y, u


def _weights(
    packing: Packing, half: GatedHalf, extent: int, config: GatedMixingConfig, name: str
) -> GatedMixingWeights:
    hidden = round_up(half.w_in.shape[0], config.block_d)
    return gated_mixing_weights(packing, half, padded_extent(extent), hidden, name)
