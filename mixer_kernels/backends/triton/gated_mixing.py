"""A half of a PatchTSMixer layer in one kernel, for short axes: equations (30) to (32) of docs/maths.md.

::

    n = LN(x)                             over the features, the last axis of x; or gamma * x + beta
    v = fc2(GELU(fc1(n)))                 along the mixed axis: features, patches or channels
    y = x + v * softmax(Wg . v + bg)      the gate; or before fc1: n * softmax(Wg . n + bg)

or the sigmoid in place of the softmax, and dropout behind GELU and fc2.

A program owns a tile ``[ROWS, K]``, the whole mixed axis by rows. Mixing features, its rows are any of x's, each with
its own LayerNorm. Mixing patches or channels they are features of one image, and LayerNorm is along them: a program
reads all of the image, which lies in the cache, for the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import gated_mixing_config, padded_extent
from ...tuning.target import target_of
from ..arguments import GatedHalf, Options
from ..new_tensors import new_like
from ..rounding import cdiv, round_up
from .activation import activation_of
from .channel_descriptors import quarters
from .launch import launch, needs_int64
from .noise import dropout_arguments, kept_branch, kept_hidden
from .pack import Packing
from .prepack import GatedMixingWeights, gated_mixing_weights
from .row_statistics import load_affine


@triton.jit
def _statistics_over_rows(
    x_ptr, rows, mask_k, offs_k, stride_row, stride_k, eps, ROWS: tl.constexpr, K: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Mean and rstd over all rows of an image, for each place on the mixed axis."""
    offs_r = tl.arange(0, ROWS)
    if INT64:
        offs_r = offs_r.to(tl.int64)
    total = tl.zeros((K,), tl.float32)
    for r0 in range(0, rows, ROWS):
        mask = (r0 + offs_r < rows)[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + (r0 + offs_r)[:, None] * stride_row + offs_k[None, :] * stride_k, mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / rows
    squares = tl.zeros((K,), tl.float32)
    rest = tl.zeros((K,), tl.float32)
    for r0 in range(0, rows, ROWS):
        mask = (r0 + offs_r < rows)[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + (r0 + offs_r)[:, None] * stride_row + offs_k[None, :] * stride_k, mask=mask, other=0.0)
        d = tl.where(mask, x.to(tl.float32) - mean[None, :], 0.0)
        squares += tl.sum(d * d, 0)
        rest += tl.sum(d, 0)
    # rstd multiplies the rounding error of the mean, by a thousand in a row without variance: the rest corrects it.
    rest /= rows
    return mean + rest, 1.0 / tl.sqrt_rn(squares / rows - rest * rest + eps)


@triton.jit
def normalised_rows(x, gamma_ptr, beta_ptr, mask, features, eps, FEATURES: tl.constexpr):
    """LayerNorm of each row of the tile, or without ``eps`` the affine map alone; zero outside ``mask``."""
    offs_f = tl.arange(0, FEATURES)
    gamma, beta = load_affine(gamma_ptr, beta_ptr, offs_f, offs_f < features, FEATURES)
    if eps is not None:
        mean = tl.sum(x, 1) / features
        d = tl.where(mask, x - mean[:, None], 0.0)
        rest = tl.sum(d, 1) / features
        mean += rest
        rstd = 1.0 / tl.sqrt_rn(tl.sum(d * d, 1) / features - rest * rest + eps)
        x = (x - mean[:, None]) * rstd[:, None]
    return tl.where(mask, x * gamma[None, :] + beta[None, :], 0.0)


@triton.jit
def _add_part(
    acc, v, w_ptr, FIRST: tl.constexpr, K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + v . W[:, FIRST:FIRST+N]', or with the rows of W if not ``TRANSPOSED``"""
    offs_k = tl.arange(0, K)
    offs_n = FIRST + tl.arange(0, N)
    if TRANSPOSED:
        w = tl.trans(tl.load(w_ptr + offs_k[:, None] * K + offs_n[None, :]))
    else:
        w = tl.load(w_ptr + offs_n[:, None] * K + offs_k[None, :])
    return tl.dot(v, w, acc, input_precision=PRECISION)


@triton.jit
def add_square_product(
    acc, v, w_ptr, ROWS: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + v . W', or v . W if not ``TRANSPOSED``, of W [K, K].

    By parts of the sum from 64: the whole of a wide W would fit neither registers nor shared memory.
    """
    v = v.to(w_ptr.dtype.element_ty)
    if K < 64:
        acc = _add_part(acc, v, w_ptr, 0, K, K, TRANSPOSED, PRECISION)
    else:
        parts = quarters(v, ROWS, K)
        for i in tl.static_range(4):
            if K < 256:
                acc = _add_part(acc, parts[i], w_ptr, i * (K // 4), K, K // 4, TRANSPOSED, PRECISION)
            else:
                smaller = quarters(parts[i], ROWS, K // 4)
                for j in tl.static_range(4):
                    acc = _add_part(
                        acc, smaller[j], w_ptr, i * (K // 4) + j * (K // 16), K, K // 16, TRANSPOSED, PRECISION
                    )  # fmt: skip
    return acc


@triton.jit
def gate_of(
    v, w_ptr, b_ptr, extent, SIGMOID: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """softmax(v . Wg' + bg), or the sigmoid of that, zero outside ``extent``; float32."""
    logits = add_square_product(tl.zeros((ROWS, K), tl.float32), v, w_ptr, ROWS, K, True, PRECISION)
    offs_k = tl.arange(0, K)
    logits += tl.load(b_ptr + offs_k)[None, :]
    logits = tl.where((offs_k < extent)[None, :], logits, float("-inf"))
    if SIGMOID:
        gate = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * logits))
    else:
        e = tl.exp2(1.4426950408889634 * (logits - tl.max(logits, 1, keep_dims=True)))  # exp
        gate = e / tl.sum(e, 1, keep_dims=True)
    return gate


@triton.jit
def mlp_of_rows(
    n, w1_ptr, b1_ptr, w2_ptr, b2_ptr, offs_r, image, noise, ROWS: tl.constexpr, K: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """fc2(GELU(fc1(n))) of each row of ``n [ROWS, K]``, with dropout; the hidden units never leave the chip."""
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    offs_k = tl.arange(0, K)
    n = n.to(DTYPE)
    v = tl.zeros((ROWS, K), tl.float32)
    for d0 in tl.range(0, HIDDEN, BLOCK_D, num_stages=STAGES):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        w1 = tl.load(w1_ptr + offs_d[:, None] * K + offs_k[None, :])
        z = tl.dot(n, tl.trans(w1), tl.zeros((ROWS, BLOCK_D), tl.float32), input_precision=PRECISION)
        a = ACT(z + tl.load(b1_ptr + offs_d)[None, :])
        if DROPOUT:
            a *= kept_hidden(noise, offs_d[None, :], offs_r[:, None], image)
        w2 = tl.load(w2_ptr + offs_k[:, None] * HIDDEN + offs_d[None, :])
        v = tl.dot(a.to(DTYPE), tl.trans(w2), v, input_precision=PRECISION)
    v += tl.load(b2_ptr + offs_k)[None, :]
    if DROPOUT:
        v *= kept_branch(noise, offs_k[None, :], offs_r[:, None], image)
    return v


@triton.jit
def _gated_mixing_kernel(
    x_ptr,  # any strides, as below
    gamma_ptr,  # [features] or None
    beta_ptr,  # [features] or None
    w1_ptr,  # [HIDDEN, K], zero-padded
    b1_ptr,  # [HIDDEN] float32, zero-padded
    w2_ptr,  # [K, HIDDEN], zero-padded
    b2_ptr,  # [K] float32, zero-padded
    gate_ptr,  # [K, K], zero-padded, or None
    gate_bias_ptr,  # [K] float32, zero-padded, or None
    y_ptr,  # like x, other strides
    rows,  # to an image
    extent,  # of the mixed axis
    inner,  # images along the inner of two axes of images
    stride_outer,  # of x
    stride_inner,
    stride_row,
    stride_k,
    y_stride_outer,
    y_stride_inner,
    y_stride_row,
    y_stride_k,
    eps,  # or None for an affine map without statistics
    noise,  # noise.dropout_arguments
    NORM_ROWS: tl.constexpr,  # LayerNorm along the rows, else along the mixed axis
    GATE_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,  # the gate, else softmax
    ROWS: tl.constexpr,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    INT64: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, ROWS)
    image = (tl.program_id(0) // row_tiles).to(tl.int64)
    offs_r = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, K)
    mask = (offs_r < rows)[:, None] & (offs_k < extent)[None, :]
    if NORM_ROWS:
        gamma, beta = load_affine(gamma_ptr, beta_ptr, offs_r, offs_r < rows, ROWS)
    if INT64:
        offs_r = offs_r.to(tl.int64)
    x_ptr += (image // inner) * stride_outer + (image % inner) * stride_inner
    y_ptr += (image // inner) * y_stride_outer + (image % inner) * y_stride_inner
    offs_x = offs_r[:, None] * stride_row + offs_k[None, :] * stride_k

    x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    if NORM_ROWS:
        n = x
        if eps is not None:
            mean, rstd = _statistics_over_rows(
                x_ptr, rows, offs_k < extent, offs_k, stride_row, stride_k, eps, ROWS, K, INT64
            )  # fmt: skip
            n = (x - mean[None, :]) * rstd[None, :]
        n = tl.where(mask, n * gamma[:, None] + beta[:, None], 0.0)
    else:
        n = normalised_rows(x, gamma_ptr, beta_ptr, mask, extent, eps, K)
    if GATE_FIRST and gate_ptr is not None:
        n *= gate_of(n, gate_ptr, gate_bias_ptr, extent, SIGMOID, ROWS, K, PRECISION)
    v = mlp_of_rows(
        n, w1_ptr, b1_ptr, w2_ptr, b2_ptr, offs_r, image, noise, ROWS, K, HIDDEN, BLOCK_D, STAGES, ACT, PRECISION,
        DROPOUT,
    )  # fmt: skip
    if not GATE_FIRST and gate_ptr is not None:
        v *= gate_of(v, gate_ptr, gate_bias_ptr, extent, SIGMOID, ROWS, K, PRECISION)
    x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    offs_y = offs_r[:, None] * y_stride_row + offs_k[None, :] * y_stride_k
    tl.store(y_ptr + offs_y, (x + v).to(y_ptr.dtype.element_ty), mask=mask)


def eps_of(eps: float, options: Options) -> float | None:
    """``eps`` as the kernels take it."""
    return None if options.norm == "affine" else eps


def extents_of(shape: torch.Size, axis: int) -> tuple[tuple[int, int], int, int]:
    """Images along two axes, rows to an image, and the extent of the mixed axis, 1, 2 or 3 of ``shape``.

    Along the features any rows: all are of one image.
    """
    if axis == 3:
        return (1, 1), shape[:3].numel(), shape[3]
    return (shape[0], shape[3 - axis]), shape[3], shape[axis]


def in_rows(t: Tensor, axis: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """``t`` and its strides in that order: images twice, rows, mixed axis; a copy where no strides say it."""
    if axis == 3:
        t = t.reshape(-1, t.shape[3])
        return t, (0, 0, *t.stride())
    return t, (t.stride(0), t.stride(3 - axis), t.stride(3), t.stride(axis))


def pack_gated_mixing(
    packing: Packing, x: Tensor, half: GatedHalf, options: Options, axis: int, name: str = ""
) -> GatedMixingWeights:
    """The weights of ``gated_mixing`` on ``x``."""
    _, rows, extent = extents_of(x.shape, axis)
    config = gated_mixing_config(target_of(x.device), options.dtype, rows, extent, options.exact)
    hidden = round_up(half.w_in.shape[0], config.block_d)
    return gated_mixing_weights(packing, half, padded_extent(extent), hidden, name)


def gated_mixing(
    x: Tensor, half: GatedHalf, weights: GatedMixingWeights, options: Options, axis: int, gate_first: bool
) -> Tensor:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, mixed along ``axis`` 1, 2 or 3."""
    y = new_like(x)
    images, rows, extent = extents_of(x.shape, axis)
    x, strides = in_rows(x, axis)
    _, y_strides = in_rows(y, axis)
    config = gated_mixing_config(target_of(x.device), options.dtype, rows, extent, options.exact)
    hidden, block_k = weights.w1.shape
    launch(
        _gated_mixing_kernel, images[0] * images[1] * cdiv(rows, config.rows),
        x, half.gamma, half.beta, *weights, y, rows, extent, images[1], *strides, *y_strides,
        eps_of(options.eps, options), **dropout_arguments(options), **config.launch_options(), NORM_ROWS=axis != 3,
        GATE_FIRST=gate_first, SIGMOID=options.gate == "sigmoid", ROWS=config.rows, K=block_k, HIDDEN=hidden,
        ACT=activation_of(options).function, PRECISION=options.precision,
        INT64=any(needs_int64((rows, extent), s[2:]) for s in (strides, y_strides)),
    )  # fmt: skip
    return y
