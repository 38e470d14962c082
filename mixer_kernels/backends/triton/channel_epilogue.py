"""What both channel-product kernels share: the order of tiles, fc1's epilogue, and the operands of a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gelu


@dataclass(frozen=True)
class ChannelProduct:
    """One product of channel mixing with its epilogue: fc1 if ``mean`` is given, else fc2.

    fc1: ``out = GELU(LN(left) . right' + bias)``; folded if ``wg`` is given. fc2: ``out = u + left . right' + bias``.
    """

    left: Tensor  # fc1: u [B, S, C]; fc2: a [M, D_C]
    right: Tensor  # [N, K_pad], zero-padded along K
    out: Tensor  # [M, N], rows any stride
    u: Tensor  # [B, S, C], any strides
    K: int
    bias: Tensor | None  # [N]: b3 (applied) or b4
    approximate: str
    precision: str
    mean: Tensor | None = None  # [M] float32
    rstd: Tensor | None = None  # [M] float32
    gamma: Tensor | None = None  # [C], applied
    beta: Tensor | None = None  # [C], applied
    wg: Tensor | None = None  # [N] float32, folded
    wb: Tensor | None = None  # [N] float32, folded
    scale: Tensor | None = None  # [N] float32, folded, or None for 1

    @property
    def is_fc1(self) -> bool:
        return self.mean is not None

    @property
    def is_folded(self) -> bool:
        return self.wg is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.right.dtype


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of ``tile``: GROUP_M row tiles sweep all columns before the next ones, so that both
    operands are found in L2."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * n_tiles)
    first = group * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    within = tile - group * (GROUP_M * n_tiles)
    return (first + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def fc1_epilogue(
    acc, mean, rstd, bias_ptr, wg_ptr, wb_ptr, scale_ptr, offs_n, mask_n,
    FOLD: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """GELU(z) from the product: z by equation (8) if LayerNorm is folded, else acc + b3."""
    if FOLD:
        wg = tl.load(wg_ptr + offs_n, mask=mask_n, other=0.0)
        wb = tl.load(wb_ptr + offs_n, mask=mask_n, other=0.0)
        z = rstd[:, None] * (acc - mean[:, None] * wg[None, :])
        if scale_ptr is not None:
            z *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        z += wb[None, :]
    else:
        z = acc
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return gelu(z, TANH, EXACT)
