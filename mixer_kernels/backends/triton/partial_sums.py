"""Partial sums of kernels, added: those of all parameters of a half by one launch.

Each program of a kernel leaves float32 sums of its own, and here they are added in a fixed order: no atomics, two runs
agree bit for bit. The grid is dealt out among the sums, a few columns to a program::

    out [columns] = sum over rows of parts [rows, columns]      in float32, rounded once to the parameter's dtype
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Parts
from ..rounding import cdiv
from .launch import launch

SUMS = 8  # of one launch
ROWS, COLUMNS = 64, 64  # of a tile


@triton.jit
def _sum_of_parts(
    first, parts_ptr, out_ptr, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of one sum that are this program's, if any: its programs start at ``first``. Returns the next's."""
    programs = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) - first
    if (block >= 0) & (block < programs):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for r0 in range(0, rows, ROWS):
            row = r0 + tl.arange(0, ROWS)
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            sums += tl.load(parts_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + column, tl.sum(sums, 0).to(out_ptr.dtype.element_ty), mask=column < columns)
    return first + programs


@triton.jit
def _sum_parts_kernel(s0, s1, s2, s3, s4, s5, s6, s7, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What _sum_of_parts takes, or None."""
    first = _sum_of_parts(0, *s0, ROWS, COLUMNS)
    if s1 is not None:
        first = _sum_of_parts(first, *s1, ROWS, COLUMNS)
    if s2 is not None:
        first = _sum_of_parts(first, *s2, ROWS, COLUMNS)
    if s3 is not None:
        first = _sum_of_parts(first, *s3, ROWS, COLUMNS)
    if s4 is not None:
        first = _sum_of_parts(first, *s4, ROWS, COLUMNS)
    if s5 is not None:
        first = _sum_of_parts(first, *s5, ROWS, COLUMNS)
    if s6 is not None:
        first = _sum_of_parts(first, *s6, ROWS, COLUMNS)
    if s7 is not None:
        _sum_of_parts(first, *s7, ROWS, COLUMNS)


def sum_parts(sums: Sequence[Parts], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each of ``sums`` in its dtype; ``SUMS`` to a launch."""
    results = [
        torch.empty(each.parts.shape[1:], dtype=dtype, device=each.parts.device)
        for each, dtype in zip(sums, dtypes, strict=True)
    ]
    rows = [each.parts.flatten(1) for each in sums]
    for first in range(0, len(rows), SUMS):
        chosen = list(zip(rows, results, strict=True))[first : first + SUMS]
        arguments = [(parts, out, *parts.shape, parts.stride(0)) for parts, out in chosen]
        programs = sum(cdiv(parts.shape[1], COLUMNS) for parts, _ in chosen)
        launch(
            _sum_parts_kernel, programs, *arguments, *[None] * (SUMS - len(arguments)), ROWS=ROWS, COLUMNS=COLUMNS,
            num_warps=8,
        )  # fmt: skip
    return results
