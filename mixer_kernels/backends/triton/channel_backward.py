"""Channel mixing backward: the one product that has an epilogue, equation (20) of docs/maths.md.

::

    da = g . W4                    [M, D_C]
    dz = da * GELU'(z)             and a = GELU(z), both written: the plain products dn = dz . W3, dW3 = dz' . n and
                                   dW4' = a' . g are PyTorch's (cuBLAS)

With SwiGLU z and dz have twice the columns, values and gates, equation (23).
z is what the forward pass kept, or was recomputed. Column sums of dz, one row a tile of rows, give db3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import gelu_backward_config
from ...tuning.target import target_of
from ..arguments import Half, Norm, Options, Parts
from ..rounding import cdiv
from . import channel_backward_descriptors
from .activation import activation_of
from .channel_descriptors import quarters
from .channel_epilogue import hidden_dropout, tile_origin
from .channel_mixing import channel_hidden
from .launch import launch, needs_int64
from .noise import noise_arguments
from .pack import Packing
from .prepack import fc1_weights, product_weight


@triton.jit
def _channel_gelu_bwd_kernel(
    g_ptr,  # [M, C] contiguous: the gradient of the branch
    w4_ptr,  # [C, D_PAD], zero-padded along D_C
    z_ptr,  # [M, D_C], row stride stride_z; GLU: [M, 2, D_C], gates half a row stride behind their values
    dz_ptr,  # [M, D_C] contiguous; GLU: [M, 2 * D_C]
    a_ptr,  # [M, D_C] contiguous, or None
    sums_ptr,  # [row tiles, columns of dz] float32: column sums of dz
    M,
    C,
    D_C,
    D_PAD,
    S,  # rows to an image
    stride_z,
    noise,  # noise.noise_arguments
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,  # every tile of w4 lies inside of it
    SLOPE: tl.constexpr,
    GLU: tl.constexpr,
    QUARTERS: tl.constexpr,  # the epilogue takes a quarter of the columns at a time
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = w4_ptr.dtype.element_ty
    tile = tl.program_id(0)
    if INT64:
        tile = tile.to(tl.int64)
    m0, n0 = tile_origin(tile, M, D_C, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row = tl.minimum(offs_m, M - 1).to(tl.int64)  # rows past M repeat the last one: they are not stored
    g_tile_ptr = g_ptr + row[:, None] * C + offs_k[None, :]
    w4_tile_ptr = w4_ptr + offs_k[:, None] * D_PAD + offs_n[None, :]

    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, C, BLOCK_K):
        if EVEN_K:
            g = tl.load(g_tile_ptr)
            w4 = tl.load(w4_tile_ptr)
        else:
            g = tl.load(g_tile_ptr, mask=(offs_k < C - k0)[None, :], other=0.0)
            w4 = tl.load(w4_tile_ptr, mask=(offs_k < C - k0)[:, None] & (offs_n < D_PAD)[None, :], other=0.0)
        da = tl.dot(g, w4, da, input_precision=PRECISION)
        g_tile_ptr += BLOCK_K
        w4_tile_ptr += BLOCK_K * D_PAD

    if QUARTERS:
        parts = quarters(da, BLOCK_M, BLOCK_N)
    else:
        parts = (da,)
    SUB_N: tl.constexpr = BLOCK_N // 4 if QUARTERS else BLOCK_N
    for i in tl.static_range(BLOCK_N // SUB_N):
        part = parts[i]
        offs_n = n0 + i * SUB_N + tl.arange(0, SUB_N)
        mask = (offs_m < M)[:, None] & (offs_n < D_C)[None, :]
        z = tl.load(z_ptr + row[:, None] * stride_z + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if GLU:
            gate_ptr = z_ptr + stride_z // 2
            gate = tl.load(gate_ptr + row[:, None] * stride_z + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            a, slope, gate_slope = SLOPE(z, gate)
        else:
            a, slope = SLOPE(z)
        if DROPOUT:
            a = hidden_dropout(a, offs_m, offs_n, S, noise)
            part = hidden_dropout(part, offs_m, offs_n, S, noise)
        dz = tl.where(mask, part * slope, 0.0)
        offs = offs_m.to(tl.int64)[:, None] * D_C + offs_n[None, :]
        if GLU:
            dgate = tl.where(mask, part * gate_slope, 0.0)
            offs_dz = offs_m.to(tl.int64)[:, None] * (2 * D_C) + offs_n[None, :]
            tl.store(dz_ptr + offs_dz, dz.to(DTYPE), mask=mask)
            tl.store(dz_ptr + D_C + offs_dz, dgate.to(DTYPE), mask=mask)
        else:
            tl.store(dz_ptr + offs, dz.to(DTYPE), mask=mask)
        if a_ptr is not None:
            tl.store(a_ptr + offs, a.to(DTYPE), mask=mask)
        if GLU:
            sum_ptr = sums_ptr + (m0 // BLOCK_M) * 2 * D_C + offs_n
            tl.store(sum_ptr, tl.sum(dz, 0), mask=offs_n < D_C)
            tl.store(sum_ptr + D_C, tl.sum(dgate, 0), mask=offs_n < D_C)
        else:
            tl.store(sums_ptr + (m0 // BLOCK_M) * D_C + offs_n, tl.sum(dz, 0), mask=offs_n < D_C)


def channel_products_backward(
    g: Tensor, u: Tensor, z: Tensor | None, norm: Norm, half: Half, options: Options, want_a: bool
) -> tuple[Tensor, Tensor | None, Parts]:
    """``(dz [M, rows of w3], a [M, D_C] or None, db3 in float32)`` from ``g [B, S, C]``; ``z`` None: recompute it."""
    packing = Packing(options.dtype)
    first = fc1_weights(packing, half, u.dtype) if z is None else None
    w4 = product_weight(packing, "w4", half.w_out)
    packing.run()
    if first is not None:
        z = channel_hidden(u, norm, first, options)
    (rows, hidden), channels = (z.shape[0], z.shape[-1]), g.shape[2]
    target = target_of(g.device)
    descriptors = channel_backward_descriptors.fits(target, g, w4, hidden)
    config = gelu_backward_config(
        target, options.dtype, options.exact, channels, descriptors, noise=options.noise, glu=options.glu
    )
    row_tiles = cdiv(rows, config.block_m)
    columns = hidden * (1 + options.glu)
    dz = torch.empty(rows, columns, dtype=g.dtype, device=g.device)
    a = torch.empty(rows, hidden, dtype=g.dtype, device=g.device) if want_a else None
    sums = torch.empty(row_tiles, columns, dtype=torch.float32, device=g.device)
    if descriptors:
        channel_backward_descriptors.run_product(config, g, w4, z, dz, a, sums, target, options)
        return dz, a, Parts(sums)
    launch(
        _channel_gelu_bwd_kernel, row_tiles * cdiv(hidden, config.block_n),
        g, w4, z, dz, a, sums, rows, channels, hidden, w4.shape[1], g.shape[1], z.stride(0),
        **noise_arguments(options), **config.launch_options(), GROUP_M=config.group_m,
        EVEN_K=channels % config.block_k == 0 and w4.shape[1] % config.block_n == 0,
        SLOPE=activation_of(options).and_slope, GLU=options.glu, QUARTERS=config.block_n == 128,
        PRECISION=options.precision,
        INT64=needs_int64((row_tiles + 1,), (max(columns, config.block_m),))
        or needs_int64((channels,), (w4.shape[1],)),
    )  # fmt: skip
    return dz, a, Parts(sums)


def recomputed_hidden(u: Tensor, norm: Norm, half: Half, options: Options) -> Tensor:
    """z ``[B * S, D_C]``, where the backward pass goes on with other kernels than the Mixer's."""
    packing = Packing(options.dtype)
    first = fc1_weights(packing, half, u.dtype)
    packing.run()
    return channel_hidden(u, norm, first, options)
