"""The forward pass of a whole block: a plan from metadata, and in each call one piece of memory for all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import Half, Options
from ..devices import device_of
from ..new_tensors import new_like
from ..rounding import cdiv, round_up
from .library import TYPES, layout, limits_of, loaded, sm90_may, sm90_takes, stream_of
from .prepack import ALIGNMENT, BlockPacks, Packing, block_packs

SM90_STATISTICS_CHANNELS = 64  # see mk_sm90_token_mixing_arguments in csrc/sm90/launchers.h


def mixer_block_forward(
    x: Tensor,
    tokens: Half,
    channels: Half,
    options: Options,
    eps2: float,
    sm90: bool | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """``y [B, S, C]``, contiguous, of the whole block, without dropout and stochastic depth.

    ``packing``: packs that are kept. None: weights are packed in this call and for it alone.
    """
    if x.numel() == 0:
        return new_like(x)
    return mixer_block_plan(x, tokens, channels, options, eps2, sm90, packing)(x)


def mixer_block_plan(
    x: Tensor,
    tokens: Half,
    channels: Half,
    options: Options,
    eps2: float,
    sm90: bool | None = None,
    packing: Packing | None = None,
) -> BlockPlan:
    """``mixer_block_forward`` on every ``x`` of this layout (not empty), parameters and packs where they are now."""
    dtype = options.dtype
    (batch_size, count, width), row = x.shape, round_up(channels.w_in.shape[0], 8)
    rows = batch_size * count
    sm90_tokens = sm90_takes(x, dtype, sm90, tokens=True)
    scratch = (
        4 * rows * 4,  # statistics of both LayerNorms
        # what the token kernel of csrc/sm90 leaves for the second one
        cdiv(width, SM90_STATISTICS_CHANNELS) * rows * 2 * 4 if sm90_tokens else 0,
        # a of the tokens where two kernels mix them, u, a of the channels
        0 if loaded().padded_tokens(count) else batch_size * tokens.w_in.shape[0] * round_up(width, 8) * dtype.itemsize,
        x.numel() * x.itemsize,
        rows * row * dtype.itemsize,
    )
    fixed = (layout(x)[1:], x.shape, (options.eps, eps2), TYPES[dtype], options.tanh, sm90_may(x, sm90), row)
    if packing is None:
        packs = block_packs(tokens, channels, dtype, x.dtype is dtype, sm90_tokens)
        return BlockPlan(fixed, scratch, packs, None, packs.layout.converted)
    with device_of(x):
        weights = (packing.token(tokens, sm90_tokens), *packing.channel(channels, x.dtype is dtype))
    return BlockPlan(fixed, scratch, None, weights, list(packing.made.values()))


class _Placed(NamedTuple):
    """What a call takes with its memory at ``base``."""

    base: int
    jobs: tuple | None
    weights: tuple
    scratch: list[int]


class BlockPlan:
    """A block's forward pass, all but the addresses of x, y and the memory of a call: packs, then scratch."""

    def __init__(
        self, fixed: tuple, scratch: tuple, packs: BlockPacks | None, weights: tuple | None, copies: list[Tensor]
    ) -> None:
        self._fixed, self._packs, self._weights = fixed, packs, weights
        self.copies = copies
        """Made of weights beside the packs of a call: a plan that has some must not outlive its call."""
        self._offsets: list[int | None] = []
        self._size = 0 if packs is None else packs.layout.size
        for size in scratch:
            self._offsets.append(self._size if size else None)
            self._size += round_up(size, ALIGNMENT)
        self._placed: _Placed | None = None

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        """``y``. Parameters are read at their addresses."""
        rest, shape, (eps, eps2), kind, tanh, sm90, row = self._fixed
        with device_of(x):
            memory = torch.empty(self._size, dtype=torch.uint8, device=x.device)
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            base, kernels, stream = memory.data_ptr(), loaded(), stream_of(x)
            placed = self._placed
            if placed is None or placed.base != base:  # the allocator mostly gives the same
                placed = self._placed = self._at(base)
            if placed.jobs is not None:
                kernels.pack_weights(*placed.jobs, stream)
            statistics, partial, a_tokens, u, a_channels = placed.scratch
            kernels.mixer_block_forward(
                (x.data_ptr(), *rest), shape, eps, eps2, *placed.weights, kind, tanh, limits_of(x), sm90, statistics,
                partial, a_tokens, u, a_channels, row, y.data_ptr(), stream,
            )  # fmt: skip
        return y

    def _at(self, base: int) -> _Placed:
        jobs, weights = None, self._weights
        if self._packs is not None:
            weights, *jobs = self._packs.at(base)
            jobs = tuple(jobs) if self._packs.layout.size else None
        return _Placed(base, jobs, weights, [0 if at is None else base + at for at in self._offsets])
