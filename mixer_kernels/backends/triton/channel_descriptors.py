"""The channel products on tensor descriptors (TMA): persistent programs for sm_90 and sm_100.

Descriptors are made on the host: made on the device they live in scratch memory from an allocator that Triton keeps
per thread, and autograd runs backward on threads of its own.
"""

from __future__ import annotations

import functools
import importlib.util

import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import ProductConfig
from ...tuning.target import Target
from ..rounding import cdiv
from .activation import activation_of
from .channel_epilogue import ChannelProduct, fc1_epilogue, fc2_epilogue, hidden_dropout, tile_origin
from .launch import launch
from .noise import kept_image, noise_arguments


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Both column blocks of ``acc``."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def quarters(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four column blocks of ``acc``: the epilogue's live registers and its staging buffer shrink fourfold."""
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    q0, q1 = halves(left, BLOCK_M, BLOCK_N // 2)
    q2, q3 = halves(right, BLOCK_M, BLOCK_N // 2)
    return q0, q1, q2, q3


@triton.jit
def _channel_product_descriptor_kernel(
    left,  # descriptor of u or a [M, K], boxes BLOCK_M x BLOCK_K
    right,  # descriptor of W' or W4 [N, K_PAD], boxes BLOCK_N x BLOCK_K; GLU's W': [2 * N, K_PAD], values and gates
    out,  # descriptor of [M, N], boxes BLOCK_M x BLOCK_N / 4; fc1: or None
    z,  # fc1: descriptor like out, or None; GLU: of the values
    z_gate,  # GLU: like z, of the gates
    u,  # fc2: descriptor of the residual [M, N], boxes as out
    bias_ptr,  # fc2: [N] or None
    mean_ptr,  # fc1: [M] float32, or None for an affine map without statistics
    rstd_ptr,  # fc1: [M] float32, or None
    wg_ptr,  # fc1: [N] float32
    wb_ptr,  # fc1: [N] float32
    scale_ptr,  # fc1: [N] float32 or None
    M,
    N,
    K,
    S,  # rows to an image
    noise,  # noise.noise_arguments
    FC1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ACT: tl.constexpr,
    GLU: tl.constexpr,  # of fc1
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
):
    SUB_N: tl.constexpr = BLOCK_N // 4
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # Flattened, the loads of the next tile run under the epilogue of this one; the epilogue counts its own tiles so
    # that no value is carried from the product's loop into it.
    done = tl.program_id(0) - PROGRAMS
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m0, n0 = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if GLU:
            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        steps = tl.cdiv(K, BLOCK_K)
        if DROP_PATH:
            # A tile of dropped images takes no turn; fc1's garbage is multiplied by 0 in fc2, or not read.
            row = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1)
            kept = kept_image(noise, row // S)
            steps = tl.where(tl.max(kept, 0) > 0, steps, 0)
        for k in range(0, steps):
            if GLU:
                rows = left.load([m0, k * BLOCK_K])
                acc = tl.dot(rows, right.load([n0, k * BLOCK_K]).T, acc)
                gate = tl.dot(rows, right.load([N + n0, k * BLOCK_K]).T, gate)
            else:
                acc = tl.dot(left.load([m0, k * BLOCK_K]), right.load([n0, k * BLOCK_K]).T, acc)
        done += PROGRAMS
        m0, n0 = tile_origin(done, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        parts = quarters(acc, BLOCK_M, BLOCK_N)
        if GLU:
            gates = quarters(gate, BLOCK_M, BLOCK_N)
        for i in tl.static_range(4):
            first = n0 + i * SUB_N
            offs_n = first + tl.arange(0, SUB_N)
            mask_n = offs_n < N
            offs_m = m0 + tl.arange(0, BLOCK_M)
            if FC1:
                mean = None
                rstd = None
                if mean_ptr is not None:
                    mean = tl.load(mean_ptr + offs_m, mask=offs_m < M, other=0.0)
                    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
                v = fc1_epilogue(parts[i], mean, rstd, None, wg_ptr, wb_ptr, scale_ptr, offs_n, mask_n, True)
                if z is not None:
                    z.store([m0, first], v.to(z.dtype))
                if GLU:
                    g = fc1_epilogue(gates[i], mean, rstd, None, wg_ptr, wb_ptr, scale_ptr, N + offs_n, mask_n, True)
                    if z is not None:
                        z_gate.store([m0, first], g.to(z.dtype))
                if out is not None:
                    if GLU:
                        v = ACT(v, g)
                    else:
                        v = ACT(v)
                    if DROPOUT:
                        v = hidden_dropout(v, offs_m, offs_n, S, noise)
                    out.store([m0, first], v.to(out.dtype))
            else:
                v = fc2_epilogue(
                    parts[i], u.load([m0, first]), bias_ptr, offs_m, offs_n, mask_n, S, noise, DROPOUT, DROP_PATH,
                )  # fmt: skip
                out.store([m0, first], v.to(out.dtype))


@functools.cache  # what is installed
def has_host_descriptors() -> bool:
    """Whether this Triton can take descriptors as arguments."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def fits(target: Target, u: Tensor, right: Tensor) -> bool:
    """Whether the operands of a channel product on ``u [B, S, C]`` can be tensor descriptors on ``target``.

    A descriptor's rows and base lie on 16 bytes (CUDA driver API, cuTensorMapEncodeTiled) and its coordinates are 32
    bits; ``u`` has to be in the dtype of the product and contiguous.
    """
    return (
        target.capability in (90, 100, 103)
        and has_host_descriptors()
        and u.dtype is right.dtype
        and u.dtype.itemsize == 2
        and u.is_contiguous()
        and u.shape[2] * u.dtype.itemsize % 16 == 0
        and u.data_ptr() % 16 == 0
        and u.numel() // u.shape[2] < 2**31 - 256
    )


def run_product(config: ProductConfig, product: ChannelProduct, target: Target) -> None:
    """Write ``product.out`` and ``product.z``; its operands meet ``fits``, and fc1 is folded."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton >= 3.4

    (rows, columns), options, norm, weights = product.shape, product.options, product.norm, product.weights
    programs = min(
        config.programs_per_sm * target.multiprocessors,
        cdiv(rows, config.block_m) * cdiv(columns, config.block_n),
    )

    def descriptor(t: Tensor | None, columns: int) -> TensorDescriptor | None:
        return None if t is None else TensorDescriptor.from_tensor(t, [config.block_m, columns])

    left = product.left if product.left.dim() == 2 else product.left.flatten(0, 1)
    z, z_gate = product.z.unbind(1) if product.is_glu and product.z is not None else (product.z, None)
    residual = None if product.is_fc1 else product.u.flatten(0, 1)
    launch(
        _channel_product_descriptor_kernel, programs,
        descriptor(left, config.block_k),
        TensorDescriptor.from_tensor(weights.right, [config.block_n, config.block_k]),
        *(descriptor(t, config.block_n // 4) for t in (product.out, z, z_gate, residual)),
        weights.bias, norm.mean, norm.rstd, weights.wg, weights.wb, weights.scale,
        rows, columns, product.K, product.u.shape[1],
        **noise_arguments(options), **config.launch_options(), GROUP_M=config.group_m, PROGRAMS=programs,
        FC1=product.is_fc1, ACT=activation_of(options).function, GLU=product.is_glu,
    )  # fmt: skip
