"""Which weights the Triton kernels take in which form; ``pack`` makes them.

Padding makes rows multiples of 16 bytes (196 bfloat16 tokens are 392 bytes, which no 16-byte load accepts) and spares
the kernels every mask on weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rounding import round_up
from .pack import K_MULTIPLE, Packing


class TokenWeights(NamedTuple):
    """Weights of token mixing for ``S_pad`` tokens and ``D_pad`` hidden units."""

    w1: Tensor  # [D_pad, S_pad]; with gates [2 * D_pad, S_pad]
    b1: Tensor  # [D_pad] float32; with gates [2 * D_pad]
    w2: Tensor  # [S_pad, D_pad]
    b2: Tensor  # [S_pad] float32


class GatedMixingWeights(NamedTuple):
    """Weights of one mixer of a PatchTSMixer, for ``K`` places and ``H`` hidden units, both padded."""

    w1: Tensor  # [H, K]
    b1: Tensor  # [H] float32
    w2: Tensor  # [K, H]
    b2: Tensor  # [K] float32
    w_gate: Tensor | None  # [K, K]
    b_gate: Tensor | None  # [K] float32


class FirstWeights(NamedTuple):
    """fc1 of the channel half: ``wg``, ``wb`` where LayerNorm is folded, else ``bias``, ``gamma``, ``beta``."""

    right: Tensor  # [D_C, C_pad]
    bias: Tensor | None = None  # [D_C]
    gamma: Tensor | None = None  # [C]
    beta: Tensor | None = None
    wg: Tensor | None = None  # [D_C] float32
    wb: Tensor | None = None
    scale: Tensor | None = None


def token_weights(
    packing: Packing, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tokens: int, hidden: int,
    name: str = "",
) -> TokenWeights:  # fmt: skip
    """``w1 [D_S, S]``, ``w2 [S, D_S]`` and their biases, padded to ``tokens`` and ``hidden``.

    ``w1`` of twice as many rows has values, then gates: each of both is padded.
    """
    return TokenWeights(
        *first_token_weights(packing, w1, b1, w2, tokens, hidden, name),
        *packing.matrix_and_bias(f"{name}w2", w2, b2, tokens, hidden),
    )


def gated_mixing_weights(
    packing: Packing, parameters: Sequence[Tensor | None], extent: int, hidden: int, name: str = ""
) -> GatedMixingWeights:
    """``w1, b1, w2, b2, w_gate, b_gate``, padded to ``extent`` and ``hidden``; the last two may be None."""
    *mlp, w_gate, b_gate = parameters
    gate = (None, None)
    if w_gate is not None:
        gate = packing.matrix_and_bias(f"{name}w_gate", w_gate, b_gate, extent, extent)
    return GatedMixingWeights(*token_weights(packing, *mlp, extent, hidden, name), *gate)


def first_token_weights(
    packing: Packing, w1: Tensor, b1: Tensor | None, w2: Tensor, tokens: int, hidden: int, name: str = ""
) -> tuple[Tensor, Tensor]:
    """``w1`` and ``b1`` alone."""
    is_gated = w1.shape[0] == 2 * w2.shape[1] > 0
    pack = packing.halves_and_bias if is_gated else packing.matrix_and_bias
    return pack(f"{name}w1", w1, b1, hidden, tokens)


def fc1_weights(
    packing: Packing, gamma: Tensor | None, beta: Tensor | None, w3: Tensor, b3: Tensor | None, stream: torch.dtype
) -> FirstWeights:
    """``w3 [D_C, C]``, for a ``stream`` in which LayerNorm can be folded into it, or to be applied beside it."""
    if stream is packing.dtype and stream.itemsize == 2:
        folded = packing.folded("w3", w3, b3, gamma, beta)
        return FirstWeights(folded.w3, wg=folded.wg, wb=folded.wb, scale=folded.scale)
    return FirstWeights(product_weight(packing, "w3", w3), b3, gamma, beta)


def product_weight(packing: Packing, name: str, w: Tensor) -> Tensor:
    """``w [N, K]``, K padded to a multiple of ``K_MULTIPLE``."""
    return packing.matrix(name, w, w.shape[0], round_up(w.shape[1], K_MULTIPLE))


def transposed_weight(packing: Packing, name: str, w: Tensor) -> Tensor:
    """The transpose of ``w [K, M]``, both sides padded to multiples of ``2 * K_MULTIPLE``."""
    rows, columns = (round_up(extent, 2 * K_MULTIPLE) for extent in reversed(w.shape))
    return packing.transposed(name, w, rows, columns)
