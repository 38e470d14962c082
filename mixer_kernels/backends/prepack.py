"""Prepacked weights, once per parameter version at inference: the cache that backends with kernels share.

Packs are kept per parameter and remade when any of their sources changed: another storage, shape, dtype or version
counter, which every in-place write, optimizer step, ``load_state_dict`` and ``.to()`` bumps or replaces. A write
through ``.data``, a replayed CUDA graph and a compiled step of a fused optimizer bump nothing and cannot be seen;
``forget_packs()`` is for them. While a CUDA graph is captured, packing is captured along, so that replays follow the
weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .rounding import round_up

K_MULTIPLE = 64  # no kernel steps along K by more: padded to this, weights need no mask


class FoldedWeights(NamedTuple):
    """fc1 of channel mixing with LayerNorm folded in, equation (8) of docs/maths.md."""

    w3: Tensor  # [D_C, C_pad]: W' = round(W3 * gamma * 2^k)
    wg: Tensor  # [D_C] float32: sum over C of W'
    wb: Tensor  # [D_C] float32: W3 . beta + b3
    scale: Tensor | None  # [D_C] float32: 2^-k, or None for 1


class _Pack(NamedTuple):
    sources: tuple[Any, ...]
    weights: Any
    ready: torch.cuda.Event | None
    stream: torch.cuda.Stream | None


_packs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget_packs() -> None:
    """Drop all prepacked weights."""
    _packs.clear()


def packed(key: tuple[Any, ...], tensors: tuple[Tensor | None, ...], pack: Callable[[], Any]) -> Any:
    """``pack()`` of ``tensors``, a tensor or a tuple, kept under the first of them and ``key``, which names the backend
    and all else that the pack depends on. It must not hold a parameter itself: it would keep its own key alive."""
    owner = tensors[0]
    on_gpu = owner.device.type == "cuda"
    if (
        owner.device.type == "meta"
        or any(t is not None and t.is_inference() for t in tensors)  # those have no version counter
        or (on_gpu and torch.cuda.is_current_stream_capturing())
    ):
        return pack()
    _count_optimizer_steps()
    sources = tuple(None if t is None else _identity(t) for t in tensors)
    packs = _packs.setdefault(owner, {})
    entry = packs.get(key)
    if entry is None or entry.sources != sources:
        with torch.no_grad():
            weights = pack()
        stream = torch.cuda.current_stream(owner.device) if on_gpu else None
        entry = packs[key] = _Pack(sources, weights, stream.record_event() if on_gpu else None, stream)
    elif on_gpu:
        _wait(entry, torch.cuda.current_stream(owner.device))
    return entry.weights


def fold_norm(
    w3: Tensor, b3: Tensor | None, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> FoldedWeights:
    """``w3 [D_C, C]`` with ``gamma`` folded into it. ``wg`` sums the *rounded* W', so that the mean that the product
    adds is exactly the mean that the epilogue takes away."""
    w = w3.float() if gamma is None else w3.float() * gamma.float()
    scale = None
    if dtype is torch.float16:
        # Powers of two keep each row of W' among float16's normal numbers, however small gamma is.
        _, exponent = torch.frexp(w.abs().amax(1).clamp(min=2.0**-100))
        w = torch.ldexp(w, -exponent[:, None])
        scale = torch.ldexp(torch.ones_like(w[:, 0]), exponent)
    folded = padded(w, w.shape[0], round_up(w.shape[1], K_MULTIPLE), dtype)
    wb = torch.zeros(w.shape[0], device=w.device) if b3 is None else b3.float()
    if beta is not None:
        wb = wb + (w3.float() * beta.float()).sum(1)
    return FoldedWeights(folded, folded.float().sum(1), wb, scale)


def padded(w: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``w`` in ``dtype``, zero-padded to ``[rows, columns]``; a weight that needs nothing is passed on as it is."""
    if w.shape == (rows, columns):
        # detached: a pack that held the parameter itself would keep its own key alive
        return w.detach().to(dtype).contiguous()
    wide = torch.zeros(rows, columns, dtype=dtype, device=w.device)
    wide[: w.shape[0], : w.shape[1]] = w
    return wide


@functools.cache
def _count_optimizer_steps() -> None:
    """Have every optimizer's step raise the version counters of what it wrote: PyTorch's fused ones do not.

    Once, and only when there is a pack that could go stale: importing has no side effects.
    """
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                increment_version(parameter)


def _identity(t: Tensor) -> tuple[Any, ...]:
    # The weak reference keeps the address of the storage's record from being used again, not the memory itself.
    return (StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)


def _wait(entry: _Pack, stream: torch.cuda.Stream) -> None:
    """Order ``stream`` behind the packing, where another stream did that."""
    if stream == entry.stream:
        return
    stream.wait_event(entry.ready)
    for t in entry.weights if isinstance(entry.weights, tuple) else (entry.weights,):
        if isinstance(t, Tensor):
            t.record_stream(stream)
