"""LayerNorm folded into fc1 of channel mixing by plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import round_up

K_MULTIPLE = 64  # no kernel steps along K by more: padded to this, weights need no mask


class FoldedWeights(NamedTuple):
    """fc1 of channel mixing with LayerNorm folded in, equation (8) of docs/maths.md."""

    w3: Tensor  # [D_C, C_pad]: W' = round(W3 * gamma * 2^k)
    wg: Tensor  # [D_C] float32: sum over C of W'
    wb: Tensor  # [D_C] float32: W3 . beta + b3
    scale: Tensor | None  # [D_C] float32: 2^-k, or None for 1


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
        return w.detach().to(dtype).contiguous()
    wide = torch.zeros(rows, columns, dtype=dtype, device=w.device)
    wide[: w.shape[0], : w.shape[1]] = w
    return wide
