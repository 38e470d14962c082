"""Row statistics: mean and reciprocal standard deviation over the channels, equation (1) of docs/maths.md.

One read of ``x``; two passes over each chunk in registers, chunks merged by the formula of Chan, Golub and LeVeque
(1979), so that a mean far from zero costs no accuracy.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import statistics_config
from ..new_tensors import new_statistics
from ..rounding import cdiv
from .launch import launch, needs_int64


@triton.jit
def _row_statistics_kernel(
    x_ptr,  # [B, S, C], any strides
    mean_ptr,  # [B * S] float32
    rstd_ptr,  # [B * S] float32
    rows,  # B * S
    S,
    C,
    stride_b,
    stride_s,
    stride_c,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    INT64: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    if INT64:
        pid = pid.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    offs_r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rows
    x_row_ptr = x_ptr + (offs_r // S).to(tl.int64) * stride_b + (offs_r % S) * stride_s

    mean = tl.zeros((BLOCK_R,), tl.float32)
    m2 = tl.zeros((BLOCK_R,), tl.float32)
    seen = 0.0
    for c0 in range(0, C, BLOCK_C):
        mask = mask_r[:, None] & (c0 + offs_c < C)[None, :]
        x = tl.load(x_row_ptr[:, None] + (c0 + offs_c)[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(C - c0, BLOCK_C).to(tl.float32)
        chunk_mean = tl.sum(x, 1) / count
        d = tl.where(mask, x - chunk_mean[:, None], 0.0)
        # Once more: rstd multiplies the rounding error of the mean, by a thousand in a row without variance.
        chunk_mean += tl.sum(d, 1) / count
        d = tl.where(mask, x - chunk_mean[:, None], 0.0)
        chunk_m2 = tl.sum(d * d, 1)
        if ONE_CHUNK:
            mean = chunk_mean
            m2 = chunk_m2
        else:
            delta = chunk_mean - mean
            mean += delta * (count / (seen + count))
            m2 += chunk_m2 + delta * delta * (seen * count / (seen + count))
            seen += count
    tl.store(mean_ptr + offs_r, mean, mask=mask_r)
    tl.store(rstd_ptr + offs_r, 1.0 / tl.sqrt_rn(m2 / C + eps), mask=mask_r)


@triton.jit
def load_affine(gamma_ptr, beta_ptr, channel, mask, N: tl.constexpr):
    """LayerNorm's weight and bias at ``channel``; 1 and 0 where there is none."""
    gamma = tl.full((N,), 1.0, tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    beta = tl.zeros((N,), tl.float32)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return gamma, beta


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd ``[B * S]`` in float32 of ``x [B, S, C]``, read as it is strided."""
    batch_size, tokens, channels = x.shape
    rows = batch_size * tokens
    config = statistics_config(channels, channels_contiguous=x.stride(2) == 1)
    mean, rstd = new_statistics(x)
    launch(
        _row_statistics_kernel, cdiv(rows, config.block_rows),
        x, mean, rstd, rows, tokens, channels, *x.stride(), eps,
        BLOCK_R=config.block_rows, BLOCK_C=config.block_c, ONE_CHUNK=channels <= config.block_c,
        INT64=needs_int64(x.shape[1:], x.stride()[1:], config.block_c) or rows + config.block_rows >= 2**31,
        num_warps=config.num_warps,
    )  # fmt: skip
    return mean, rstd
