"""All weights of a block as the kernels take them, by one launch: cast, zero-padded, transposed, LayerNorm folded.

Nothing outlives the call: whoever writes to a parameter, and however, the next call sees it. The grid is dealt out
among the matrices, a few rows to a program, which takes the elements of a vector along::

    out [rows padded, columns padded] = w [rows, columns]            or its transpose, by its strides
    W' = round(W3 * gamma * 2^k)                                     k of each row; 0 but in float16
    wg = sum over C of W',  wb = W3 . beta + b3                      equation (8) of docs/maths.md
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rounding import cdiv, round_up
from .launch import launch

K_MULTIPLE = 64  # no kernel steps along K by more: padded to this, weights need no mask
MATRICES = 6  # of one launch, beside the folded one: those of a PatchTSMixer layer
ROWS, COLUMNS = 4, 256  # of a tile
TRANSPOSED_ROWS, TRANSPOSED_COLUMNS = 32, 64  # so that rows of both the source and the result are whole sectors


@triton.jit
def _pack_rows(
    first, w_ptr, b_ptr, out_ptr, out_b_ptr, rows, columns, stride_row, stride_column, out_rows, out_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows of one matrix that are this program's, if any: its programs start at ``first``. Returns the next's."""
    programs = tl.cdiv(out_rows, ROWS)
    block = tl.program_id(0) - first
    if (block >= 0) & (block < programs):
        row = block * ROWS + tl.arange(0, ROWS)
        if out_ptr is not None:
            for c0 in range(0, out_columns, COLUMNS):
                column = c0 + tl.arange(0, COLUMNS)
                mask = (row < rows)[:, None] & (column < columns)[None, :]
                offs = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
                w = tl.load(w_ptr + offs, mask=mask, other=0.0)
                offs = row.to(tl.int64)[:, None] * out_columns + column[None, :]
                mask = (row < out_rows)[:, None] & (column < out_columns)[None, :]
                tl.store(out_ptr + offs, w.to(out_ptr.dtype.element_ty), mask=mask)
        if out_b_ptr is not None:
            b = tl.zeros((ROWS,), tl.float32)
            if b_ptr is not None:
                b = tl.load(b_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
            tl.store(out_b_ptr + row, b, mask=row < out_rows)
    return first + programs


@triton.jit
def _scaled_by_gamma(w_ptr, gamma_ptr, row, column, rows, columns, stride_row, stride_column):
    """W3 and gamma * W3 of a tile in float32, zero outside."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offs = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    folded = w
    if gamma_ptr is not None:
        folded *= tl.load(gamma_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return w, folded


@triton.jit
def _fold_rows(
    w_ptr, b_ptr, gamma_ptr, beta_ptr, out_ptr, wg_ptr, wb_ptr, scale_ptr, rows, columns, stride_row, stride_column,
    out_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W', its sums and the bias, for rows of W3 that are this program's, if any: its programs are the first ones."""
    programs = tl.cdiv(rows, ROWS)
    block = tl.program_id(0)
    if block < programs:
        row = block * ROWS + tl.arange(0, ROWS)
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if scale_ptr is not None:
            # A power of two keeps each row of W' among float16's normal numbers, however small gamma is.
            most = tl.full((ROWS,), 2.0**-100, tl.float32)
            for c0 in range(0, columns, COLUMNS):
                column = c0 + tl.arange(0, COLUMNS)
                _, folded = _scaled_by_gamma(
                    w_ptr, gamma_ptr, row, column, rows, columns, stride_row, stride_column
                )  # fmt: skip
                most = tl.maximum(most, tl.max(tl.abs(folded), 1))
            exponent = tl.minimum((most.to(tl.int32, bitcast=True) >> 23) - 126, 126)  # most < 2^exponent
            factor = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
            tl.store(scale_ptr + row, ((127 + exponent) << 23).to(tl.float32, bitcast=True), mask=row < rows)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        of_beta = tl.zeros((ROWS, COLUMNS), tl.float32)
        for c0 in range(0, out_columns, COLUMNS):
            column = c0 + tl.arange(0, COLUMNS)
            w, folded = _scaled_by_gamma(w_ptr, gamma_ptr, row, column, rows, columns, stride_row, stride_column)
            if beta_ptr is not None:
                of_beta += w * tl.load(beta_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
            folded = (folded * factor[:, None]).to(out_ptr.dtype.element_ty)
            sums += folded.to(tl.float32)  # the rounded ones: the mean that the product adds is the one taken away
            offs = row.to(tl.int64)[:, None] * out_columns + column[None, :]
            tl.store(out_ptr + offs, folded, mask=(row < rows)[:, None] & (column < out_columns)[None, :])
        wb = tl.sum(of_beta, 1)
        if b_ptr is not None:
            wb += tl.load(b_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(wg_ptr + row, tl.sum(sums, 1), mask=row < rows)
        tl.store(wb_ptr + row, wb, mask=row < rows)
    return programs


@triton.jit
def _pack_kernel(fold, m0, m1, m2, m3, m4, m5, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What _fold_rows and _pack_rows take, or None: of absent matrices a launch has no arguments to look at."""
    first = 0
    if fold is not None:
        first = _fold_rows(*fold, ROWS, COLUMNS)
    if m0 is not None:
        first = _pack_rows(first, *m0, ROWS, COLUMNS)
    if m1 is not None:
        first = _pack_rows(first, *m1, ROWS, COLUMNS)
    if m2 is not None:
        first = _pack_rows(first, *m2, ROWS, COLUMNS)
    if m3 is not None:
        first = _pack_rows(first, *m3, ROWS, COLUMNS)
    if m4 is not None:
        first = _pack_rows(first, *m4, ROWS, COLUMNS)
    if m5 is not None:
        _pack_rows(first, *m5, ROWS, COLUMNS)


class Packing:
    """The weights of one call in ``dtype``: ask for each, then ``run``, which fills them all by one launch.

    What is in ``kept``, by name, was packed before and is taken as it is; ``made`` has what was packed now.
    """

    def __init__(self, dtype: torch.dtype, kept: Mapping[str, Tensor] | None = None) -> None:
        self.dtype = dtype
        self.made: dict[str, Tensor] = {}
        self._kept = kept or {}
        self._matrices: list[tuple] = []
        self._fold: tuple | None = None
        self._is_transposed = False

    def matrix(self, name: str, w: Tensor, rows: int, columns: int) -> Tensor:
        """``w``, zero-padded to ``[rows, columns]``; itself if that is what it is."""
        return self._ask(name, w, None, rows, columns, with_bias=False)[0]

    def matrix_and_bias(self, name: str, w: Tensor, b: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The same, and ``b``, float32, padded to ``rows``: zeros where there is none."""
        return self._ask(name, w, b, rows, columns, with_bias=True)

    def halves_and_bias(self, name: str, w: Tensor, b: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """``w`` of values, then gates, each half padded to ``rows``: ``[2 * rows, columns]`` and ``[2 * rows]``."""
        wide, vector = (
            self._new(f"{name}.{part}", shape, dtype, w)
            for part, shape, dtype in (("w", (2 * rows, columns), self.dtype), ("b", (2 * rows,), torch.float32))
        )
        parts = zip(
            w.chunk(2), (None, None) if b is None else b.chunk(2), wide[0].chunk(2), vector[0].chunk(2), strict=True
        )
        if not (wide[1] and vector[1]):
            for half, bias, out, out_bias in parts:
                self._add(half, bias, out, out_bias, rows)
        return wide[0], vector[0]

    def transposed(self, name: str, w: Tensor, rows: int, columns: int) -> Tensor:
        """The transpose of ``w``, zero-padded to ``[rows, columns]``."""
        self._is_transposed = True
        return self._ask(name, w.t(), None, rows, columns, with_bias=False)[0]

    def folded(
        self, name: str, w3: Tensor, b3: Tensor | None, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """W', wg, wb and scale, 2^-k or None for 1, of ``w3 [D_C, C]`` and LayerNorm's ``gamma`` and ``beta``; one to a
        launch."""
        (rows, columns), wide = w3.shape, round_up(w3.shape[1], K_MULTIPLE)
        out, is_kept = self._new(f"{name}.folded", (rows, wide), self.dtype, w3)  # beside w3 as it is
        wanted = ("wg", "wb", "scale") if self.dtype is torch.float16 else ("wg", "wb")
        vectors = [self._new(f"{name}.{part}", (rows,), torch.float32, w3) for part in wanted]
        folded = (out, *(vector for vector, _ in vectors), *(None,) * (3 - len(wanted)))
        if not (is_kept and all(known for _, known in vectors)):
            vectors = [None if v is None else v.contiguous() for v in (b3, gamma, beta)]
            self._fold = (w3, *vectors, *folded, rows, columns, *w3.stride(), wide)
        return folded

    def run(self) -> None:
        """Fill all that was asked for."""
        if not self._matrices and self._fold is None:
            return
        tile = (TRANSPOSED_ROWS, TRANSPOSED_COLUMNS) if self._is_transposed else (ROWS, COLUMNS)
        rows = [matrix[8] for matrix in self._matrices] + ([] if self._fold is None else [self._fold[8]])
        programs = sum(cdiv(height, tile[0]) for height in rows)
        matrices = self._matrices + [None] * (MATRICES - len(self._matrices))
        launch(_pack_kernel, programs, self._fold, *matrices, ROWS=tile[0], COLUMNS=tile[1], num_warps=4)

    def _ask(
        self, name: str, w: Tensor, b: Tensor | None, rows: int, columns: int, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = out_b = None
        wide, vector = w, b
        if not self._fits(w, self.dtype, (rows, columns)):
            wide, is_kept = self._new(f"{name}.w", (rows, columns), self.dtype, w)
            out = None if is_kept else wide
        if with_bias and (b is None or not self._fits(b, torch.float32, (rows,))):
            vector, is_kept = self._new(f"{name}.b", (rows,), torch.float32, w)
            out_b = None if is_kept else vector
        if out is not None or out_b is not None:
            self._add(w, b, out, out_b, rows)
        return wide, vector

    def _add(self, w: Tensor, b: Tensor | None, out: Tensor | None, out_b: Tensor | None, rows: int) -> None:
        columns, b = 0 if out is None else out.shape[1], None if b is None else b.contiguous()
        self._matrices.append((w, b, out, out_b, *w.shape, *w.stride(), rows, columns))

    @staticmethod
    def _fits(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        # Kernels load whole vectors of 16 bytes, and tensor descriptors start on 16 bytes.
        return t.dtype is dtype and t.shape == shape and t.is_contiguous() and t.data_ptr() % 16 == 0

    def _new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> tuple[Tensor, bool]:
        """Memory for a pack, or the pack itself if it was kept; and whether it was."""
        name = f"{name} {tuple(shape)}"
        kept = self._kept.get(name)
        if kept is not None and kept.dtype is dtype and kept.device == like.device:
            return kept, True
        new = self.made[name] = torch.empty(shape, dtype=dtype, device=like.device)
        return new, False
