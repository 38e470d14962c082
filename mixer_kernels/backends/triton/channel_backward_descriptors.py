"""Channel mixing backward on tensor descriptors (TMA): fc1's persistent programs, with GELU's backward as epilogue."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import ProductConfig
from ...tuning.target import Target
from ..arguments import Options
from ..rounding import cdiv
from .activation import activation_of
from .channel_descriptors import halves, has_host_descriptors, quarters
from .channel_epilogue import hidden_dropout, tile_origin
from .launch import launch
from .noise import noise_arguments


@triton.jit
def _eighths(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Eight column blocks of ``acc``: with z, its slope and two results a quarter leaves no registers for a second
    program on the multiprocessor."""
    q0, q1, q2, q3 = quarters(acc, BLOCK_M, BLOCK_N)
    e0, e1 = halves(q0, BLOCK_M, BLOCK_N // 4)
    e2, e3 = halves(q1, BLOCK_M, BLOCK_N // 4)
    e4, e5 = halves(q2, BLOCK_M, BLOCK_N // 4)
    e6, e7 = halves(q3, BLOCK_M, BLOCK_N // 4)
    return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit
def _channel_gelu_bwd_descriptor_kernel(
    g,  # descriptor of the branch's gradient [M, C], boxes BLOCK_M x BLOCK_K
    w4,  # descriptor of [C, D_PAD], boxes BLOCK_K x BLOCK_N
    z,  # descriptor of [M, D_C], boxes BLOCK_M x BLOCK_N / 8; GLU: of the values
    z_gate,  # GLU: like z, of the gates
    dz,  # like z
    dz_gate,  # GLU: like z
    a,  # like z, or None
    sums_ptr,  # [row tiles, columns of dz] float32: column sums of dz
    M,
    C,
    D_C,
    S,  # rows to an image
    noise,  # noise.noise_arguments
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOPE: tl.constexpr,
    GLU: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
):
    SUB_N: tl.constexpr = BLOCK_N // 8
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(D_C, BLOCK_N)
    done = tl.program_id(0) - PROGRAMS  # the epilogue counts its own tiles: channel_descriptors says why
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m0, n0 = tile_origin(tile, M, D_C, BLOCK_M, BLOCK_N, GROUP_M)
        da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(C, BLOCK_K)):
            da = tl.dot(g.load([m0, k * BLOCK_K]), w4.load([k * BLOCK_K, n0]), da)
        done += PROGRAMS
        m0, n0 = tile_origin(done, M, D_C, BLOCK_M, BLOCK_N, GROUP_M)
        parts = _eighths(da, BLOCK_M, BLOCK_N)
        for i in tl.static_range(8):
            first = n0 + i * SUB_N
            offs_n = first + tl.arange(0, SUB_N)
            value = z.load([m0, first]).to(tl.float32)
            part = parts[i]  # 0 in rows and columns outside: what a descriptor reads there is 0
            if GLU:
                hidden, slope, gate_slope = SLOPE(value, z_gate.load([m0, first]).to(tl.float32))
            else:
                hidden, slope = SLOPE(value)
            if DROPOUT:
                offs_m = m0 + tl.arange(0, BLOCK_M)
                hidden = hidden_dropout(hidden, offs_m, offs_n, S, noise)
                part = hidden_dropout(part, offs_m, offs_n, S, noise)
            if a is not None:
                a.store([m0, first], hidden.to(a.dtype))
            if GLU:
                gradient = part * gate_slope
                dz_gate.store([m0, first], gradient.to(dz.dtype))
                sum_ptr = sums_ptr + (m0 // BLOCK_M * 2 + 1).to(tl.int64) * D_C + offs_n
                tl.store(sum_ptr, tl.sum(gradient, 0), mask=offs_n < D_C)
            gradient = part * slope
            dz.store([m0, first], gradient.to(dz.dtype))
            sum_ptr = sums_ptr + (m0 // BLOCK_M * (1 + GLU)).to(tl.int64) * D_C + offs_n
            tl.store(sum_ptr, tl.sum(gradient, 0), mask=offs_n < D_C)


def fits(target: Target, g: Tensor, w4: Tensor, hidden: int) -> bool:
    """Whether the operands for ``g [B, S, C]``, contiguous, and ``hidden`` units can be tensor descriptors on
    ``target``."""
    return (
        target.capability in (90, 100, 103)
        and has_host_descriptors()
        and g.dtype is w4.dtype
        and g.dtype.itemsize == 2
        and g.shape[2] % 8 == 0
        and hidden % 8 == 0
        and g.data_ptr() % 16 == 0
        and g.numel() // g.shape[2] < 2**31 - 256
    )


def run_product(
    config: ProductConfig, g: Tensor, w4: Tensor, z: Tensor, dz: Tensor, a: Tensor | None, sums: Tensor,
    target: Target, options: Options,
) -> None:  # fmt: skip
    """Write ``dz``, ``a`` and ``sums``; the operands meet ``fits``."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton >= 3.4

    rows, hidden, channels = z.shape[0], z.shape[-1], g.shape[2]
    programs = min(
        config.programs_per_sm * target.multiprocessors, cdiv(rows, config.block_m) * cdiv(hidden, config.block_n)
    )

    def descriptor(t: Tensor | None, columns: int) -> TensorDescriptor | None:
        return None if t is None else TensorDescriptor.from_tensor(t, [config.block_m, columns])

    hidden_units = (z.unbind(1), dz.chunk(2, 1)) if options.glu else ((z, None), (dz, None))
    launch(
        _channel_gelu_bwd_descriptor_kernel, programs,
        descriptor(g.flatten(0, 1), config.block_k),
        TensorDescriptor.from_tensor(w4, [config.block_k, config.block_n]),
        *(descriptor(t, config.block_n // 8) for pair in hidden_units for t in pair),
        descriptor(a, config.block_n // 8), sums, rows, channels, hidden, g.shape[1],
        **noise_arguments(options), **config.launch_options(), GROUP_M=config.group_m, PROGRAMS=programs,
        SLOPE=activation_of(options).and_slope, GLU=options.glu,
    )  # fmt: skip
