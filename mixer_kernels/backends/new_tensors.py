"""The tensors that a call makes: results, statistics, hidden units."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Options
from .rounding import round_up


def new_like(x: Tensor) -> Tensor:
    """A contiguous tensor of ``x``'s shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # torch.empty takes twice the time


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of the rows of ``x [B, S, C]``; not views of one tensor: an operator's results share no memory."""
    rows = x.shape[0] * x.shape[1]
    return tuple(torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))


def new_z(x: Tensor, width: int, options: Options) -> Tensor:
    """z ``[B * S, width]`` of ``x [B, S, C]``, with SwiGLU ``[B * S, 2, width / 2]``, rows aligned."""
    rows = x.shape[0] * x.shape[1]
    if not options.glu:
        return aligned_rows(rows, width, options.dtype, x.device)
    return aligned_rows(2 * rows, width // 2, options.dtype, x.device).unflatten(0, (rows, 2))


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, columns]`` whose rows start on 16 bytes, for wide loads and tensor descriptors."""
    return torch.empty(rows, round_up(columns, 16 // dtype.itemsize), dtype=dtype, device=device)[:, :columns]
