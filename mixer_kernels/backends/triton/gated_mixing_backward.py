"""Backward of ``gated_mixing`` up to LayerNorm's, in one kernel: equations (33) to (35) of docs/maths.md.

::

    g, dL = gate'(dy)                     L: the gate's logits; or behind dV, where the gate is before fc1
    dZ = (g . W2) * GELU'(Z)
    dn = dZ . W1

A program owns a tile ``[ROWS, K]``, as the forward kernel, and computes n, Z and the gate again, from x. What the
weight gradients multiply is written once, by rows, for plain products; the sums of the biases' gradients stay in a row
to a program, which PyTorch adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import gated_mixing_backward_config, padded_extent
from ...tuning.target import target_of
from ..arguments import GatedHalf, GatedMixingGradients, Norm, Options
from ..new_tensors import aligned_rows
from ..rounding import cdiv, round_up
from .activation import activation_of
from .gated_mixing import add_square_product, extents_of, gate_of, in_rows
from .launch import launch, needs_int64
from .noise import dropout_arguments, kept_branch, kept_hidden
from .pack import Packing
from .prepack import gated_mixing_weights
from .row_statistics import load_affine


@triton.jit
def _gate_backward(
    g, v, gate, w_ptr, SIGMOID: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """The gradients of v and of the gate's logits from ``g``, that of v * gate."""
    dgate = g * v
    if SIGMOID:
        dlogits = gate * (1.0 - gate) * dgate
    else:
        dlogits = gate * (dgate - tl.sum(dgate * gate, 1, keep_dims=True))
    return add_square_product(g * gate, dlogits, w_ptr, ROWS, K, False, PRECISION), dlogits


@triton.jit
def _store_rows(out_ptr, tile, offs_r, mask_r, offs_k, extent, stride):
    mask = mask_r[:, None] & (offs_k < extent)[None, :]
    tl.store(out_ptr + offs_r[:, None] * stride + offs_k[None, :], tile.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_mixing_bwd_kernel(
    dy_ptr,  # contiguous, indexed as dn
    x_ptr,  # any strides, as below
    mean_ptr,  # float32, of each place that is not along the features; or None for an affine map without statistics
    rstd_ptr,
    gamma_ptr,  # [features] or None
    beta_ptr,  # [features] or None
    w1_ptr,  # [HIDDEN, K], zero-padded
    b1_ptr,  # [HIDDEN] float32, zero-padded
    w2_ptr,  # [K, HIDDEN], zero-padded
    b2_ptr,  # [K] float32, zero-padded
    gate_ptr,  # [K, K], zero-padded, or None
    gate_bias_ptr,  # [K] float32, zero-padded, or None
    dn_ptr,  # contiguous, in the shape of x
    dz_ptr,  # [images * rows, hidden], the gradient of fc1's output; until then GELU's slope
    v_ptr,  # [images * rows, extent], fc1's input; None, as all below, without weight gradients
    a_ptr,  # [images * rows, hidden], fc2's input
    g_ptr,  # [images * rows, extent], the gradient of fc2's output
    gated_ptr,  # [images * rows, extent], the gate's input; or None
    dlogits_ptr,  # [images * rows, extent], or None
    sums_ptr,  # [programs, HIDDEN + 2 * K] float32: of dz, g, dlogits; or None
    rows,  # to an image
    extent,  # of the mixed axis
    hidden,
    inner,  # images along the inner of two axes of images
    stride_outer,  # of x
    stride_inner,
    stride_row,
    stride_k,
    dn_stride_outer,
    dn_stride_inner,
    dn_stride_row,
    dn_stride_k,
    mean_stride_outer,
    mean_stride_inner,
    mean_stride,  # along the mixed axis, or along the rows if those are no features
    extent_stride,  # between rows of v, g, gated, dlogits
    hidden_stride,  # between rows of a, dz
    noise,  # noise.dropout_arguments
    NORM_ROWS: tl.constexpr,  # LayerNorm along the rows, else along the mixed axis
    GATE_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,  # the gate, else softmax
    ROWS: tl.constexpr,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    row_tiles = tl.cdiv(rows, ROWS)
    image = (tl.program_id(0) // row_tiles).to(tl.int64)
    offs_r = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, K)
    mask_r = offs_r < rows
    mask_k = offs_k < extent
    mask = mask_r[:, None] & mask_k[None, :]
    FEATURES: tl.constexpr = ROWS if NORM_ROWS else K
    feature = offs_r if NORM_ROWS else offs_k
    mask_f = mask_r if NORM_ROWS else mask_k
    gamma, beta = load_affine(gamma_ptr, beta_ptr, feature, mask_f, FEATURES)
    if INT64:
        offs_r = offs_r.to(tl.int64)
    x_ptr += (image // inner) * stride_outer + (image % inner) * stride_inner
    offs_dn = (image // inner) * dn_stride_outer + (image % inner) * dn_stride_inner
    offs_dn += offs_r[:, None] * dn_stride_row + offs_k[None, :] * dn_stride_k

    x = tl.load(x_ptr + offs_r[:, None] * stride_row + offs_k[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
    offs_mean = (image // inner) * mean_stride_outer + (image % inner) * mean_stride_inner
    if mean_ptr is not None:
        offs_mean += (offs_k if NORM_ROWS else offs_r) * mean_stride
        mean = tl.load(mean_ptr + offs_mean, mask=mask_k if NORM_ROWS else mask_r, other=0.0)
        rstd = tl.load(rstd_ptr + offs_mean, mask=mask_k if NORM_ROWS else mask_r, other=0.0)
        if NORM_ROWS:
            x = (x - mean[None, :]) * rstd[None, :]
        else:
            x = (x - mean[:, None]) * rstd[:, None]
    if NORM_ROWS:
        n = x * gamma[:, None] + beta[:, None]
    else:
        n = x * gamma[None, :] + beta[None, :]
    n = tl.where(mask, n, 0.0)
    row = image * rows + offs_r
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * (HIDDEN + 2 * K)

    GATED: tl.constexpr = gate_ptr is not None
    v = n.to(DTYPE)
    if GATE_FIRST and GATED:
        gate = gate_of(n, gate_ptr, gate_bias_ptr, extent, SIGMOID, ROWS, K, PRECISION)
        v = (n * gate).to(DTYPE)
    # Two passes over the hidden units, and their slopes through memory: v and g together would not fit registers.
    out = tl.zeros((ROWS, K), tl.float32)
    for d0 in tl.range(0, HIDDEN, BLOCK_D, num_stages=STAGES):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        w1 = tl.load(w1_ptr + offs_d[:, None] * K + offs_k[None, :])
        z = tl.dot(v, tl.trans(w1), tl.zeros((ROWS, BLOCK_D), tl.float32), input_precision=PRECISION)
        a, slope = SLOPE(z + tl.load(b1_ptr + offs_d)[None, :])
        if DROPOUT:
            kept = kept_hidden(noise, offs_d[None, :], offs_r[:, None], image)
            a *= kept
            slope *= kept
        _store_rows(dz_ptr, slope, row, mask_r, offs_d, hidden, hidden_stride)
        if sums_ptr is not None:
            _store_rows(a_ptr, a, row, mask_r, offs_d, hidden, hidden_stride)
        if GATED and not GATE_FIRST:
            w2 = tl.load(w2_ptr + offs_k[:, None] * HIDDEN + offs_d[None, :])
            out = tl.dot(a.to(DTYPE), tl.trans(w2), out, input_precision=PRECISION)
    if sums_ptr is not None:
        _store_rows(v_ptr, v, row, mask_r, offs_k, extent, extent_stride)

    g = tl.load(dy_ptr + offs_dn, mask=mask, other=0.0).to(tl.float32)
    if GATED and not GATE_FIRST:
        out += tl.load(b2_ptr + offs_k)[None, :]
        if DROPOUT:
            out *= kept_branch(noise, offs_k[None, :], offs_r[:, None], image)
        gate = gate_of(out, gate_ptr, gate_bias_ptr, extent, SIGMOID, ROWS, K, PRECISION)
        g, dlogits = _gate_backward(g, out, gate, gate_ptr, SIGMOID, ROWS, K, PRECISION)
        if sums_ptr is not None:
            _store_rows(gated_ptr, out, row, mask_r, offs_k, extent, extent_stride)
            _store_rows(dlogits_ptr, dlogits, row, mask_r, offs_k, extent, extent_stride)
            tl.store(sums_ptr + HIDDEN + K + offs_k, tl.sum(dlogits, 0))
    if DROPOUT:
        g *= kept_branch(noise, offs_k[None, :], offs_r[:, None], image)
    if sums_ptr is not None:
        _store_rows(g_ptr, g, row, mask_r, offs_k, extent, extent_stride)
        tl.store(sums_ptr + HIDDEN + offs_k, tl.sum(g, 0))

    g = g.to(DTYPE)
    dn = tl.zeros((ROWS, K), tl.float32)
    tl.debug_barrier()  # another thread may have stored the slope that this one loads
    for d0 in tl.range(0, HIDDEN, BLOCK_D, num_stages=STAGES):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        w2 = tl.load(w2_ptr + offs_k[:, None] * HIDDEN + offs_d[None, :])
        dz = tl.dot(g, w2, tl.zeros((ROWS, BLOCK_D), tl.float32), input_precision=PRECISION)
        mask_d = mask_r[:, None] & (offs_d < hidden)[None, :]
        dz *= tl.load(dz_ptr + row[:, None] * hidden_stride + offs_d[None, :], mask=mask_d, other=0.0).to(tl.float32)
        if sums_ptr is not None:
            tl.debug_barrier()  # nor may it be overwritten before
            _store_rows(dz_ptr, dz, row, mask_r, offs_d, hidden, hidden_stride)
            tl.store(sums_ptr + offs_d, tl.sum(dz, 0))
        w1 = tl.load(w1_ptr + offs_d[:, None] * K + offs_k[None, :])
        dn = tl.dot(dz.to(DTYPE), w1, dn, input_precision=PRECISION)
    if GATE_FIRST and GATED:
        dn, dlogits = _gate_backward(dn, n, gate, gate_ptr, SIGMOID, ROWS, K, PRECISION)
        if sums_ptr is not None:
            _store_rows(gated_ptr, n, row, mask_r, offs_k, extent, extent_stride)
            _store_rows(dlogits_ptr, dlogits, row, mask_r, offs_k, extent, extent_stride)
            tl.store(sums_ptr + HIDDEN + K + offs_k, tl.sum(dlogits, 0))
    tl.store(dn_ptr + offs_dn, dn.to(dn_ptr.dtype.element_ty), mask=mask)


def gated_mixing_gradients(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    half: GatedHalf,
    options: Options,
    axis: int,
    gate_first: bool,
    of_weights: bool,
) -> GatedMixingGradients:
    """The gradient of n from ``dy``, contiguous, and, ``of_weights``, what the weights' gradients are products of.

    ``x [B, channels, patches, features]``, its statistics ``[B * channels * patches]``.
    """
    dtype, hidden, has_gate = options.dtype, half.w_in.shape[0], half.w_gate is not None
    dn = torch.empty(x.shape, dtype=dtype, device=x.device)
    images, rows, extent = extents_of(x.shape, axis)
    mean_strides = (0, 0, 0)
    if norm.mean is not None:
        mean_strides = in_rows(norm.mean.view(*x.shape[:3], 1), axis)[1]
        mean_strides = (*mean_strides[:2], mean_strides[2 if axis == 3 else 3])
    x, strides = in_rows(x, axis)
    _, dn_strides = in_rows(dn, axis)
    config = gated_mixing_backward_config(
        target_of(x.device), dtype, extent, options.exact, dropout=options.dropout_p > 0
    )
    block_k, padded_hidden = padded_extent(extent), round_up(hidden, config.block_d)
    packing = Packing(dtype)
    weights = gated_mixing_weights(packing, half, block_k, padded_hidden)
    packing.run()
    programs = images[0] * images[1] * cdiv(rows, config.rows)

    def operand(columns: int, present: bool = True) -> Tensor | None:
        return aligned_rows(images[0] * images[1] * rows, columns, dtype, x.device) if present else None

    dz = operand(hidden)
    v, a, g = (operand(columns, of_weights) for columns in (extent, hidden, extent))
    gated, dlogits = (operand(extent, of_weights and has_gate) for _ in range(2))
    sums = None
    if of_weights:
        sums = torch.empty(programs, padded_hidden + 2 * block_k, dtype=torch.float32, device=x.device)
    launch(
        _gated_mixing_bwd_kernel, programs,
        dy, x, *norm, *weights, dn, dz, v, a, g, gated, dlogits, sums, rows, extent, hidden, images[1],
        *strides, *dn_strides, *mean_strides, g.stride(0) if of_weights else 0, dz.stride(0),
        **dropout_arguments(options), **config.launch_options(), NORM_ROWS=axis != 3, GATE_FIRST=gate_first,
        SIGMOID=options.gate == "sigmoid", ROWS=config.rows, K=block_k, HIDDEN=padded_hidden,
        SLOPE=activation_of(options).and_slope, PRECISION=options.precision,
        INT64=any(needs_int64((rows, extent), s[2:]) for s in (strides, dn_strides)),
    )  # fmt: skip
    biases = (None, None, None)
    if of_weights:  # each a tensor of its own: an operator's results may not share memory
        of_z, of_out, of_logits = sums.split((padded_hidden, block_k, block_k), 1)
        biases = (
            of_z[:, :hidden].sum(0),
            of_out[:, :extent].sum(0),
            of_logits[:, :extent].sum(0) if has_gate else None,
        )
    return GatedMixingGradients(dn, v, a, dz, g, gated, dlogits, *biases)
