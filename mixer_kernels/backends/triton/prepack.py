"""Weight prepacking: cast to the dtype of the products, zero-pad, fold. Once per parameter version at inference.

Padding makes rows multiples of 16 bytes (196 bfloat16 tokens are 392 bytes, which no 16-byte load accepts) and spares
the kernels every mask on weights. A weight that needs nothing is passed on as it is.

Packs are kept per parameter and remade when any of their sources changed: another storage, shape, dtype or version
counter, which every in-place write, optimizer step, ``load_state_dict`` and ``.to()`` bumps or replaces. A write
through ``.data``, a replayed CUDA graph and a compiled step of a fused optimizer bump nothing and cannot be seen;
``forget_packs()`` is for them. While a CUDA graph is captured,
packing is captured along, so that replays follow the weights.
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

from .launch import round_up


class TokenWeights(NamedTuple):
    """Weights of token mixing for ``S_pad`` tokens and ``D_pad`` hidden units."""

    w1: Tensor  # [D_pad, S_pad]
    b1: Tensor  # [D_pad] float32
    w2: Tensor  # [S_pad, D_pad]
    b2: Tensor  # [S_pad] float32


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

K_MULTIPLE = 64  # no kernel steps along K by more: padded to this, weights need no mask


def forget_packs() -> None:
    """Drop all prepacked weights."""
    _packs.clear()


def token_weights(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dtype: torch.dtype, tokens: int, hidden: int
) -> TokenWeights:
    """``w1 [D_S, S]``, ``w2 [S, D_S]`` and their biases, padded to ``tokens`` and ``hidden``."""

    def pack() -> TokenWeights:
        return TokenWeights(
            _padded(w1, hidden, tokens, dtype),
            _padded_bias(b1, hidden, w1.device),
            _padded(w2, tokens, hidden, dtype),
            _padded_bias(b2, tokens, w2.device),
        )

    return _packed(("token", dtype, tokens, hidden), (w1, b1, w2, b2), pack)


def folded_weights(
    w3: Tensor, b3: Tensor | None, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> FoldedWeights:
    """``w3 [D_C, C]`` with ``gamma`` folded into it. ``wg`` sums the *rounded* W', so that the mean that the product
    adds is exactly the mean that the epilogue takes away."""

    def pack() -> FoldedWeights:
        w = w3.float() if gamma is None else w3.float() * gamma.float()
        scale = None
        if dtype is torch.float16:
            # Powers of two keep each row of W' among float16's normal numbers, however small gamma is.
            _, exponent = torch.frexp(w.abs().amax(1).clamp(min=2.0**-100))
            w = torch.ldexp(w, -exponent[:, None])
            scale = torch.ldexp(torch.ones_like(w[:, 0]), exponent)
        folded = _padded(w, w.shape[0], round_up(w.shape[1], K_MULTIPLE), dtype)
        wb = torch.zeros(w.shape[0], device=w.device) if b3 is None else b3.float()
        if beta is not None:
            wb = wb + (w3.float() * beta.float()).sum(1)
        return FoldedWeights(folded, folded.float().sum(1), wb, scale)

    return _packed(("folded", dtype), (w3, b3, gamma, beta), pack)


def product_weight(w: Tensor, dtype: torch.dtype) -> Tensor:
    """``w [N, K]`` in ``dtype``, K padded to a multiple of ``K_MULTIPLE``."""
    return _packed(("product", dtype), (w,), lambda: _padded(w, w.shape[0], round_up(w.shape[1], K_MULTIPLE), dtype))


def transposed_weight(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of ``w [K, M]`` in ``dtype``, both sides padded to multiples of ``2 * K_MULTIPLE``."""

    def pack() -> Tensor:
        rows, columns = (round_up(extent, 2 * K_MULTIPLE) for extent in reversed(w.shape))
        return _padded(w.t(), rows, columns, dtype)

    return _packed(("transposed", dtype), (w,), pack)


def _padded(w: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if w.shape == (rows, columns):
        # detached: a pack that held the parameter itself would keep its own key alive
        return w.detach().to(dtype).contiguous()
    padded = torch.zeros(rows, columns, dtype=dtype, device=w.device)
    padded[: w.shape[0], : w.shape[1]] = w
    return padded


def _padded_bias(b: Tensor | None, length: int, device: torch.device) -> Tensor:
    padded = torch.zeros(length, dtype=torch.float32, device=device)
    if b is not None:
        padded[: b.shape[0]] = b
    return padded


def _packed(key: tuple[Any, ...], tensors: tuple[Tensor | None, ...], pack: Callable[[], Any]) -> Any:
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
        if t is not None:
            t.record_stream(stream)
