"""Token mixing in one kernel, for up to 256 tokens: equations (2) to (5) of docs/maths.md.

A program owns ``BLOCK_C`` channels of one image and takes them through the whole half: FlashAttention with the rows of
W1 as keys, the columns of W2 as values and GELU in place of softmax. Channels lie on the rows of both products, so
``x [S, C]`` is never transposed in memory and the hidden activation never leaves the chip::

    n = LN(x[:, channels])'                       [BLOCK_C, S]
    for each BLOCK_D rows of W1 and columns of W2:
        a = GELU(n . W1[rows]' + b1[rows])        [BLOCK_C, BLOCK_D]
        o += a . W2[:, columns]'                  [BLOCK_C, S]
    u[:, channels] = x[:, channels] + o' + b2

The token axis is cut into up to four powers of two (``token_segments``), each with its own n and o.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import TokenConfig, token_config, token_segments
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
def _channels_of_program(gamma_ptr, beta_ptr, C, BLOCK_C: tl.constexpr, INT64: tl.constexpr):
    """The program's image and channels, with their gamma and beta: 1 and 0 where LayerNorm has none."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    image = (tl.program_id(0) // c_tiles).to(tl.int64)
    offs_c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    gamma, beta = load_affine(gamma_ptr, beta_ptr, offs_c, offs_c < C, BLOCK_C)
    if INT64:
        offs_c = offs_c.to(tl.int64)
    return image, offs_c, gamma, beta


@triton.jit
def _normalised(
    x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c,
    S0: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """LN(x)' of tokens S0 to S0 + N, [BLOCK_C, N], zero outside the image."""
    offs_s = S0 + tl.arange(0, N)
    if INT64:
        offs_s = offs_s.to(tl.int64)
    mask_s = offs_s < S
    mask = mask_s[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs_s[:, None] * stride_s + offs_c[None, :] * stride_c, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + offs_s, mask=mask_s, other=0.0)
    rstd = tl.load(rstd_ptr + offs_s, mask=mask_s, other=0.0)
    n = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    return tl.trans(tl.where(mask, n, 0.0).to(DTYPE))


@triton.jit
def _hidden(z, n, w1_ptr, offs_d, S0: tl.constexpr, N: tl.constexpr, S_PAD: tl.constexpr, PRECISION: tl.constexpr):
    """z + n . W1[offs_d, S0:S0+N]'"""
    w1 = tl.load(w1_ptr + offs_d[:, None] * S_PAD + (S0 + tl.arange(0, N))[None, :])  # [BLOCK_D, N]
    return tl.dot(n, tl.trans(w1), z, input_precision=PRECISION)


@triton.jit
def _mixed(o, a, w2_ptr, offs_d, D, S0: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """o + a . W2[S0:S0+N, offs_d]'"""
    w2 = tl.load(w2_ptr + (S0 + tl.arange(0, N))[:, None] * D + offs_d[None, :])  # [N, BLOCK_D]
    return tl.dot(a, tl.trans(w2), o, input_precision=PRECISION)


@triton.jit
def _store_residual(
    o, x_ptr, b2_ptr, u_ptr, S, C, stride_s, stride_c, offs_c, late, image, keep, noise,
    S0: tl.constexpr, N: tl.constexpr, DROPOUT: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """u = x + o' + b2 for tokens S0 to S0 + N; x is read again rather than kept, for its registers."""
    offs_s = S0 + late + tl.arange(0, N)
    if INT64:
        offs_s = offs_s.to(tl.int64)
    mask = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs_s[:, None] * stride_s + offs_c[None, :] * stride_c, mask=mask, other=0.0)
    branch = tl.trans(o) + tl.load(b2_ptr + offs_s)[:, None]
    if DROPOUT:
        branch *= kept_branch(noise, offs_c[None, :], offs_s[:, None], image)
    u = x.to(tl.float32) + keep * branch
    tl.store(u_ptr + offs_s[:, None] * C + offs_c[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _token_mixing_fwd_kernel(
    x_ptr,  # [B, S, C], any strides
    mean_ptr,  # [B * S] float32
    rstd_ptr,  # [B * S] float32
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    w1_ptr,  # [D, S_PAD], zero-padded; GLU: [2 * D, S_PAD], values and gates
    b1_ptr,  # [D] float32, zero-padded; GLU: [2 * D]
    w2_ptr,  # [S_PAD, D], zero-padded
    b2_ptr,  # [S_PAD] float32, zero-padded
    u_ptr,  # [B, S, C] contiguous
    S,
    C,
    D,  # D_S padded to a multiple of BLOCK_D
    steps,  # D / BLOCK_D
    stride_b,
    stride_s,
    stride_c,
    noise,  # noise.noise_arguments
    N0: tl.constexpr,  # the token segments; all but the first may be 0
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    GLU: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    S1: tl.constexpr = N0
    S2: tl.constexpr = N0 + N1
    S3: tl.constexpr = N0 + N1 + N2
    S_PAD: tl.constexpr = N0 + N1 + N2 + N3
    image, offs_c, gamma, beta = _channels_of_program(gamma_ptr, beta_ptr, C, BLOCK_C, INT64)
    keep = 1.0
    depth = D
    if DROP_PATH:
        keep = kept_image(noise, image)
        depth = tl.where(keep > 0, D, 0)  # a dropped image takes no turn of the loop
        steps = tl.where(keep > 0, steps, 0)
    x_ptr += image * stride_b
    u_ptr += image * S * C
    mean_ptr += image * S
    rstd_ptr += image * S

    n0 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, 0, N0, DTYPE, INT64)
    o0 = tl.zeros((BLOCK_C, N0), tl.float32)
    if N1 > 0:
        n1 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, S1, N1, DTYPE, INT64)
        o1 = tl.zeros((BLOCK_C, N1), tl.float32)
    if N2 > 0:
        n2 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, S2, N2, DTYPE, INT64)
        o2 = tl.zeros((BLOCK_C, N2), tl.float32)
    if N3 > 0:
        n3 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, S3, N3, DTYPE, INT64)
        o3 = tl.zeros((BLOCK_C, N3), tl.float32)

    turns = 0
    for d0 in tl.range(0, depth, BLOCK_D, num_stages=STAGES):
        turns += 1
        offs_d = d0 + tl.arange(0, BLOCK_D)
        z = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        z = _hidden(z, n0, w1_ptr, offs_d, 0, N0, S_PAD, PRECISION)
        if N1 > 0:
            z = _hidden(z, n1, w1_ptr, offs_d, S1, N1, S_PAD, PRECISION)
        if N2 > 0:
            z = _hidden(z, n2, w1_ptr, offs_d, S2, N2, S_PAD, PRECISION)
        if N3 > 0:
            z = _hidden(z, n3, w1_ptr, offs_d, S3, N3, S_PAD, PRECISION)
        if GLU:
            gate = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
            gate = _hidden(gate, n0, w1_ptr, D + offs_d, 0, N0, S_PAD, PRECISION)
            if N1 > 0:
                gate = _hidden(gate, n1, w1_ptr, D + offs_d, S1, N1, S_PAD, PRECISION)
            if N2 > 0:
                gate = _hidden(gate, n2, w1_ptr, D + offs_d, S2, N2, S_PAD, PRECISION)
            if N3 > 0:
                gate = _hidden(gate, n3, w1_ptr, D + offs_d, S3, N3, S_PAD, PRECISION)
            a = ACT(z + tl.load(b1_ptr + offs_d)[None, :], gate + tl.load(b1_ptr + D + offs_d)[None, :])
        else:
            a = ACT(z + tl.load(b1_ptr + offs_d)[None, :])
        if DROPOUT:
            a *= kept_hidden(noise, offs_d[None, :], offs_c[:, None], image)
        a = a.to(DTYPE)
        o0 = _mixed(o0, a, w2_ptr, offs_d, D, 0, N0, PRECISION)
        if N1 > 0:
            o1 = _mixed(o1, a, w2_ptr, offs_d, D, S1, N1, PRECISION)
        if N2 > 0:
            o2 = _mixed(o2, a, w2_ptr, offs_d, D, S2, N2, PRECISION)
        if N3 > 0:
            o3 = _mixed(o3, a, w2_ptr, offs_d, D, S3, N3, PRECISION)

    # late is 0, which the compiler cannot know: it may not keep the first reading's addresses through the loop.
    late = tl.multiple_of(turns - steps, 16)
    _store_residual(
        o0, x_ptr, b2_ptr, u_ptr, S, C, stride_s, stride_c, offs_c, late, image, keep, noise,
        0, N0, DROPOUT, INT64,
    )  # fmt: skip
    if N1 > 0:
        _store_residual(
            o1, x_ptr, b2_ptr, u_ptr, S, C, stride_s, stride_c, offs_c, late, image, keep, noise,
            S1, N1, DROPOUT, INT64,
        )  # fmt: skip
    if N2 > 0:
        _store_residual(
            o2, x_ptr, b2_ptr, u_ptr, S, C, stride_s, stride_c, offs_c, late, image, keep, noise,
            S2, N2, DROPOUT, INT64,
        )  # fmt: skip
    if N3 > 0:
        _store_residual(
            o3, x_ptr, b2_ptr, u_ptr, S, C, stride_s, stride_c, offs_c, late, image, keep, noise,
            S3, N3, DROPOUT, INT64,
        )  # fmt: skip


class TokenTile(NamedTuple):
    """How the token axis of one ``x`` is cut, and the tile that takes it."""

    segments: tuple[int, int, int, int]
    config: TokenConfig

    def padded(self, hidden: int) -> tuple[int, int]:
        """Tokens and hidden units as the weights have them."""
        return sum(self.segments), round_up(hidden, self.config.block_d)


def token_tile(x: Tensor, options: Options) -> TokenTile:
    """The tile of ``token_mixing_fused`` on ``x``."""
    vectorised = is_vectorised(x)
    segments = token_segments(x.shape[1], longest=128 if vectorised and x.dtype is options.dtype else 64)
    config = token_config(
        target_of(x.device), options.dtype, x.dtype, segments,
        exact=options.exact, vectorised=vectorised, noise=options.noise, glu=options.glu,
    )  # fmt: skip
    return TokenTile(segments, config)


def token_mixing_fused(x: Tensor, norm: Norm, weights: TokenWeights, tile: TokenTile, options: Options) -> Tensor:
    """``u [B, S, C]``, contiguous, from ``x``; S at most ``MAX_FUSED_TOKENS``."""
    batch_size, tokens, channels = x.shape
    (n0, n1, n2, n3), config = tile
    hidden = weights.w2.shape[1]
    u = new_like(x)
    launch(
        _token_mixing_fwd_kernel, batch_size * cdiv(channels, config.block_c),
        x, *norm, *weights, u, tokens, channels, hidden, hidden // config.block_d, *x.stride(),
        **noise_arguments(options), **config.launch_options(), N0=n0, N1=n1, N2=n2, N3=n3,
        ACT=activation_of(options).function, GLU=options.glu, PRECISION=options.precision if config.tf32 else "ieee",
        INT64=needs_int64(x.shape[1:], x.stride()[1:]) or needs_int64(x.shape[1:], (channels, 1)),
    )  # fmt: skip
    return u


def is_vectorised(x: Tensor) -> bool:
    """Whether rows of ``x``, and of a contiguous result, are runs of whole 16-byte vectors."""
    rows = (x.stride(0), x.stride(1), x.shape[2])
    return x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(row * x.element_size() % 16 == 0 for row in rows)
