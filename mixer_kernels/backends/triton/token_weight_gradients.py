"""Weight gradients of token mixing: products over images and channels, split along that sum; equation (16).

::

    dW1  = sum over images of dz . n'        [D_S, S]      n = LN(x), normalised again as it is loaded
    dW2' = sum over images of a . g'         [D_S, S]

Each split adds its share in registers and writes float32 partial sums, which PyTorch adds in a fixed order: no atomics,
two runs agree bit for bit. db1 and db2 come along as row sums of the operands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import weight_gradient_config
from ...tuning.target import target_of
from ..arguments import Norm, Options
from ..rounding import cdiv
from .launch import launch, needs_int64
from .noise import kept_image, noise_arguments


@triton.jit
def _token_weight_gradient_kernel(
    left_ptr,  # [B, D_S, C] contiguous: dz for W1, a for W2
    right_ptr,  # W1: x [B, S, C], any strides; W2: g [B, S, C] contiguous
    mean_ptr,  # W1: [B * S] float32, or None for an affine map without statistics
    rstd_ptr,  # W1: [B * S] float32, or None
    gamma_ptr,  # W1: [C] or None
    beta_ptr,  # W1: [C] or None
    partial_ptr,  # [SPLITS, D_S, S] float32
    bias_ptr,  # [SPLITS, D_S] (W1) or [SPLITS, S] (W2) float32: partial db1 or db2
    B,
    S,
    C,
    D_S,
    stride_b,  # of right
    stride_s,
    stride_c,
    noise,  # noise.noise_arguments
    IS_W1: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = left_ptr.dtype.element_ty
    d_tiles = tl.cdiv(D_S, BLOCK_D)
    s_tiles = tl.cdiv(S, BLOCK_S)
    c_tiles = tl.cdiv(C, BLOCK_C)
    d_tile = tl.program_id(0) % d_tiles
    s_tile = (tl.program_id(0) // d_tiles) % s_tiles
    split = tl.program_id(0) // d_tiles // s_tiles
    offs_d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_s = s_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_d = offs_d < D_S
    mask_s = offs_s < S
    far_d, far_s = offs_d, offs_s
    if INT64:
        far_d = offs_d.to(tl.int64)
        far_s = offs_s.to(tl.int64)

    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    left_sum = tl.zeros((BLOCK_D,), tl.float32)
    right_sum = tl.zeros((BLOCK_S,), tl.float32)
    for tile in range(split, B * c_tiles, SPLITS):
        image = tl.cast(tile // c_tiles, tl.int64)
        offs_c = (tile % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        if DROP_PATH:
            # what the data kernel left unwritten
            mask_c = mask_c & (kept_image(noise, image) > 0)
        mask_left = mask_d[:, None] & mask_c[None, :]
        mask_right = mask_s[:, None] & mask_c[None, :]
        left = tl.load(
            left_ptr + image * D_S * C + far_d[:, None] * C + offs_c[None, :], mask=mask_left, other=0.0
        )  # [BLOCK_D, BLOCK_C]
        right = tl.load(
            right_ptr + image * stride_b + far_s[:, None] * stride_s + offs_c[None, :] * stride_c,
            mask=mask_right,
            other=0.0,
        )  # [BLOCK_S, BLOCK_C]
        if IS_W1:
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + image * S + offs_s, mask=mask_s, other=0.0)
                rstd = tl.load(rstd_ptr + image * S + offs_s, mask=mask_s, other=0.0)
                n = (right.to(tl.float32) - mean[:, None]) * rstd[:, None]
            else:
                n = right.to(tl.float32)
            if gamma_ptr is not None:
                n *= tl.load(gamma_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
            if beta_ptr is not None:
                n += tl.load(beta_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
            right = tl.where(mask_right, n, 0.0)
            left_sum += tl.sum(left.to(tl.float32), 1)
        else:
            right_sum += tl.sum(right.to(tl.float32), 1)
        acc = tl.dot(left, tl.trans(right.to(DTYPE)), acc, input_precision=PRECISION)

    partial_ptr += tl.cast(split, tl.int64) * D_S * S
    mask = mask_d[:, None] & mask_s[None, :]
    tl.store(partial_ptr + far_d[:, None] * S + offs_s[None, :], acc, mask=mask)
    # Blocks compared with blocks: Triton's own interpreter has no mask that is a block & a scalar.
    if IS_W1:
        tl.store(bias_ptr + split * D_S + offs_d, left_sum, mask=mask_d & (s_tile == tl.zeros_like(offs_d)))
    else:
        tl.store(bias_ptr + split * S + offs_s, right_sum, mask=mask_s & (d_tile == tl.zeros_like(offs_s)))


def weight_gradient(left: Tensor, right: Tensor, norm: Norm | None, options: Options) -> tuple[Tensor, Tensor]:
    """A weight's and its bias's gradient, float32: ``(dW1 [D_S, S], db1 [D_S])`` from ``left`` dz, ``right`` x and
    ``norm``; ``(dW2' [D_S, S], db2 [S])`` from ``left`` a, ``right`` g and no ``norm``."""
    batch_size, hidden, channels = left.shape
    tokens = right.shape[1]
    target = target_of(left.device)
    config = weight_gradient_config(target, left.dtype, right.dtype, options.exact)
    tiles = cdiv(hidden, config.block_m) * cdiv(tokens, config.block_n)
    splits = max(1, min(batch_size * cdiv(channels, config.block_k), 2 * target.multiprocessors // tiles))
    partial = torch.empty(splits, hidden, tokens, dtype=torch.float32, device=left.device)
    bias = torch.empty(splits, tokens if norm is None else hidden, dtype=torch.float32, device=left.device)
    launch(
        _token_weight_gradient_kernel, tiles * splits,
        left, right, *(norm or (None,) * 4), partial, bias, batch_size, tokens, channels, hidden, *right.stride(),
        **noise_arguments(options), **config.launch_options("DSC"),
        IS_W1=norm is not None, SPLITS=splits, PRECISION=options.precision,
        INT64=needs_int64((hidden, channels), (channels, 1)) or needs_int64(right.shape[1:], right.stride()[1:]),
    )  # fmt: skip
    return partial.sum(0), bias.sum(0)
