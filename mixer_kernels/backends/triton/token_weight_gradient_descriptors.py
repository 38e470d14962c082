"""Weight gradients of token mixing on tensor descriptors (TMA), for sm_90 and sm_100.

The images' rows lie one behind the other, so that a tile's rows past an image's last are the next image's: their sums
are not stored. What lies past the last channel is read as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import ProductConfig
from ...tuning.target import Target
from ..arguments import Options
from .channel_descriptors import has_host_descriptors
from .launch import launch


@triton.jit
def _token_weight_gradient_descriptor_kernel(
    left,  # descriptor of [B * M, C], boxes BLOCK_M x BLOCK_C
    right,  # descriptor of [B * N, C], boxes BLOCK_N x BLOCK_C
    partial_ptr,  # [SPLITS, M, N] float32
    bias_ptr,  # [SPLITS, M] float32
    M,
    N,
    B,
    C,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    c_tiles = tl.cdiv(C, BLOCK_C)
    m0 = tl.program_id(0) % m_tiles * BLOCK_M
    n_tile = tl.program_id(0) // m_tiles % n_tiles
    n0 = n_tile * BLOCK_N
    split = tl.cast(tl.program_id(0) // m_tiles // n_tiles, tl.int64)
    turns = tl.cast(B, tl.int64) * c_tiles
    begin = split * turns // SPLITS
    image = tl.cast(begin // c_tiles, tl.int32)
    row_m = image * M + m0
    row_n = image * N + n0
    c0 = tl.cast(begin % c_tiles, tl.int32) * BLOCK_C

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Row sums as a product with ones: ptxas makes products wait for each other where elements are added beside them.
    sums = tl.zeros((BLOCK_M, 8), tl.float32)
    ones = tl.full((BLOCK_C, 8), 1.0, left.dtype)
    for _ in range(0, tl.cast((split + 1) * turns // SPLITS - begin, tl.int32)):
        rows = left.load([row_m, c0])
        acc = tl.dot(rows, right.load([row_n, c0]).T, acc)
        sums = tl.dot(rows, ones, sums)
        c0 += BLOCK_C
        is_last = c0 >= C
        row_m += tl.where(is_last, M, 0)
        row_n += tl.where(is_last, N, 0)
        c0 = tl.where(is_last, 0, c0)

    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    partial_ptr += split * M * N
    offs = tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask_m[:, None] & (offs_n < N)[None, :])
    tl.store(bias_ptr + split * M + offs_m, tl.sum(sums, 1) / 8, mask=mask_m & (n_tile == tl.zeros_like(offs_m)))


def fits(target: Target, left: Tensor, right: Tensor, options: Options) -> bool:
    """Whether both operands ``[B, rows, C]`` can be tensor descriptors on ``target``; what stochastic depth drops was
    not written, and a descriptor has no mask."""
    return (
        target.capability in (90, 100, 103)
        and has_host_descriptors()
        and options.drop_path_p == 0
        and all(
            t.dtype is options.dtype
            and t.dtype.itemsize == 2
            and t.is_contiguous()
            and t.shape[2] % 8 == 0
            and t.data_ptr() % 16 == 0
            and t.shape[0] * t.shape[1] < 2**31 - 256
            for t in (left, right)
        )
    )


def run(config: ProductConfig, left: Tensor, right: Tensor, partial: Tensor, bias: Tensor, programs: int) -> None:
    """Write partial sums of a weight ``[splits, M, N]`` and its bias ``[splits, M]``."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton >= 3.4

    launch(
        _token_weight_gradient_descriptor_kernel, programs,
        TensorDescriptor.from_tensor(left.flatten(0, 1), [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(right.flatten(0, 1), [config.block_n, config.block_k]),
        partial, bias, left.shape[1], right.shape[1], left.shape[0], left.shape[2],
        **config.launch_options("MNC"), SPLITS=partial.shape[0],
    )  # fmt: skip
