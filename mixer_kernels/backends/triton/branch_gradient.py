"""The gradient of a branch from the gradient of the half's output, equation (12) of docs/maths.md.

A half is x + branch: without dropout and stochastic depth both gradients are one tensor, and nothing runs here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Options
from ..rounding import cdiv
from .launch import launch
from .noise import kept_branch, kept_image, noise_arguments


@triton.jit
def _branch_gradient_kernel(
    dy_ptr,  # [B * S, C] contiguous
    g_ptr,  # [B * S, C] contiguous
    rows,
    S,
    C,
    noise,  # noise.noise_arguments
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c_tiles = tl.cdiv(C, BLOCK_C)
    offs_r = (tl.program_id(0) // c_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, s = offs_r // S, offs_r % S
    mask = (offs_r < rows)[:, None] & (offs_c < C)[None, :]
    offs = offs_r[:, None] * C + offs_c[None, :]
    g = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        g *= kept_branch(noise, offs_c[None, :], s[:, None], image[:, None])
    if DROP_PATH:
        g *= kept_image(noise, image)[:, None]
    tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask=mask)


def branch_gradient(dy: Tensor, options: Options) -> Tensor:
    """The gradient of the branch ``[B, S, C]``."""
    if not options.noise:
        return dy.to(options.dtype)
    batch_size, tokens, channels = dy.shape
    rows = batch_size * tokens
    g = torch.empty(dy.shape, dtype=options.dtype, device=dy.device)
    launch(
        _branch_gradient_kernel, cdiv(rows, 16) * cdiv(channels, 128),
        dy, g, rows, tokens, channels, **noise_arguments(options), BLOCK_R=16, BLOCK_C=128, num_warps=4,
    )  # fmt: skip
    return g
