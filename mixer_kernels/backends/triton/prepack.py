"""Which weights the Triton kernels take in which form; ``pack`` makes them.

Padding makes rows multiples of 16 bytes (196 bfloat16 tokens are 392 bytes, which no 16-byte load accepts) and spares
the kernels every mask on weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import GatedHalf, Half
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


class ProductWeights(NamedTuple):
    """Of a product of the channel half: fc1's ``wg``, ``wb`` where LayerNorm is folded, equation (8) of docs/maths.md,
    else its ``bias``, ``gamma``, ``beta``; of fc2 a bias alone."""

    right: Tensor  # [N, K_pad], zero-padded along K
    bias: Tensor | None = None  # [N]
    gamma: Tensor | None = None  # [K]
    beta: Tensor | None = None
    wg: Tensor | None = None  # [N] float32
    wb: Tensor | None = None
    scale: Tensor | None = None  # None for 1


def token_weights(packing: Packing, half: Half | GatedHalf, tokens: int, hidden: int, name: str = "") -> TokenWeights:
    """Weights and biases of ``half``, padded to ``tokens`` and ``hidden``.

    ``w_in`` of twice as many rows has values, then gates: each of both is padded.
    """
    return TokenWeights(
        *first_token_weights(packing, half, tokens, hidden, name),
        *packing.matrix_and_bias(f"{name}w2", half.w_out, half.b_out, tokens, hidden),
    )


def gated_mixing_weights(
    packing: Packing, half: GatedHalf, extent: int, hidden: int, name: str = ""
) -> GatedMixingWeights:
    """Weights and biases of ``half``, padded to ``extent`` and ``hidden``; the gate's may be None."""
    gate = (None, None)
    if half.w_gate is not None:
        gate = packing.matrix_and_bias(f"{name}w_gate", half.w_gate, half.b_gate, extent, extent)
    return GatedMixingWeights(*token_weights(packing, half, extent, hidden, name), *gate)


def first_token_weights(
    packing: Packing, half: Half | GatedHalf, tokens: int, hidden: int, name: str = ""
) -> tuple[Tensor, Tensor]:
    """``w_in`` and ``b_in`` alone."""
    is_glu = half.w_in.shape[0] == 2 * half.w_out.shape[1] > 0
    pack = packing.halves_and_bias if is_glu else packing.matrix_and_bias
    return pack(f"{name}w1", half.w_in, half.b_in, hidden, tokens)


def fc1_weights(packing: Packing, half: Half, stream: torch.dtype) -> ProductWeights:
    """``w_in [D_C, C]``, for a ``stream`` in which LayerNorm can be folded into it, or to be applied beside it."""
    gamma, beta, w3, b3, _, _ = half
    if stream is packing.dtype and stream.itemsize == 2:
        right, wg, wb, scale = packing.folded("w3", w3, b3, gamma, beta)
        return ProductWeights(right, wg=wg, wb=wb, scale=scale)
    return ProductWeights(product_weight(packing, "w3", w3), b3, gamma, beta)


def product_weight(packing: Packing, name: str, w: Tensor) -> Tensor:
    """``w [N, K]``, K padded to a multiple of ``K_MULTIPLE``."""
    return packing.matrix(name, w, w.shape[0], round_up(w.shape[1], K_MULTIPLE))


def transposed_weight(packing: Packing, name: str, w: Tensor) -> Tensor:
    """The transpose of ``w [K, M]``, both sides padded to multiples of ``2 * K_MULTIPLE``."""
    rows, columns = (round_up(extent, 2 * K_MULTIPLE) for extent in reversed(w.shape))
    return packing.transposed(name, w, rows, columns)
