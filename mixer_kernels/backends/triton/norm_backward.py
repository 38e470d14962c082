"""LayerNorm backward with the residual, both halves' last step: equations (17) to (19) of docs/maths.md.

One pass: reads ``x``, ``dn``, ``dy``, writes ``dx``, and ``n`` where a weight gradient needs it. Each program takes
every so many rows and keeps its sums for dgamma, dbeta and the column sums of ``dy`` in registers: ``partial_sums``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import norm_backward_config
from ...tuning.target import target_of
from ..arguments import Norm, NormGradients, Parts
from ..new_tensors import new_like
from ..rounding import cdiv
from .launch import launch


@triton.jit
def _norm_bwd_kernel(
    x_ptr,  # [B, S, C], any strides
    dn_ptr,  # [B * S, C] contiguous: the gradient of n
    dy_ptr,  # [B * S, C] contiguous: the gradient of the residual, or None
    mean_ptr,  # [B * S] float32, or None for an affine map without statistics
    rstd_ptr,  # [B * S] float32, or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    dx_ptr,  # [B * S, C], row stride stride_dx
    n_ptr,  # [B * S, C] contiguous, or None
    sums_ptr,  # [programs, 3, C] float32: dgamma, dbeta, column sums of dy
    rows,
    S,
    C,
    stride_b,
    stride_s,
    stride_c,
    stride_dx,  # or None for C
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    gamma = tl.full((BLOCK_C,), 1.0, tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dgamma = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbeta = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dy_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), PROGRAMS):
        offs_r = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rows
        mask = mask_r[:, None] & mask_c[None, :]
        offs = offs_r[:, None] * C + offs_c[None, :]
        offs_x = (offs_r // S)[:, None] * stride_b + (offs_r % S)[:, None] * stride_s + offs_c[None, :] * stride_c
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)
            rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        else:
            xhat = x
        if n_ptr is not None:
            n = xhat * gamma[None, :]
            if beta_ptr is not None:
                n += tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
            tl.store(n_ptr + offs, n.to(n_ptr.dtype.element_ty), mask=mask)
        dn = tl.load(dn_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dgamma += dn * xhat
        dbeta += dn
        if dy_ptr is not None:
            dy_sum += dy
        dxhat = dn * gamma[None, :]
        if mean_ptr is not None:
            mean_dxhat = tl.sum(dxhat, 1) / C
            mean_dxhat_xhat = tl.sum(dxhat * xhat, 1) / C
            dx = rstd[:, None] * (dxhat - mean_dxhat[:, None] - xhat * mean_dxhat_xhat[:, None])
        else:
            dx = dxhat
        if dy_ptr is not None:
            dx += dy
        if stride_dx is None:
            offs_dx = offs
        else:
            offs_dx = offs_r[:, None] * stride_dx + offs_c[None, :]
        tl.store(dx_ptr + offs_dx, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * C + offs_c
    tl.store(sums_ptr, tl.sum(dgamma, 0), mask=mask_c)
    tl.store(sums_ptr + C, tl.sum(dbeta, 0), mask=mask_c)
    tl.store(sums_ptr + 2 * C, tl.sum(dy_sum, 0), mask=mask_c)


def norm_backward(
    x: Tensor,
    dn: Tensor,
    dy: Tensor | None,
    norm: Norm,
    n_dtype: torch.dtype | None = None,
    dx: Tensor | None = None,
) -> NormGradients:
    """``dx = dy + LayerNorm'(dn)``, the parameters' gradients, and n in ``n_dtype`` if one is given.

    ``dx``, if given, is where it goes: in ``x``'s shape, contiguous but for its rows' stride.
    """
    batch_size, tokens, channels = x.shape
    rows = batch_size * tokens
    config = norm_backward_config(channels, affine=norm.mean is None)
    programs = min(2 * target_of(x.device).multiprocessors, cdiv(rows, config.block_rows))
    stride_dx = None if dx is None else dx.stride(1)
    dx = new_like(x) if dx is None else dx
    n = None if n_dtype is None else torch.empty(x.shape, dtype=n_dtype, device=x.device)
    sums = torch.empty(programs, 3, channels, dtype=torch.float32, device=x.device)
    launch(
        _norm_bwd_kernel, programs,
        x, dn, dy, *norm, dx, n, sums, rows, tokens, channels, *x.stride(), stride_dx,
        BLOCK_R=config.block_rows, BLOCK_C=config.block_c, PROGRAMS=programs, num_warps=config.num_warps,
    )  # fmt: skip
    return NormGradients(dx, n, *(Parts(sums[:, i]) for i in range(3)))
