"""Weight gradients of token mixing: products over images and channels, split along that sum; equation (16).

::

    dW[m, n] = sum over images and channels of left[m] . right[n]          dW1 [D_S, S]: dz and n = LN(x)
    db[m]    = sum over images and channels of left[m]                     dW2 [S, D_S]: g and a

A program takes a tile of one of them and a share of the sum, all turns alike: both operands are read as they lie in
memory, with channels contiguous, the next image's address is a step like any other, and rows past the last repeat it,
since they are not stored. Row sums for the bias stay apart until the loop ends. Partial sums: ``partial_sums``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import weight_gradient_config
from ...tuning.target import target_of
from ..arguments import Norm, Options, Parts
from ..rounding import cdiv
from . import token_weight_gradient_descriptors
from .launch import launch
from .noise import kept_image, noise_arguments
from .partial_sums import sum_parts


@triton.jit
def _token_weight_gradient_kernel(
    left_ptr,  # [B, M, C] contiguous
    right_ptr,  # [B, N, C], strides stride_b, stride_n, stride_c
    partial_ptr,  # [SPLITS, M, N] float32
    bias_ptr,  # [SPLITS, M] float32
    M,
    N,
    stride_b,
    stride_n,
    stride_c,
    mean_ptr,  # [B * N] float32: right is normalised as it is loaded; or None
    rstd_ptr,  # [B * N] float32, or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    B,
    C,
    noise,  # noise.noise_arguments
    NORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
):
    DTYPE: tl.constexpr = left_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # what a thread loads at once
    program = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    c_tiles = tl.cdiv(C, BLOCK_C)
    m_tile = program % m_tiles
    n_tile = program // m_tiles % n_tiles
    split = tl.cast(program // m_tiles // n_tiles, tl.int64)
    offs_m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    row_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    row_n = tl.minimum(offs_n, N - 1).to(tl.int64)

    turns = tl.cast(B, tl.int64) * c_tiles
    begin = split * turns // SPLITS
    end = (split + 1) * turns // SPLITS
    image = begin // c_tiles
    c0 = tl.cast(begin % c_tiles, tl.int32) * BLOCK_C
    left_tile_ptr = left_ptr + (image * M * C + c0) + row_m[:, None] * C + offs_c[None, :]
    right_tile_ptr = (
        right_ptr + (image * stride_b + tl.cast(c0, tl.int64) * stride_c)
        + row_n[:, None] * stride_n + offs_c.to(tl.int64)[None, :] * stride_c
    )  # fmt: skip
    step = tl.full((), BLOCK_C, tl.int64)
    to_next_image = tl.cast(c_tiles - 1, tl.int64) * BLOCK_C
    left_to_next = tl.cast(M, tl.int64) * C - to_next_image
    right_to_next = stride_b - to_next_image * stride_c

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C // VECTOR), tl.float32)
    for _ in range(0, tl.cast(end - begin, tl.int32)):
        if EVEN_K and not DROP_PATH:
            left = tl.load(left_tile_ptr)
            right = tl.load(right_tile_ptr)
        else:
            width = C - c0
            if DROP_PATH:
                width = tl.where(kept_image(noise, image) > 0, width, 0)  # else the data kernel left it unwritten
            left = tl.load(left_tile_ptr, mask=(offs_c < width)[None, :], other=0.0)
            right = tl.load(right_tile_ptr, mask=(offs_c < width)[None, :], other=0.0)
        if NORM:
            n = right.to(tl.float32)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + image * N + row_n)
                n = (n - mean[:, None]) * tl.load(rstd_ptr + image * N + row_n)[:, None]
            channel = c0 + offs_c
            if gamma_ptr is not None:
                n *= tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
            if beta_ptr is not None:
                n += tl.load(beta_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
            right = n
        if n_tile == 0:
            sums += tl.sum(tl.reshape(left.to(tl.float32), (BLOCK_M, BLOCK_C // VECTOR, VECTOR)), 2)
        acc = tl.dot(left, tl.trans(right.to(DTYPE)), acc, input_precision=PRECISION)
        c0 += BLOCK_C
        is_last = c0 >= C
        left_tile_ptr += tl.where(is_last, left_to_next, step)
        right_tile_ptr += tl.where(is_last, right_to_next, step * stride_c)
        c0 = tl.where(is_last, 0, c0)
        image += is_last.to(tl.int64)

    mask_m = offs_m < M
    partial_ptr += split * M * N
    tl.store(partial_ptr + row_m[:, None] * N + row_n[None, :], acc, mask=mask_m[:, None] & (offs_n < N)[None, :])
    # Blocks compared with blocks: Triton's own interpreter has no mask that is a block & a scalar.
    tl.store(bias_ptr + split * M + row_m, tl.sum(sums, 1), mask=mask_m & (n_tile == tl.zeros_like(offs_m)))


def token_weight_gradients(
    dz: Tensor | None, n: Tensor | None, a: Tensor | None, g: Tensor, options: Options
) -> tuple[Parts | None, Parts | None, Parts | None, Parts | None]:
    """dW1, db1, dW2, db2: the first two from dz and n, db1 alone without n, the others from a and g."""
    dw1, db1 = (None, None) if dz is None else _run(dz, dz if n is None else n, Norm(), options)
    dw2, db2 = (None, None) if a is None else _run(g, a, Norm(), options)
    return None if n is None else dw1, db1, dw2, db2


def weight_gradient(left: Tensor, right: Tensor, norm: Norm, options: Options) -> tuple[Tensor, Tensor]:
    """``(dW [M, N], db [M])`` in float32 from ``left [B, M, C]``, contiguous, and ``norm`` of ``right [B, N, C]``."""
    return tuple(sum_parts(_run(left, right, norm, options), [torch.float32] * 2))


def _run(left: Tensor, right: Tensor, norm: Norm, options: Options) -> tuple[Parts, Parts]:
    """Of a weight and its bias."""
    (batch_size, rows, channels), columns = left.shape, right.shape[1]
    target = target_of(left.device)
    is_normalised, vectorised = any(t is not None for t in norm), channels % 8 == 0
    config = weight_gradient_config(
        target, left.dtype, right.dtype, options.exact, vectorised=vectorised, norm=is_normalised
    )
    tiles = cdiv(rows, config.block_m) * cdiv(columns, config.block_n)
    splits = max(1, min(batch_size * cdiv(channels, config.block_k), 2 * target.multiprocessors // tiles))
    partial = torch.empty(splits, rows, columns, dtype=torch.float32, device=left.device)
    bias = torch.empty(splits, rows, dtype=torch.float32, device=left.device)
    if not is_normalised and token_weight_gradient_descriptors.fits(target, left, right, options):
        token_weight_gradient_descriptors.run(config, left, right, partial, bias, tiles * splits)
    else:
        launch(
            _token_weight_gradient_kernel, tiles * splits,
            left, right, partial, bias, rows, columns, *right.stride(), *norm, batch_size, channels,
            **noise_arguments(options), **config.launch_options("MNC"), NORM=is_normalised,
            EVEN_K=channels % config.block_k == 0, SPLITS=splits, PRECISION=options.precision,
        )  # fmt: skip
    return Parts(partial), Parts(bias)
