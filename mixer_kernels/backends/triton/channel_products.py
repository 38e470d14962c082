"""The channel products on plain pointers: any strides, any sizes, any architecture; one tile per program."""

from __future__ import annotations

import triton
import triton.language as tl

from ...tuning.configs import ProductConfig
from ..rounding import cdiv
from .activation import activation_of
from .channel_epilogue import ChannelProduct, fc1_epilogue, fc2_epilogue, hidden_dropout, tile_origin
from .launch import launch, needs_int64
from .noise import kept_image, noise_arguments


@triton.jit
def _channel_product_kernel(
    left_ptr,  # fc1: u [B, S, C], any strides; fc2: a [M, K]
    right_ptr,  # [N, K_PAD], zero-padded: W3, W' or W4; GLU's fc1: [2 * N, K_PAD], values and gates
    out_ptr,  # [M, N], row stride stride_out; fc1: or None
    z_ptr,  # fc1: [M, N] like out, GLU: [M, 2, N], or None
    bias_ptr,  # [N] or None
    u_ptr,  # fc2: the residual [B, S, C], any strides
    mean_ptr,  # fc1: [M] float32, or None for an affine map without statistics
    rstd_ptr,  # fc1: [M] float32, or None
    gamma_ptr,  # fc1 applied: [C] or None
    beta_ptr,  # fc1 applied: [C] or None
    wg_ptr,  # fc1 folded: [N] float32
    wb_ptr,  # fc1 folded: [N] float32
    scale_ptr,  # fc1 folded: [N] float32 or None
    M,
    N,
    K,
    K_PAD,
    S,  # rows of u to an image
    stride_b,  # of u
    stride_s,
    stride_c,
    stride_a,  # row stride of a
    stride_out,
    noise,  # noise.noise_arguments
    FC1: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACT: tl.constexpr,
    GLU: tl.constexpr,  # of fc1
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = right_ptr.dtype.element_ty
    tile = tl.program_id(0)
    offs_k = tl.arange(0, BLOCK_K)
    if INT64:
        tile = tile.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    m0, n0 = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    # Rows past M and columns past N are clamped rather than masked: they are not stored.
    row = tl.minimum(offs_m, M - 1)
    column = tl.minimum(offs_n, N - 1)
    offs_row = (row // S).to(tl.int64) * stride_b + (row % S) * stride_s
    right_tile_ptr = right_ptr + column.to(tl.int64)[None, :] * K_PAD + offs_k[:, None]
    if FC1:
        left_tile_ptr = left_ptr + offs_row[:, None] + offs_k[None, :] * stride_c
        step = tl.full((), BLOCK_K, offs_k.dtype) * stride_c
        mean = None
        rstd = None
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
    else:
        left_tile_ptr = left_ptr + row.to(tl.int64)[:, None] * stride_a + offs_k[None, :]
        step = BLOCK_K

    depth = K
    if DROP_PATH:
        # A tile of dropped images takes no turn of the loop; fc1's garbage is multiplied by 0 in fc2, or not read.
        kept = kept_image(noise, row // S)
        depth = tl.where(tl.max(kept, 0) > 0, K, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GLU:
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate_tile_ptr = right_tile_ptr + tl.cast(N, tl.int64) * K_PAD
    for k0 in range(0, depth, BLOCK_K):
        mask_k = offs_k < K - k0
        if EVEN_K:
            left = tl.load(left_tile_ptr)
        else:
            left = tl.load(left_tile_ptr, mask=mask_k[None, :], other=0.0)
        right = tl.load(right_tile_ptr)
        if FC1 and not FOLD:
            n = left.to(tl.float32)
            if mean_ptr is not None:
                n = (n - mean[:, None]) * rstd[:, None]
            if gamma_ptr is not None:
                n *= tl.load(gamma_ptr + k0 + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
            if beta_ptr is not None:
                n += tl.load(beta_ptr + k0 + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
            left = tl.where(mask_k[None, :], n, 0.0).to(DTYPE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if GLU:
            gate = tl.dot(left, tl.load(gate_tile_ptr), gate, input_precision=PRECISION)
            gate_tile_ptr += BLOCK_K
        left_tile_ptr += step
        right_tile_ptr += BLOCK_K

    mask = mask_m[:, None] & mask_n[None, :]
    offs_out = offs_m.to(tl.int64)[:, None] * stride_out + offs_n[None, :]
    if FC1:
        z = fc1_epilogue(acc, mean, rstd, bias_ptr, wg_ptr, wb_ptr, scale_ptr, offs_n, mask_n, FOLD)
        if GLU:
            gate = fc1_epilogue(gate, mean, rstd, bias_ptr, wg_ptr, wb_ptr, scale_ptr, N + offs_n, mask_n, FOLD)
        if z_ptr is not None:
            if GLU:
                offs_z = offs_m.to(tl.int64)[:, None] * (2 * stride_out) + offs_n[None, :]
                tl.store(z_ptr + offs_z, z.to(DTYPE), mask=mask)
                tl.store(z_ptr + stride_out + offs_z, gate.to(DTYPE), mask=mask)
            else:
                tl.store(z_ptr + offs_out, z.to(DTYPE), mask=mask)
        if out_ptr is not None:
            if GLU:
                a = ACT(z, gate)
            else:
                a = ACT(z)
            if DROPOUT:
                a = hidden_dropout(a, offs_m, offs_n, S, noise)
            tl.store(out_ptr + offs_out, a.to(DTYPE), mask=mask)
    else:
        u = tl.load(u_ptr + offs_row[:, None] + offs_n[None, :] * stride_c, mask=mask, other=0.0)
        y = fc2_epilogue(
            acc, u, bias_ptr, offs_m, offs_n, mask_n, S, noise, DROPOUT, DROP_PATH,
        )  # fmt: skip
        tl.store(out_ptr + offs_out, y.to(out_ptr.dtype.element_ty), mask=mask)


def run_product(config: ProductConfig, product: ChannelProduct) -> None:
    """Write ``product.out`` and ``product.z``."""
    (rows, columns), u, weights, options = product.shape, product.u, product.weights, product.options
    launch(
        _channel_product_kernel, cdiv(rows, config.block_m) * cdiv(columns, config.block_n),
        product.left, weights.right, product.out, product.z, weights.bias, u, product.norm.mean, product.norm.rstd,
        weights.gamma, weights.beta, weights.wg, weights.wb, weights.scale, rows, columns, product.K,
        weights.right.shape[1],
        u.shape[1], *u.stride(), product.left.stride(0), product.row_stride,
        **noise_arguments(options), **config.launch_options(), GROUP_M=config.group_m,
        FC1=product.is_fc1, FOLD=weights.wg is not None, EVEN_K=product.K % config.block_k == 0,
        ACT=activation_of(options).function, GLU=product.is_glu, PRECISION=options.precision,
        INT64=needs_int64(u.shape[1:], u.stride()[1:]) or rows + config.block_m >= 2**31,
    )  # fmt: skip
