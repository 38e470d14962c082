"""Token mixing backward for up to 256 tokens: the gradient of n, and what the weight gradients need.

The forward kernel's shape: a program owns ``BLOCK_C`` channels of one image. z is recomputed from ``x``, which is
cheaper than loading it; da, dz and dn follow in one loop over the hidden axis, equations (14) to (16)::

    z  = n . W1' + b1                     a  = GELU(z)
    da = g . W2                           dz = da * GELU'(z)
    dn += dz . W1

g is the gradient of the branch. a and dz leave for the weight gradients as ``[B, D_S, C]``, channels contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import token_backward_config, token_segments
from ...tuning.target import target_of
from ..arguments import Half, Norm, Options
from ..rounding import cdiv, round_up
from .activation import activation_of
from .launch import launch, needs_int64
from .noise import kept_hidden, kept_image, noise_arguments
from .pack import Packing
from .prepack import token_weights
from .token_mixing import _channels_of_program, _hidden, _normalised, is_vectorised


@triton.jit
def _gradient(g_ptr, S, C, offs_c, S0: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """g' of tokens S0 to S0 + N, [BLOCK_C, N], zero outside the image."""
    offs_s = S0 + tl.arange(0, N)
    mask = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    return tl.trans(tl.load(g_ptr + offs_s[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(DTYPE))


@triton.jit
def _backward(da, g, w2_ptr, offs_d, D, S0: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """da + g . W2[S0:S0+N, offs_d]"""
    w2 = tl.load(w2_ptr + (S0 + tl.arange(0, N))[:, None] * D + offs_d[None, :])  # [N, BLOCK_D]
    return tl.dot(g, w2, da, input_precision=PRECISION)


@triton.jit
def _input(dn, dz, w1_ptr, offs_d, S0: tl.constexpr, N: tl.constexpr, S_PAD: tl.constexpr, PRECISION: tl.constexpr):
    """dn + dz . W1[offs_d, S0:S0+N]"""
    w1 = tl.load(w1_ptr + offs_d[:, None] * S_PAD + (S0 + tl.arange(0, N))[None, :])  # [BLOCK_D, N]
    return tl.dot(dz, w1, dn, input_precision=PRECISION)


@triton.jit
def _store(dn, dn_ptr, S, C, offs_c, late, S0: tl.constexpr, N: tl.constexpr):
    offs_s = S0 + late + tl.arange(0, N)
    mask = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    tl.store(dn_ptr + offs_s[:, None] * C + offs_c[None, :], tl.trans(dn).to(dn_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _token_mixing_bwd_kernel(
    x_ptr,  # [B, S, C], any strides
    g_ptr,  # [B, S, C] contiguous: the gradient of the branch
    mean_ptr,  # [B * S] float32
    rstd_ptr,  # [B * S] float32
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    w1_ptr,  # [D, S_PAD], zero-padded
    b1_ptr,  # [D] float32, zero-padded
    w2_ptr,  # [S_PAD, D], zero-padded
    dn_ptr,  # [B, S, C] contiguous
    a_ptr,  # [B, D_S, C] contiguous, or None
    dz_ptr,  # [B, D_S, C] contiguous, or None
    S,
    C,
    D_S,
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
    SLOPE: tl.constexpr,
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
    depth = D
    if DROP_PATH:
        # A dropped image takes no turn of the loop: its dn is 0, and the weight gradients do not read its a and dz.
        keep = kept_image(noise, image)
        depth = tl.where(keep > 0, D, 0)
        steps = tl.where(keep > 0, steps, 0)
    x_ptr += image * stride_b
    g_ptr += image * S * C
    dn_ptr += image * S * C
    mean_ptr += image * S
    rstd_ptr += image * S
    hidden = image * D_S * C

    n0 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, 0, N0, DTYPE, INT64)
    g0 = _gradient(g_ptr, S, C, offs_c, 0, N0, DTYPE)
    dn0 = tl.zeros((BLOCK_C, N0), tl.float32)
    if N1 > 0:
        n1 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, S1, N1, DTYPE, INT64)
        g1 = _gradient(g_ptr, S, C, offs_c, S1, N1, DTYPE)
        dn1 = tl.zeros((BLOCK_C, N1), tl.float32)
    if N2 > 0:
        n2 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, S2, N2, DTYPE, INT64)
        g2 = _gradient(g_ptr, S, C, offs_c, S2, N2, DTYPE)
        dn2 = tl.zeros((BLOCK_C, N2), tl.float32)
    if N3 > 0:
        n3 = _normalised(x_ptr, mean_ptr, rstd_ptr, gamma, beta, S, C, stride_s, stride_c, offs_c, S3, N3, DTYPE, INT64)
        g3 = _gradient(g_ptr, S, C, offs_c, S3, N3, DTYPE)
        dn3 = tl.zeros((BLOCK_C, N3), tl.float32)

    turns = 0
    for d0 in tl.range(0, depth, BLOCK_D, num_stages=STAGES):
        turns += 1
        offs_d = d0 + tl.arange(0, BLOCK_D)
        z = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        da = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        z = _hidden(z, n0, w1_ptr, offs_d, 0, N0, S_PAD, PRECISION)
        da = _backward(da, g0, w2_ptr, offs_d, D, 0, N0, PRECISION)
        if N1 > 0:
            z = _hidden(z, n1, w1_ptr, offs_d, S1, N1, S_PAD, PRECISION)
            da = _backward(da, g1, w2_ptr, offs_d, D, S1, N1, PRECISION)
        if N2 > 0:
            z = _hidden(z, n2, w1_ptr, offs_d, S2, N2, S_PAD, PRECISION)
            da = _backward(da, g2, w2_ptr, offs_d, D, S2, N2, PRECISION)
        if N3 > 0:
            z = _hidden(z, n3, w1_ptr, offs_d, S3, N3, S_PAD, PRECISION)
            da = _backward(da, g3, w2_ptr, offs_d, D, S3, N3, PRECISION)
        a, slope = SLOPE(z + tl.load(b1_ptr + offs_d)[None, :])
        if DROPOUT:
            kept = kept_hidden(noise, offs_d[None, :], offs_c[:, None], image)
            a *= kept
            da *= kept
        dz = (da * slope).to(DTYPE)
        mask = (offs_d < D_S)[:, None] & (offs_c < C)[None, :]
        offs = hidden + offs_d[:, None] * C + offs_c[None, :]
        if a_ptr is not None:
            tl.store(a_ptr + offs, tl.trans(a.to(DTYPE)), mask=mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + offs, tl.trans(dz), mask=mask)
        dn0 = _input(dn0, dz, w1_ptr, offs_d, 0, N0, S_PAD, PRECISION)
        if N1 > 0:
            dn1 = _input(dn1, dz, w1_ptr, offs_d, S1, N1, S_PAD, PRECISION)
        if N2 > 0:
            dn2 = _input(dn2, dz, w1_ptr, offs_d, S2, N2, S_PAD, PRECISION)
        if N3 > 0:
            dn3 = _input(dn3, dz, w1_ptr, offs_d, S3, N3, S_PAD, PRECISION)

    # late is 0, which the compiler cannot know: it may not keep the gradient's addresses through the loop.
    late = tl.multiple_of(turns - steps, 16)
    _store(dn0, dn_ptr, S, C, offs_c, late, 0, N0)
    if N1 > 0:
        _store(dn1, dn_ptr, S, C, offs_c, late, S1, N1)
    if N2 > 0:
        _store(dn2, dn_ptr, S, C, offs_c, late, S2, N2)
    if N3 > 0:
        _store(dn3, dn_ptr, S, C, offs_c, late, S3, N3)


def token_data_gradient(
    g: Tensor, x: Tensor, norm: Norm, half: Half, options: Options, want_a: bool, want_dz: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dn [B, S, C]``, and a and dz ``[B, D_S, C]`` where they are wanted; S up to 256."""
    (batch_size, tokens, channels), units = x.shape, half.w_in.shape[0]
    n0, n1, n2, n3 = segments = token_segments(tokens, longest=64)
    config = token_backward_config(
        target_of(x.device), options.dtype, segments, vectorised=is_vectorised(x), noise=options.noise
    )
    packing, hidden = Packing(options.dtype), round_up(units, config.block_d)
    weights = token_weights(packing, half, sum(segments), hidden)
    packing.run()
    dn, a, dz = (
        torch.empty(batch_size, extent, channels, dtype=options.dtype, device=x.device) if want else None
        for extent, want in ((tokens, True), (units, want_a), (units, want_dz))
    )
    launch(
        _token_mixing_bwd_kernel, batch_size * cdiv(channels, config.block_c),
        x, g, *norm, *weights[:3], dn, a, dz, tokens, channels, units, hidden, hidden // config.block_d, *x.stride(),
        **noise_arguments(options), **config.launch_options(), N0=n0, N1=n1, N2=n2, N3=n3,
        SLOPE=activation_of(options).and_slope, PRECISION=options.precision if config.tf32 else "ieee",
        INT64=needs_int64(x.shape[1:], x.stride()[1:]) or needs_int64((max(tokens, units), channels), (channels, 1)),
    )  # fmt: skip
    return dn, a, dz
