"""What both channel-product kernels share: the order of tiles, fc1's epilogue, and the operands of a product."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Norm, Options
from .noise import kept_branch, kept_hidden, kept_image
from .prepack import ProductWeights


@dataclass(frozen=True)
class ChannelProduct:
    """One product of channel mixing with its epilogue: fc1 or fc2.

    fc1: ``out = GELU(LN(left) . right' + bias)``; without ``mean``, LN is the affine map alone; with SwiGLU for GELU
    the first half of ``right``'s rows are values, the second half gates.
    fc2: ``out = u + left . right' + bias``.
    """

    left: Tensor  # fc1: u [B, S, C]; fc2: a [M, D_C]
    weights: ProductWeights
    out: Tensor | None  # [M, N], rows any stride; None where only z is wanted
    u: Tensor  # [B, S, C], any strides
    K: int
    options: Options
    is_fc1: bool = False
    z: Tensor | None = None  # fc1: [M, N] strided like out, or [M, 2, N], where to keep z for the backward pass
    norm: Norm = Norm()  # of fc1: its statistics

    @property
    def is_glu(self) -> bool:
        """Of fc1 with SwiGLU."""
        return self.is_fc1 and self.options.glu

    @property
    def shape(self) -> tuple[int, int]:
        """M and N of what the product writes."""
        return self.u.shape[0] * self.u.shape[1], self.weights.right.shape[0] // (1 + self.is_glu)

    @property
    def row_stride(self) -> int:
        """Of what the product writes: from a row to the next, and from values of z to their gates."""
        return self.z.stride(-2) if self.out is None else self.out.stride(0)


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
    acc, mean, rstd, bias_ptr, wg_ptr, wb_ptr, scale_ptr, offs_n, mask_n, FOLD: tl.constexpr,
):  # fmt: skip
    """z from the product: by equation (8) if LayerNorm or an affine map (no mean) is folded, else acc + b3."""
    if FOLD:
        if mean is not None:
            wg = tl.load(wg_ptr + offs_n, mask=mask_n, other=0.0)
        wb = tl.load(wb_ptr + offs_n, mask=mask_n, other=0.0)
        if mean is not None:
            z = rstd[:, None] * (acc - mean[:, None] * wg[None, :])
        else:
            z = acc
        if scale_ptr is not None:
            z *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        z += wb[None, :]
    else:
        z = acc
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def fc2_epilogue(
    acc, u, bias_ptr, offs_m, offs_n, mask_n, S, noise, DROPOUT: tl.constexpr, DROP_PATH: tl.constexpr,
):  # fmt: skip
    """u + the branch, acc + b4, with its dropout and stochastic depth: equation (7)."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        acc *= kept_branch(noise, offs_n[None, :], (offs_m % S)[:, None], (offs_m // S)[:, None])
    if DROP_PATH:
        acc *= kept_image(noise, offs_m // S)[:, None]
    return u.to(tl.float32) + acc


@triton.jit
def hidden_dropout(a, offs_m, offs_n, S, noise):
    """Dropout after the activation."""
    return a * kept_hidden(noise, offs_n[None, :], (offs_m % S)[:, None], (offs_m // S)[:, None])
