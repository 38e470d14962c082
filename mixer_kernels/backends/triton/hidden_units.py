"""GELU on hidden units in memory, and its backward: where another operator than a product stands beside it.

gMLP keeps z ``[M, F]`` of its first product; its spatial gate takes a = GELU(z) and gives back da, equation (29).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Options, Parts
from ..new_tensors import new_like
from ..rounding import cdiv
from .activation import activation_of
from .channel_epilogue import hidden_dropout
from .launch import launch
from .noise import noise_arguments


@triton.jit
def _hidden_gelu_kernel(
    z_ptr,  # [M, F], row stride stride_z
    da_ptr,  # [M, F] contiguous, or None
    out_ptr,  # [M, F] contiguous: a, or dz if there is da
    sums_ptr,  # [row tiles, F] float32: column sums of dz, or None
    M,
    F,
    S,  # rows to an image
    stride_z,
    noise,  # noise.noise_arguments
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n_tiles = tl.cdiv(F, BLOCK_N)
    m_tile = (tl.program_id(0) // n_tiles).to(tl.int64)
    offs_m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < F
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * F + offs_n[None, :]
    z = tl.load(z_ptr + offs_m[:, None] * stride_z + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if da_ptr is None:
        out = ACT(z)
    else:
        _, slope = SLOPE(z)
        out = slope * tl.load(da_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        out = hidden_dropout(out, offs_m, offs_n, S, noise)
    if sums_ptr is not None:
        tl.store(sums_ptr + m_tile * F + offs_n, tl.sum(out, 0), mask=mask_n)
    tl.store(out_ptr + offs, out.to(DTYPE), mask=mask)


def hidden_gelu(z: Tensor, tokens: int, options: Options) -> Tensor:
    """``a [M, F]`` with dropout, contiguous, from z, of whose rows ``tokens`` are an image's."""
    a = new_like(z)
    _run(z, None, a, None, tokens, options)
    return a


def hidden_gelu_backward(da: Tensor, z: Tensor, tokens: int, options: Options) -> tuple[Tensor, Parts]:
    """``dz [M, F]``, contiguous, and its column sums ``[F]`` in float32."""
    dz = new_like(z)
    sums = torch.empty(cdiv(z.shape[0], _BLOCK), z.shape[1], dtype=torch.float32, device=z.device)
    _run(z, da, dz, sums, tokens, options)
    return dz, Parts(sums)


_BLOCK = 64


def _run(z: Tensor, da: Tensor | None, out: Tensor, sums: Tensor | None, tokens: int, options: Options) -> None:
    (rows, hidden), activation = z.shape, activation_of(options)
    launch(
        _hidden_gelu_kernel, cdiv(rows, _BLOCK) * cdiv(hidden, _BLOCK),
        z, da, out, sums, rows, hidden, tokens, z.stride(0),
        **noise_arguments(options), ACT=activation.function, SLOPE=activation.and_slope,
        BLOCK_M=_BLOCK, BLOCK_N=_BLOCK, num_warps=16,
    )  # fmt: skip
