"""One linear layer along the tokens, of any number, with what the relatives of MLP-Mixer put around it.

Equations (25) of ResMLP and (27) of gMLP in docs/maths.md. The weight is on the left and an image on the right, as in
``token_products``::

    v = W . n + b                         n = LN(x), or alpha * x + beta, or x, as it is loaded
    out = residual + scale * v            ResMLP; scale over channels
    out = factor * v                      gMLP

The gradient of ResMLP's x is the same kernel with W', equation (26); sums of v * x and of v over a tile's tokens, which
the gradients of its vectors are made of, come along. gMLP's gradient of the factor is the same kernel with the gradient
of its output for the factor, equation (28); what else needs v or the factor is written beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import ProductConfig, token_linear_config
from ...tuning.target import target_of
from ..arguments import AffineLinear, Norm, Options, SpatialGate
from ..new_tensors import new_like
from ..rounding import cdiv
from .launch import launch, needs_int64
from .noise import kept_image, noise_arguments
from .pack import Packing
from .prepack import product_weight, transposed_weight
from .token_mixing import is_vectorised


@triton.jit
def _token_linear_kernel(
    w_ptr,  # [S, S_PAD] or more rows, zero-padded along both
    bias_ptr,  # [S] or None
    right_ptr,  # [B, S, C], strides as below: what the product takes
    mean_ptr,  # [B * S] float32, or None
    rstd_ptr,  # [B * S] float32, or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    outer_ptr,  # [B, S, C]: the residual, or GATE's factor
    scale_ptr,  # [C] or None
    x_ptr,  # [B, S, C] or None: what v is multiplied by in the sums; GATE: the other factor of the two below
    out_ptr,  # [B, S, C], channels contiguous
    outer_x_ptr,  # GATE, where x is: [B, S, C] contiguous, outer * x
    v_x_ptr,  # GATE, where x is: [B, S, C] contiguous, v * x
    sums_ptr,  # [tiles of S, 2, B, C] float32: sums of v * x and of v, or None
    S,
    C,
    S_PAD,
    stride_b,  # of right
    stride_s,
    stride_c,
    outer_stride_b,
    outer_stride_s,
    outer_stride_c,
    x_stride_b,
    x_stride_s,
    x_stride_c,
    out_stride_b,
    out_stride_s,
    noise,  # noise.noise_arguments
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    m_tiles = tl.cdiv(S, BLOCK_M)
    c_tiles = tl.cdiv(C, BLOCK_C)
    # Tiles along M next to each other: they share the columns of one image.
    m_tile = tl.program_id(0) % m_tiles
    c_tile = (tl.program_id(0) // m_tiles) % c_tiles
    image = (tl.program_id(0) // m_tiles // c_tiles).to(tl.int64)
    keep = 1.0
    depth = S
    if DROP_PATH:
        keep = kept_image(noise, image)
        depth = tl.where(keep > 0, S, 0)  # a dropped image takes no turn of the loop
    offs_m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    # Rows past S are clamped rather than masked: they are not stored.
    w_tile_ptr = w_ptr + tl.minimum(offs_m, S - 1)[:, None] * S_PAD + offs_k[None, :]
    column = offs_c
    if INT64:
        offs_m = offs_m.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    right_ptr += image * stride_b

    v = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k0 in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        rows = k0 + offs_k
        mask_k = rows < S
        mask = mask_k[:, None] & mask_c[None, :]
        w = tl.load(w_tile_ptr + k0)
        right = tl.load(right_ptr + rows[:, None] * stride_s + offs_c[None, :] * stride_c, mask=mask, other=0.0)
        if (mean_ptr is not None or gamma_ptr is not None) or beta_ptr is not None:  # Triton 3.3 takes no longer chain
            n = right.to(tl.float32)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + image * S + rows, mask=mask_k, other=0.0)
                rstd = tl.load(rstd_ptr + image * S + rows, mask=mask_k, other=0.0)
                n = (n - mean[:, None]) * rstd[:, None]
            if gamma_ptr is not None:
                n *= gamma[None, :]
            if beta_ptr is not None:
                n += beta[None, :]
            right = tl.where(mask, n, 0.0)
        v = tl.dot(w, right.to(DTYPE), v, input_precision=PRECISION)

    mask_m = offs_m < S
    mask = mask_m[:, None] & mask_c[None, :]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    if x_ptr is not None:
        offs_x = offs_m[:, None] * x_stride_s + offs_c[None, :] * x_stride_c
        x = tl.load(x_ptr + image * x_stride_b + offs_x, mask=mask, other=0.0).to(tl.float32)
    offs_outer = offs_m[:, None] * outer_stride_s + offs_c[None, :] * outer_stride_c
    outer = tl.load(outer_ptr + image * outer_stride_b + offs_outer, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        out = outer * v
        if x_ptr is not None:
            offs = image * S * C + offs_m[:, None] * C + offs_c[None, :]
            tl.store(outer_x_ptr + offs, (outer * x).to(outer_x_ptr.dtype.element_ty), mask=mask)
            tl.store(v_x_ptr + offs, (v * x).to(v_x_ptr.dtype.element_ty), mask=mask)
    else:
        v *= keep
        if sums_ptr is not None:
            images = tl.num_programs(0) // m_tiles // c_tiles
            v_in = tl.where(mask, v, 0.0)
            sums_ptr += (m_tile.to(tl.int64) * 2 * images + image) * C + column
            tl.store(sums_ptr, tl.sum(v_in * x, 0), mask=mask_c)
            tl.store(sums_ptr + tl.cast(images, tl.int64) * C, tl.sum(v_in, 0), mask=mask_c)
        if scale_ptr is not None:
            v *= tl.load(scale_ptr + column, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        out = outer + v
    offs_out = offs_m[:, None] * out_stride_s + offs_c[None, :]
    tl.store(out_ptr + image * out_stride_b + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


class _Product(NamedTuple):
    """The operands of the kernel and where its results go, named as there."""

    w: Tensor  # packed
    right: Tensor
    outer: Tensor
    out: Tensor
    norm: Norm = Norm()
    bias: Tensor | None = None
    scale: Tensor | None = None
    x: Tensor | None = None
    outer_x: Tensor | None = None
    v_x: Tensor | None = None
    sums: Tensor | None = None
    is_gate: bool = False


def token_linear(x: Tensor, linear: AffineLinear, options: Options) -> Tensor:
    """``x + scale * (w . (alpha * x + beta) + b)``, contiguous, from ``x [B, S, C]`` and a packed ``w``."""
    u = new_like(x)
    norm = Norm(gamma=linear.alpha, beta=linear.beta)
    _run(_Product(linear.w, x, x, u, norm, linear.b, linear.scale), options)
    return u


def token_linear_data_gradient(
    du: Tensor, x: Tensor, w: Tensor, factor: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = du + factor * v`` for ``v = w' . du``, and over images and tokens the sums ``[C]`` of v * x and of v."""
    batch_size, tokens, channels = x.shape
    dx = new_like(x)
    tiles = cdiv(tokens, _config(options, du, x, dx).block_m)
    sums = torch.empty(tiles, 2, batch_size, channels, dtype=torch.float32, device=x.device)
    packing = Packing(options.dtype)
    w = transposed_weight(packing, "w", w)
    packing.run()
    _run(_Product(w, du, du, dx, scale=factor, x=x, sums=sums), options)
    of_vx, of_v = sums.sum((0, 2))
    return dx, of_vx, of_v


def spatial_gate(h: Tensor, norm: Norm, gate: SpatialGate, out: Tensor, options: Options) -> None:
    """Write ``out = h1 * (w . LN(h2) + b)`` from ``h [B, S, 2 * C]``, halves h1 and h2, and a packed ``w``."""
    h1, h2 = h.chunk(2, 2)
    _run(_Product(gate.w, h2, h1, out, norm, gate.b, is_gate=True), options.without_noise())


def spatial_gate_backward(
    ds: Tensor, h: Tensor, norm: Norm, gate: SpatialGate, dh1: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Write the gradient of h1; return the gradient of ``v = w . LN(h2) + b``, and ``h1 * v``, both contiguous."""
    h1, h2 = h.chunk(2, 2)
    dv, s = (new_like(ds) for _ in range(2))
    packing = Packing(options.dtype)
    w = product_weight(packing, "w_gate", gate.w)
    packing.run()
    _run(_Product(w, h2, ds, dh1, norm, gate.b, x=h1, outer_x=dv, v_x=s, is_gate=True), options)
    return dv, s


def _config(options: Options, *tensors: Tensor) -> ProductConfig:
    vectorised = all(is_vectorised(t) for t in tensors)
    return token_linear_config(target_of(tensors[0].device), options.dtype, options.exact, vectorised)


def _run(product: _Product, options: Options) -> None:
    w, right, outer, out, norm, bias, scale, x, outer_x, v_x, sums, is_gate = product
    batch_size, tokens, channels = right.shape
    tensors = [t for t in (right, outer, x, out) if t is not None]
    config = _config(options, *tensors)
    launch(
        _token_linear_kernel, batch_size * cdiv(tokens, config.block_m) * cdiv(channels, config.block_n),
        w, bias, right, *norm, outer, scale, x, out, outer_x, v_x, sums, tokens, channels, w.shape[1],
        *right.stride(), *outer.stride(), *(outer if x is None else x).stride(), *out.stride()[:2],
        **noise_arguments(options), **config.launch_options("MCK"), STAGES=config.num_stages,
        GATE=is_gate, PRECISION=options.precision,
        INT64=any(needs_int64(t.shape[1:], t.stride()[1:]) for t in tensors)
        or needs_int64((tokens, channels), (channels, 1)),
    )  # fmt: skip
