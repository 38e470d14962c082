"""Token mixing over any number of tokens, as two products with the hidden activation between them in memory.

The path for more tokens than a tile holds (784 and 1024 at 448 pixels). Both products have a weight on the left and
an image on the right, so that channels stay contiguous and nothing is transposed; equations (2) to (5)::

    a[b] = GELU(W1 . LN(x[b]) + b1)      [D_S, C]    LayerNorm on the right operand as it is loaded
    u[b] = x[b] + W2 . a[b] + b2         [S, C]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import ProductConfig, token_product_config
from ...tuning.target import target_of
from ..arguments import Norm, Options
from ..new_tensors import new_like
from ..rounding import cdiv, round_up
from .activation import activation_of
from .launch import launch, needs_int64
from .noise import kept_branch, kept_hidden, kept_image, noise_arguments
from .prepack import TokenWeights
from .row_statistics import load_affine


@triton.jit
def _token_product_kernel(
    w_ptr,  # [M_pad, K_pad], zero-padded: W1 or W2; GLU's W1: [2 * M_pad, K_pad], values and gates
    bias_ptr,  # [M_pad] float32; GLU's b1: [2 * M_pad]
    x_ptr,  # [B, S, C], any strides: what FIRST normalises, else the residual
    mean_ptr,  # [B * S] float32, FIRST only
    rstd_ptr,  # [B * S] float32, FIRST only
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    a_ptr,  # [B, D_S, C] contiguous: the output of FIRST, the right operand of the second product; or z
    u_ptr,  # [B, S, C] contiguous: the output of the second product
    S,
    C,
    D_S,
    K_PAD,
    stride_b,
    stride_s,
    stride_c,
    noise,  # noise.noise_arguments
    FIRST: tl.constexpr,
    KEEP_Z: tl.constexpr,  # FIRST: store z in place of a, for the backward pass
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    GLU: tl.constexpr,
    M_PAD: tl.constexpr,  # GLU's FIRST: rows of W1 from a value to its gate
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    M = D_S if FIRST else S
    K = S if FIRST else D_S
    m_tiles = tl.cdiv(M, BLOCK_M)
    c_tiles = tl.cdiv(C, BLOCK_C)
    # Tiles along M next to each other: they share the columns of one image.
    m_tile = tl.program_id(0) % m_tiles
    c_tile = (tl.program_id(0) // m_tiles) % c_tiles
    image = (tl.program_id(0) // m_tiles // c_tiles).to(tl.int64)
    keep = 1.0
    if DROP_PATH:
        keep = kept_image(noise, image)
        K = tl.where(keep > 0, K, 0)  # a dropped image takes no turn of the loop
    offs_m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if FIRST:
        gamma, beta = load_affine(gamma_ptr, beta_ptr, offs_c, mask_c, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    w_tile_ptr = w_ptr + offs_m[:, None] * K_PAD + offs_k[None, :]
    if INT64:
        offs_m = offs_m.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    x_ptr += image * stride_b
    if GLU and KEEP_Z:
        a_ptr += image * 2 * D_S * C
    else:
        a_ptr += image * D_S * C

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if GLU and FIRST:
        gate = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        rows = k0 + offs_k
        mask_k = rows < K
        mask = mask_k[:, None] & mask_c[None, :]
        w = tl.load(w_tile_ptr + k0)
        if FIRST:
            x = tl.load(x_ptr + rows[:, None] * stride_s + offs_c[None, :] * stride_c, mask=mask, other=0.0)
            mean = tl.load(mean_ptr + image * S + rows, mask=mask_k, other=0.0)
            rstd = tl.load(rstd_ptr + image * S + rows, mask=mask_k, other=0.0)
            n = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
            right = tl.where(mask, n, 0.0).to(DTYPE)
        else:
            right = tl.load(a_ptr + rows[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        acc = tl.dot(w, right, acc, input_precision=PRECISION)
        if GLU and FIRST:
            gate = tl.dot(tl.load(w_tile_ptr + M_PAD * K_PAD + k0), right, gate, input_precision=PRECISION)

    mask = (offs_m < M)[:, None] & mask_c[None, :]
    acc += tl.load(bias_ptr + offs_m)[:, None]
    offs_out = offs_m[:, None] * C + offs_c[None, :]
    if FIRST:
        a = acc
        if GLU:
            gate += tl.load(bias_ptr + M_PAD + offs_m)[:, None]
            if KEEP_Z:
                tl.store(a_ptr + D_S * C + offs_out, gate.to(DTYPE), mask=mask)
        if not KEEP_Z:
            if GLU:
                a = ACT(acc, gate)
            else:
                a = ACT(acc)
            if DROPOUT:
                a *= kept_hidden(noise, offs_m[:, None], offs_c[None, :], image)
        tl.store(a_ptr + offs_out, a.to(DTYPE), mask=mask)
    else:
        x = tl.load(x_ptr + offs_m[:, None] * stride_s + offs_c[None, :] * stride_c, mask=mask, other=0.0)
        if DROPOUT:
            acc *= kept_branch(noise, offs_c[None, :], offs_m[:, None], image)
        u = x.to(tl.float32) + keep * acc
        tl.store(u_ptr + image * S * C + offs_out, u.to(u_ptr.dtype.element_ty), mask=mask)


def token_mixing_products(x: Tensor, norm: Norm, weights: TokenWeights, hidden: int, options: Options) -> Tensor:
    """``u [B, S, C]``, contiguous, from ``x``; any S, ``hidden`` units."""
    a = torch.empty(x.shape[0], hidden, x.shape[2], dtype=options.dtype, device=x.device)
    u = new_like(x)
    _run_product(x, norm, weights.w1, weights.b1, hidden, a, None, options)
    _run_product(x, norm, weights.w2, weights.b2, hidden, a, u, options)
    return u


def token_hidden(x: Tensor, norm: Norm, w1: Tensor, b1: Tensor, hidden: int, options: Options) -> Tensor:
    """z ``[B, hidden, C]``, with SwiGLU twice as much, recomputed for the backward pass from packed weights."""
    z = torch.empty(x.shape[0], hidden * (1 + options.glu), x.shape[2], dtype=options.dtype, device=x.device)
    _run_product(x, norm, w1, b1, hidden, z, None, options.without_noise(), keep_z=True)
    return z


def padded_sizes(tokens: int, hidden: int, device: torch.device, options: Options) -> tuple[int, int]:
    """Tokens and hidden units as the weights of both products have them."""
    configs = [_config(device, options, first) for first in (True, False)]
    multiple = max(extent for config in configs for extent in (config.block_m, config.block_k))
    return round_up(tokens, multiple), round_up(hidden, multiple)


def _config(device: torch.device, options: Options, first: bool) -> ProductConfig:
    return token_product_config(
        target_of(device), options.dtype, options.exact, noise=options.noise, glu=first and options.glu
    )


def _run_product(
    x: Tensor,
    norm: Norm,
    w: Tensor,
    bias: Tensor,
    hidden: int,
    a: Tensor,
    u: Tensor | None,
    options: Options,
    keep_z: bool = False,
) -> None:
    """The first product into ``a``, or the second from ``a`` into ``u``."""
    batch_size, tokens, channels = x.shape
    first = u is None
    config = _config(x.device, options, first)
    rows = hidden if first else tokens
    launch(
        _token_product_kernel, batch_size * cdiv(rows, config.block_m) * cdiv(channels, config.block_n),
        w, bias, x, *norm, a, u, tokens, channels, hidden, w.shape[1], *x.stride(),
        **noise_arguments(options), **config.launch_options("MCK"), STAGES=config.num_stages,
        FIRST=first, KEEP_Z=keep_z, ACT=activation_of(options).function, GLU=options.glu,
        M_PAD=w.shape[0] // 2 if options.glu and first else 0, PRECISION=options.precision,
        INT64=needs_int64(x.shape[1:], x.stride()[1:])
        or needs_int64((max(tokens, hidden * (1 + options.glu)), channels), (channels, 1)),
    )  # fmt: skip
