"""Weights as the CUDA kernels take them: cast, zero-padded, transposed by one launch each; LayerNorm folded. What
a half takes holds beside its tensors the tuple that ``_C`` takes, so that a call builds none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..prepack import fold_norm
from ..rounding import round_up
from .library import TYPES, loaded, pointer, stream_of


class TokenWeights(NamedTuple):
    """Weights of the token half, for the fused kernel, for that of csrc/sm90 or for the two products."""

    w1: Tensor  # [D, S_pad] (fused), [S_pad, D] (sm90: its transpose), [D_S, S_pad]
    b1: Tensor  # [D] float32 (fused), [D_S]
    w2: Tensor  # [S_pad, D] (fused), [S, D_pad]
    b2: Tensor  # [S_pad] float32 (fused), [S]
    gamma: Tensor | None  # [C] float32
    beta: Tensor | None
    arguments: tuple[int, ...]


class FirstWeights(NamedTuple):
    """fc1 of the channel half; ``wg``, ``wb`` where LayerNorm is folded, else ``b3``, ``gamma``, ``beta``."""

    w3: Tensor  # [D_C, C_pad]
    b3: Tensor | None  # [D_C] float32
    wg: Tensor | None  # [D_C] float32
    wb: Tensor | None
    scale: Tensor | None
    gamma: Tensor | None  # [C] float32
    beta: Tensor | None
    arguments: tuple[int, ...]


class SecondWeights(NamedTuple):
    """fc2 of the channel half."""

    w4: Tensor  # [C, D_pad]
    b4: Tensor | None  # [C] float32
    arguments: tuple[int, ...]


def token_weights(
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dtype: torch.dtype,
    sm90: bool,
) -> TokenWeights:
    """All that the forward pass of the token half takes, in ``dtype``; ``sm90``: for the kernel of csrc/sm90."""

    def pack() -> TokenWeights:
        kernels = loaded()
        hidden, tokens = w1.shape
        padded_tokens = kernels.sm90_padded_tokens(tokens) if sm90 else kernels.padded_tokens(tokens)
        if padded_tokens:
            wide_hidden = round_up(hidden, kernels.SM90_HIDDEN_MULTIPLE if sm90 else kernels.HIDDEN_MULTIPLE)
            sizes = (padded_tokens, wide_hidden) if sm90 else (wide_hidden, padded_tokens)
            tensors = (
                pack_weight(w1, dtype, *sizes, transposed=sm90),
                _vector(b1, wide_hidden, w1),
                pack_weight(w2, dtype, padded_tokens, wide_hidden),
                _vector(b2, padded_tokens, w2),
            )
        else:
            wide_hidden, padded_tokens = hidden, round_up(tokens, kernels.K_MULTIPLE)
            tensors = (
                pack_weight(w1, dtype, hidden, padded_tokens),
                _vector(b1, hidden, w1),
                pack_weight(w2, dtype, tokens, round_up(hidden, kernels.K_MULTIPLE)),
                _vector(b2, tokens, w2),
            )
        tensors = (*tensors, _vector(gamma), _vector(beta))
        return TokenWeights(*tensors, (hidden, wide_hidden, padded_tokens, *map(pointer, tensors), int(sm90)))

    return pack()


def fc1_weights(
    gamma: Tensor | None, beta: Tensor | None, w3: Tensor, b3: Tensor | None, dtype: torch.dtype, folded: bool
) -> FirstWeights:
    """All that the first product of the channel half takes, in ``dtype``."""

    def pack() -> FirstWeights:
        hidden, channels = w3.shape
        if folded:
            fold = fold_norm(w3, b3, gamma, beta, dtype)
            tensors = (fold.w3, None, fold.wg, fold.wb.detach(), fold.scale, None, None)
        else:
            wide = pack_weight(w3, dtype, hidden, round_up(channels, loaded().K_MULTIPLE))
            tensors = (wide, _vector(b3), None, None, None, _vector(gamma), _vector(beta))
        return FirstWeights(*tensors, (hidden, *map(pointer, tensors)))

    return pack()


def fc2_weights(w4: Tensor, b4: Tensor | None, dtype: torch.dtype) -> SecondWeights:
    """All that the second product of the channel half takes, in ``dtype``."""

    def pack() -> SecondWeights:
        channels, hidden = w4.shape
        tensors = (pack_weight(w4, dtype, channels, round_up(hidden, loaded().K_MULTIPLE)), _vector(b4))
        return SecondWeights(*tensors, tuple(map(pointer, tensors)))

    return pack()


def transposed_weight(w: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """The transpose of ``w [K, M]`` in ``dtype``, padded to ``[rows, columns]``."""
    return pack_weight(w, dtype, rows, columns, transposed=True)


def float_vector(v: Tensor | None) -> Tensor | None:
    """``v`` in float32: gamma, beta and biases of 16 bits are converted once."""
    if v is None or v.dtype is torch.float32 and v.is_contiguous():
        return v
    return _vector(v)


def pack_weight(w: Tensor, dtype: torch.dtype, rows: int, columns: int, transposed: bool = False) -> Tensor:
    """``w`` (or its transpose) in ``dtype``, zero-padded to ``[rows, columns]``; itself if that is what it is."""
    w = w.detach()
    if w.dtype not in TYPES:
        w = w.float()
    w = w.contiguous()
    if w.dtype is dtype and not transposed and w.shape == (rows, columns) and w.data_ptr() % 16 == 0:
        return w
    wide = torch.empty(rows, columns, dtype=dtype, device=w.device)
    source = (pointer(w), TYPES[w.dtype], *w.shape)
    loaded().pack_weight(*source, transposed, pointer(wide), TYPES[dtype], rows, columns, stream_of(w))
    return wide


def _vector(v: Tensor | None, length: int | None = None, like: Tensor | None = None) -> Tensor | None:
    """``v`` in float32, zero-padded to ``length``; zeros in place of None where a length is asked for."""
    if v is None:
        return None if length is None else torch.zeros(length, dtype=torch.float32, device=like.device)
    length = v.shape[0] if length is None else length
    return pack_weight(v[None], torch.float32, 1, length)[0]
