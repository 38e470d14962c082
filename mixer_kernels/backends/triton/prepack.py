"""Weights as the Triton kernels take them: cast to the dtype of the products, zero-padded, folded; kept as packs.

Padding makes rows multiples of 16 bytes (196 bfloat16 tokens are 392 bytes, which no 16-byte load accepts) and spares
the kernels every mask on weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..prepack import K_MULTIPLE, FoldedWeights, fold_norm, packed, padded
from ..rounding import round_up


class TokenWeights(NamedTuple):
    """Weights of token mixing for ``S_pad`` tokens and ``D_pad`` hidden units."""

    w1: Tensor  # [D_pad, S_pad]; with gates [2 * D_pad, S_pad]
    b1: Tensor  # [D_pad] float32; with gates [2 * D_pad]
    w2: Tensor  # [S_pad, D_pad]
    b2: Tensor  # [S_pad] float32


def token_weights(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dtype: torch.dtype, tokens: int, hidden: int
) -> TokenWeights:
    """``w1 [D_S, S]``, ``w2 [S, D_S]`` and their biases, padded to ``tokens`` and ``hidden``.

    ``w1`` of twice as many rows has values, then gates: each of both is padded.
    """

    gated = w1.shape[0] == 2 * w2.shape[1] > 0

    def pack() -> TokenWeights:
        return TokenWeights(
            _padded_halves(w1, hidden, tokens, dtype) if gated else padded(w1, hidden, tokens, dtype),
            _padded_bias(b1, hidden, w1.device, halves=1 + gated),
            padded(w2, tokens, hidden, dtype),
            _padded_bias(b2, tokens, w2.device),
        )

    return packed(("triton", "token", dtype, tokens, hidden), (w1, b1, w2, b2), pack)


def folded_weights(
    w3: Tensor, b3: Tensor | None, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> FoldedWeights:
    """``w3 [D_C, C]`` with ``gamma`` folded into it."""
    return packed(("triton", "folded", dtype), (w3, b3, gamma, beta), lambda: fold_norm(w3, b3, gamma, beta, dtype))


def product_weight(w: Tensor, dtype: torch.dtype) -> Tensor:
    """``w [N, K]`` in ``dtype``, K padded to a multiple of ``K_MULTIPLE``."""
    columns = round_up(w.shape[1], K_MULTIPLE)
    return packed(("triton", "product", dtype), (w,), lambda: padded(w, w.shape[0], columns, dtype))


def transposed_weight(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose of ``w [K, M]`` in ``dtype``, both sides padded to multiples of ``2 * K_MULTIPLE``."""
    rows, columns = (round_up(extent, 2 * K_MULTIPLE) for extent in reversed(w.shape))
    return packed(("triton", "transposed", dtype), (w,), lambda: padded(w.t(), rows, columns, dtype))


def square_weight(w: Tensor, b: Tensor | None, dtype: torch.dtype, extent: int) -> tuple[Tensor, Tensor]:
    """``w [K, K]`` and ``b [K]`` (float32), padded to ``extent``."""

    def pack() -> tuple[Tensor, Tensor]:
        return padded(w, extent, extent, dtype), _padded_bias(b, extent, w.device)

    return packed(("triton", "square", dtype, extent), (w, b), pack)


def _padded_halves(w: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([padded(half, rows, columns, dtype) for half in w.chunk(2)])


def _padded_bias(b: Tensor | None, length: int, device: torch.device, halves: int = 1) -> Tensor:
    wide = torch.zeros(halves, length, dtype=torch.float32, device=device)
    if b is not None:
        wide[:, : b.shape[0] // halves] = b.view(halves, -1)
    return wide.flatten()
