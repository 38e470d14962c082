"""Tile configurations, as data: which tile runs which product on which architecture.

Deterministic look-ups instead of an autotuner: no trial runs on the first call, the same kernel on every run, and
every configuration compiles ahead of time in ``python -m mixer_kernels compile-check``, which fails on a register
spill and on shared memory over the target's limit. The values were found by compiling for each target and reading
the resource report; where a GPU has measured them, benchmarks/results says so.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch

from .target import Target


@dataclass(frozen=True)
class StatisticsConfig:
    """Row statistics: ``block_rows`` rows by chunks of ``block_c`` channels."""

    block_rows: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class TokenConfig:
    """Fused token mixing: ``block_c`` channels of one image, the hidden axis in steps of ``block_d``.

    ``tf32``: whether float32 products may run in TF32 where the matmul precision allows it.
    """

    block_c: int
    block_d: int
    num_warps: int
    num_stages: int
    tf32: bool = True

    def launch_options(self) -> dict[str, int]:
        return {
            "BLOCK_C": self.block_c, "BLOCK_D": self.block_d, "STAGES": self.num_stages, "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }  # fmt: skip


@dataclass(frozen=True)
class ProductConfig:
    """A matrix product with a fused epilogue, ``block_m`` x ``block_n`` outputs in steps of ``block_k``.

    ``programs_per_sm``: of the persistent kernel on tensor descriptors; 0 for the kernel on pointers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    programs_per_sm: int = 0

    def launch_options(self, axes: str = "MNK") -> dict[str, int]:
        """``axes``: what a kernel calls those of the tile."""
        blocks = zip(axes, (self.block_m, self.block_n, self.block_k), strict=True)
        return {
            **{f"BLOCK_{axis}": block for axis, block in blocks},
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


MAX_FUSED_TOKENS = 256
SEGMENTS = (128, 64, 32, 16)


def are_fused(tokens: int, dtype: torch.dtype, glu: bool) -> bool:
    """Whether token mixing is one kernel. SwiGLU's second accumulator spills in float32."""
    return tokens <= MAX_FUSED_TOKENS and not (glu and dtype is torch.float32)


@functools.cache  # of numbers alone
def token_segments(tokens: int, longest: int = 128) -> tuple[int, int, int, int]:
    """Cut the token axis into at most four powers of two, the least that cover it; absent segments are 0.

    Tiles are powers of two: 196 tokens as one tile are 256, 31 % waste; as 128 + 64 + 16 they are 208, 6 %.
    ``longest``: 128, or 64 where loading and storing a segment takes many registers.
    """
    if not 1 <= tokens <= MAX_FUSED_TOKENS:
        raise ValueError(f"the fused kernel takes 1 to {MAX_FUSED_TOKENS} tokens, got {tokens}")
    allowed = [length for length in SEGMENTS if length <= longest]
    choices = (
        cut
        for count in (1, 2, 3, 4)
        for cut in itertools.combinations_with_replacement(allowed, count)
        if sum(cut) >= tokens
    )
    best = min(choices, key=lambda cut: (sum(cut), len(cut)))
    return (*best, *(0,) * (4 - len(best)))


def padded_extent(extent: int) -> int:
    """A whole axis as a tile has it: a power of two, and enough for a product."""
    return max(16, 1 << (extent - 1).bit_length())


def statistics_config(channels: int, channels_contiguous: bool) -> StatisticsConfig:
    """Whole rows where channels are contiguous; squares where tokens are (timm's transposed view)."""
    if not channels_contiguous:
        return StatisticsConfig(block_rows=64, block_c=32, num_warps=4)
    block_c = min(padded_extent(channels), 2048)
    rows = min(16 if block_c <= 128 else 8, 4096 // block_c)
    return StatisticsConfig(block_rows=max(1, rows), block_c=block_c, num_warps=4)


def token_config(
    target: Target,
    dtype: torch.dtype,
    stream_dtype: torch.dtype,
    segments: tuple[int, int, int, int],
    exact: bool,
    vectorised: bool,
    noise: bool,
    glu: bool = False,
) -> TokenConfig:
    """The tile of fused token mixing. ``exact``: float32 products in IEEE arithmetic rather than TF32;
    ``vectorised``: channels are contiguous and rows start on 16 bytes; ``noise``: dropout or stochastic depth;
    ``glu``: the hidden units are values and gates, in two accumulators.

    o (BLOCK_C x padded tokens, float32) and n (the same, in ``dtype``) live in registers: they decide the tile. A
    float32 stream or a transposed view takes registers for addresses and conversions on top, noise its counters.
    """
    lean = stream_dtype is dtype and vectorised
    hopper = target.capability in (90, 100, 103)
    if not target.is_nvidia:
        return TokenConfig(32, 16, 4, 1) if dtype is torch.float32 else TokenConfig(64, 32, 4, 1)
    if dtype is torch.float32 and hopper and not exact:
        return TokenConfig(64, 16, num_warps=8, num_stages=2)
    few_tokens = sum(segments) <= 208
    lean = lean and not noise
    if dtype is torch.float32 and lean and not exact:
        return TokenConfig(64, 16, num_warps=8, num_stages=2 if few_tokens and target.capability >= 120 else 1)
    if dtype is torch.float32:
        # On mma.sync every tile of TF32 spills here; "high" allows TF32 and does not ask for it.
        return TokenConfig(32, 16, num_warps=8 if vectorised else 4, num_stages=2, tf32=False)
    if hopper:
        # 128 channels halve the traffic of the weights from L2, which at 64 limits the rate of the products.
        # On sm_100 four segments, or gates, leave no tensor memory for 64 hidden units.
        block_d = 32 if segments[3] or glu else 64
        fits = lean and (sum(segments) <= 224 or target.capability > 90)
        if fits:
            stages = 3 if target.capability == 90 and block_d == 64 else 2
            return TokenConfig(128, block_d, num_warps=8, num_stages=stages)
        return TokenConfig(64, 32 if glu else 64, num_warps=8, num_stages=2)
    if noise:
        return TokenConfig(16, 16, 4, 2) if glu else TokenConfig(32, 16, num_warps=8, num_stages=2)
    if lean and few_tokens:
        return TokenConfig(128, 16 if glu or target.capability >= 120 else 32, num_warps=8, num_stages=2)
    if lean:
        return TokenConfig(64, 16, num_warps=4, num_stages=2)
    if glu and not vectorised:
        return TokenConfig(32, 16, num_warps=4, num_stages=2)
    return TokenConfig(64, 16, 4, 2) if few_tokens and vectorised else TokenConfig(64, 16, 8, 2)


def token_product_config(
    target: Target, dtype: torch.dtype, exact: bool, noise: bool, glu: bool = False
) -> ProductConfig:
    """The tile of the two products of token mixing over more than ``MAX_FUSED_TOKENS`` tokens. ``glu``: of the first,
    with values and gates."""
    if glu:
        config = _two_accumulators(token_product_config(target, dtype, exact, noise))
        wide = dtype is torch.float32 and (exact or target.capability in (100, 103))
        return replace(config, num_warps=8) if wide else config
    if dtype is torch.float32:
        return ProductConfig(64, 64, 32, num_warps=4, num_stages=1 if exact else 2)
    if not target.is_nvidia:
        return ProductConfig(64, 128, 32, num_warps=4, num_stages=1)
    return ProductConfig(64, 128, 32, num_warps=8 if noise else 4, num_stages=3)


def token_linear_config(target: Target, dtype: torch.dtype, exact: bool, vectorised: bool) -> ProductConfig:
    """The tile of a linear layer along tokens: its epilogue holds up to two more tiles, and their addresses where
    tensors are not ``vectorised``."""
    if dtype is torch.float32 and exact:
        config = ProductConfig(64, 64, 16, num_warps=4 if target.capability >= 120 else 8, num_stages=1)
    else:
        config = token_product_config(target, dtype, exact, noise=False)
        config = config if dtype is torch.float32 else replace(config, num_warps=8)
    return config if vectorised else replace(config, block_n=config.block_n // 2)


def channel_product_config(
    target: Target,
    dtype: torch.dtype,
    exact: bool,
    first: bool,
    depth: int,
    descriptors: bool,
    noise: bool,
    glu: bool = False,
) -> ProductConfig:
    """The tile of a channel product over ``depth``: fc1 (``first``) or fc2, on tensor descriptors or on pointers.

    ``noise``: dropout or stochastic depth, whose random numbers take registers in the epilogue; ``glu``: fc1 of
    values and gates.
    """
    if glu and dtype is torch.float32 and exact:
        return ProductConfig(64, 64, 16, num_warps=4 if target.capability in (100, 103) else 8, num_stages=2)
    if glu:
        config = _two_accumulators(channel_product_config(target, dtype, exact, first, depth, descriptors, noise))
        return replace(config, num_warps=4) if descriptors and noise else config
    if dtype is torch.float32 and exact:
        return ProductConfig(128, 64, 16, num_warps=8, num_stages=2)
    if dtype is torch.float32:
        return ProductConfig(64, 64, 32, num_warps=8 if target.capability in (100, 103) else 4, num_stages=2)
    if descriptors and (first or noise):
        # Two programs a multiprocessor, so that the epilogue of one runs under the product of the other.
        return ProductConfig(128, 128, 64, num_warps=8, num_stages=3, programs_per_sm=2)
    if descriptors:
        return ProductConfig(128, 256, 64, num_warps=8, num_stages=3, programs_per_sm=1)
    if not target.is_nvidia:
        return ProductConfig(128, 128, 32, num_warps=8, num_stages=1)
    if depth % 64 != 0:
        return ProductConfig(64, 64, 32, num_warps=4, num_stages=3)
    if noise:
        return ProductConfig(128 if target.shared_memory > 120_000 else 64, 64, 32, num_warps=8, num_stages=4)
    if target.shared_memory < 120_000:
        return ProductConfig(128, 128, 32, num_warps=8, num_stages=4)
    return ProductConfig(128, 128, 64, num_warps=8, num_stages=4)


MAX_GATED_EXTENT = 256


@dataclass(frozen=True)
class GatedMixingConfig:
    """``rows`` by the whole mixed axis, the hidden axis in steps of 16.

    ``max_registers``: what ptxas may use to a thread; it aims at an occupancy of its own otherwise, and spills for it.
    """

    rows: int
    num_warps: int
    max_registers: int | None
    block_d: int = 16
    num_stages: int = 1

    def launch_options(self) -> dict[str, int]:
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {
            "BLOCK_D": self.block_d, "STAGES": self.num_stages, "num_warps": self.num_warps,
            "num_stages": self.num_stages, **limit,
        }  # fmt: skip


def gated_mixing_config(target: Target, dtype: torch.dtype, rows: int, extent: int, exact: bool) -> GatedMixingConfig:
    """The tile of a half of a PatchTSMixer layer: some of its ``rows``, all of the ``extent`` of the mixed axis."""
    block_k = padded_extent(extent)
    exact = exact and dtype is torch.float32
    if block_k <= 16:
        most, num_warps = 32, 4
    elif exact:
        most, num_warps = 4096 // block_k, 4 if block_k == 32 else 8
    elif dtype is torch.float32:
        most, num_warps = 16, 4
    else:
        most, num_warps = 2048 // block_k, 4
    if not exact:
        most = min(most, 1 << (rows - 1).bit_length())
    most = max(16, min(64, most))
    num_warps = 8 if block_k == 256 else min(num_warps, most * block_k // 128)
    return GatedMixingConfig(most, num_warps, _all_registers(target, block_k, exact))


def gated_mixing_backward_config(
    target: Target, dtype: torch.dtype, extent: int, exact: bool, dropout: bool
) -> GatedMixingConfig:
    """The tile of its backward: 16 rows, the least of a product, since n, g and dn lie in registers, and the gate."""
    block_k = padded_extent(extent)
    exact = exact and dtype is torch.float32
    most_warps = 8 if target.is_nvidia else 4  # a wave of AMD's has 64 lanes
    columns = 8 if exact and (dropout or block_k != 64) else 16
    num_warps = max(2, min(most_warps, block_k // columns))
    return GatedMixingConfig(16, num_warps, _all_registers(target, block_k, exact))


def gated_mixer_layer_config(
    target: Target,
    dtype: torch.dtype,
    stream_dtype: torch.dtype,
    patches: int,
    features: int,
    exact: bool,
    dropout: bool,
) -> GatedMixingConfig | None:
    """The tile of a whole layer, all of its ``patches`` by all of its ``features``; None if it does not fit."""
    block_p, block_f = padded_extent(patches), padded_extent(features)
    area, is_long = block_p * block_f, block_f > 128
    if area > (2048 if dtype is torch.float32 else 4096) or block_p > 64 or (is_long and dropout):
        return None
    exact = exact and dtype is torch.float32
    few_warps = not target.is_nvidia or exact or (is_long and stream_dtype is dtype)  # a wave of AMD's has 64 lanes
    num_warps = max(1, min(4 if few_warps else 8, area // 256))
    all_registers = target.is_nvidia and not is_long and not (exact and area == 2048)  # as in _all_registers
    return GatedMixingConfig(block_p, num_warps, 255 if all_registers else None)


def _all_registers(target: Target, block_k: int, exact: bool) -> int | None:
    """Where it avoids spills: with FMA instructions and with long axes ptxas does better by its own measure."""
    return None if not target.is_nvidia or exact or block_k == 256 else 255


def _two_accumulators(config: ProductConfig) -> ProductConfig:
    return replace(config, block_n=config.block_n // 2)


def norm_backward_config(channels: int, affine: bool = False) -> StatisticsConfig:
    """LayerNorm backward: whole rows, few at a time, since x, dn and dy and two sums lie in registers.

    ``affine``: without statistics, of which less lies in registers.
    """
    block_c = padded_extent(channels)
    block_rows = 8 if block_c <= 128 else min(4, 2048 // block_c) if block_c <= 1024 else 2 if block_c <= 2048 else 1
    num_warps = 4 if affine and block_c <= 256 else 8 if block_c <= 2048 else 16
    return StatisticsConfig(block_rows=block_rows, block_c=block_c, num_warps=num_warps)


def token_backward_config(
    target: Target, dtype: torch.dtype, segments: tuple[int, int, int, int], vectorised: bool, noise: bool
) -> TokenConfig:
    """The tile of token mixing backward: n and g (in ``dtype``) and dn (float32) share the registers, with the counters
    of ``noise``, dropout or stochastic depth.

    On sm_90 a pipeline of two stages makes ptxas wait for each product (its warning C7515); one stage leaves them
    asynchronous and room for a second block, but no registers for noise.
    """
    if not target.is_nvidia:
        return TokenConfig(16, 16, 4, 1) if dtype is torch.float32 else TokenConfig(32, 16, 4, 1)
    hopper = target.capability in (90, 100, 103)
    if dtype is torch.float32 and hopper and sum(segments) <= 208:
        return TokenConfig(16, 16, num_warps=4, num_stages=2, tf32=False)
    if dtype is torch.float32:
        return TokenConfig(16, 16, num_warps=8, num_stages=1, tf32=False)
    if hopper:
        few_warps = target.capability == 90 and sum(segments) <= 208 and vectorised
        stages = 1 if target.capability == 90 and not noise else 2
        return TokenConfig(64, 32, num_warps=4 if few_warps else 8, num_stages=stages)
    if target.capability >= 120:
        return TokenConfig(32, 16, num_warps=4, num_stages=2)
    return TokenConfig(64, 16, num_warps=8, num_stages=2)


def weight_gradient_config(
    target: Target, dtype: torch.dtype, stream_dtype: torch.dtype, exact: bool, vectorised: bool, norm: bool
) -> ProductConfig:
    """The tile of a weight gradient of token mixing, summed over channels and images. ``vectorised``: rows are whole
    vectors of 16 bytes; ``norm``: an operand is normalised as it is loaded."""
    if dtype is torch.float32:
        block = 32 if exact and target.capability in (90, 100, 103) else 64
        return ProductConfig(block, block, 16, num_warps=8 if target.capability >= 120 else 4, num_stages=1)
    if vectorised and target.is_nvidia and (target.capability == 90 or not norm):
        if target.shared_memory < 120_000:
            return ProductConfig(128, 64, 32, num_warps=8, num_stages=3)
        return ProductConfig(128, 128, 64, num_warps=8, num_stages=3)
    num_warps = 4 if target.capability >= 120 and stream_dtype is dtype else 8
    return ProductConfig(64, 64, 32, num_warps=num_warps, num_stages=2 if target.is_nvidia else 1)


def token_gelu_backward_config(target: Target, dtype: torch.dtype, exact: bool, glu: bool = False) -> ProductConfig:
    """The tile of W2' . g with GELU's backward in the epilogue; ``glu``: SwiGLU's."""
    config = token_product_config(target, dtype, exact, noise=False, glu=glu)
    return config if dtype is torch.float32 else replace(config, num_warps=8)


def gelu_backward_config(
    target: Target,
    dtype: torch.dtype,
    exact: bool,
    depth: int,
    descriptors: bool = False,
    noise: bool = False,
    glu: bool = False,
) -> ProductConfig:
    """The tile of g . W4 with GELU's backward in the epilogue, over ``depth`` channels, on tensor descriptors or on
    pointers; ``glu``: SwiGLU's."""
    if descriptors:
        # Two programs a multiprocessor, so that the epilogue of one runs under the product of the other.
        block_n, programs = 64 if glu else 128, 1 if noise else 2
        return ProductConfig(128, block_n, 64, num_warps=8, num_stages=3, programs_per_sm=programs)
    if glu:
        return _two_accumulators(gelu_backward_config(target, dtype, exact, depth))
    if dtype is torch.float32 and exact:
        return ProductConfig(64, 64, 16, num_warps=8, num_stages=2)
    if dtype is torch.float32:
        return ProductConfig(64, 64, 32, num_warps=8, num_stages=2)
    if not target.is_nvidia:
        return ProductConfig(128, 64, 32, num_warps=8, num_stages=1)
    if depth % 64 != 0:
        return ProductConfig(64, 64, 32, num_warps=4, num_stages=3)
    if target.shared_memory > 120_000:
        return ProductConfig(128, 128, 64, num_warps=8, num_stages=3)
    return ProductConfig(128, 64, 32, num_warps=8, num_stages=3)
