"""Triton's interpreter builder with bfloat16, TF32 and checked memory; only imported by `install()`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from . import bfloat16
from .errors import Int32Overflow
from .memory import LaunchMemory

Handle = stock.TensorHandle

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
INTEGER_OPS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

POISON_INTEGER = -1_048_573
"""In masked lanes of 32 and 64 bits: as an index it is out of bounds, times a row stride it doesn't overflow int32."""


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def to_float32(handle: Any) -> np.ndarray:
    return bfloat16.decode(handle.data) if is_bf16(handle) else handle.data.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, dtype: Any) -> Any:
    """Round float32 values to a 16- or 32-bit float type."""
    if dtype.scalar == tl.bfloat16:
        return Handle(bfloat16.encode(values), tl.bfloat16)
    return Handle(np.asarray(values).astype(stock._get_np_dtype(dtype.scalar), copy=False), dtype.scalar)


def poison(dtype: Any) -> Any:
    """What a masked lane of a load without `other` holds: NaN, or an integer that stands out."""
    if dtype.is_fp8():
        return 0x7F
    if dtype == tl.bfloat16:
        return bfloat16.NAN
    if dtype.is_floating():
        return np.nan
    if isinstance(dtype, tl.pointer_type):
        return 0
    bits = dtype.primitive_bitwidth
    if bits == 1:
        return True
    value = POISON_INTEGER if bits >= 32 else {8: -101, 16: -30_051}[bits]
    return value % 2**bits if dtype.is_int_unsigned() else value


class StrictSemantic(TritonSemantic):
    """Integer add, sub and mul of up to 32 bits raise where the compiled kernel would wrap."""

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.shape is rhs.shape:  # the same result in no time: most operations meet equal shapes
            return lhs, rhs
        return super().broadcast_impl_value(lhs, rhs)

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        ty = lhs.type.scalar
        if ty.int_bitwidth >= 64 or ty.is_bool():
            return
        a, b = lhs.handle.data, rhs.handle.data
        wide = INTEGER_OPS[binary_op.__name__](a.astype(np.int64), b.astype(np.int64))
        low, high = ty.get_int_min_value(), ty.get_int_max_value()
        if wide.size and (wide.min() < low or wide.max() > high):
            lane = int(np.argmax((wide < low) | (wide > high)))
            operands = [int(np.broadcast_to(x, wide.shape).flat[lane]) for x in (a, b)]
            raise Int32Overflow(
                f"{self.builder.launch.where()}: {ty} overflow: {binary_op.__name__}({operands[0]}, {operands[1]}) "
                f"is {int(wide.flat[lane])} (lane {lane}); make an operand int64 first"
            )


class StrictBuilder(stock.InterpreterBuilder):
    launch: LaunchMemory | None = None
    _atomic = False

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self.launch.set_grid((int(nx), int(ny), int(nz)))

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.launch.program = (x, y, z)

    # memory

    def _access(self, kind: str, pointers: Any, mask: np.ndarray) -> Any:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return Handle(self.launch.access(kind, pointers.data, mask, itemsize), pointers.dtype)

    @contextmanager
    def _atomically(self) -> Iterator[None]:
        self._atomic = True
        try:
            yield
        finally:
            self._atomic = False

    def create_masked_load(self, ptrs, mask, other, cache_policy=None, is_volatile=False):
        real = self._access("atomic" if self._atomic else "load", ptrs, mask.data)
        if other is None and not mask.data.all():
            dtype = ptrs.get_element_ty()
            other = Handle(np.full(ptrs.data.shape, poison(dtype), dtype=stock._get_np_dtype(dtype)), dtype)
        return super().create_masked_load(real, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_policy=None):
        real = self._access("atomic" if self._atomic else "store", ptrs, mask.data)
        return super().create_masked_store(real, value, mask, cache_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        return super().create_atomic_rmw(rmwOp, self._access("atomic", ptr, mask.data), val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        real = self._access("atomic", ptr, np.ones(ptr.data.shape, bool))
        return super().create_atomic_cas(real, cmp, val, sem, scope)

    def create_atomic_load(self, *args):
        with self._atomically():
            return super().create_atomic_load(*args)

    def create_atomic_store(self, *args):
        with self._atomically():
            return super().create_atomic_store(*args)

    def create_atomic_poll(self, *args):
        with self._atomically():
            return super().create_atomic_poll(*args)

    def create_descriptor_load(self, desc, indices, cache_policy):
        result = super().create_descriptor_load(desc, indices, cache_policy)
        if desc.padding == stock._ir.PADDING_OPTION.PAD_NAN and is_bf16(result):
            _, mask = desc.materialize_pointers(indices)  # stock pads bfloat16 with an integer cast of NaN
            result = Handle(np.where(mask.data, result.data, bfloat16.NAN), tl.bfloat16)
        return result

    # numbers

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if is_bf16(src) and target != tl.bfloat16:
            return Handle(bfloat16.decode(src.data).astype(stock._get_np_dtype(target)), target)
        if target == tl.bfloat16 and not is_bf16(src):
            return Handle(bfloat16.encode(src.data), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        pair = (src.dtype.scalar, dst_type.scalar)
        toward_zero = rounding_mode == stock._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in pair and not toward_zero and min(t.primitive_bitwidth for t in pair) == 16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs) and is_bf16(rhs) and op not in BITWISE:
            values = op(bfloat16.decode(lhs.data), bfloat16.decode(rhs.data))
            return Handle(values, tl.int1) if op in COMPARISONS else from_float32(values, tl.bfloat16)
        if op in COMPARISONS:  # stock keeps the operands' type, and a later `&` makes an integer mask of it
            return Handle(op(lhs.data, rhs.data), tl.int1)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        if is_bf16(arg):
            return from_float32(op(bfloat16.decode(arg.data)), tl.bfloat16)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        if not is_bf16(z):
            return super().create_fma(x, y, z)
        product = np.multiply(bfloat16.decode(x.data), bfloat16.decode(y.data), dtype=np.float64)
        return from_float32(product + bfloat16.decode(z.data), tl.bfloat16)

    def create_erf(self, arg):
        values = torch.special.erf(torch.from_numpy(np.array(arg.data, np.float64))).numpy()
        return Handle(values.astype(arg.data.dtype), arg.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        self.launch.dot_flops += 2 * d.data.size * a.data.shape[-1]
        dtype = a.dtype.scalar
        if dtype not in (tl.bfloat16, tl.float16, tl.float32):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        left, right = to_float32(a), to_float32(b)
        if dtype == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            left, right = stock._round_f32_to_tf32(left), stock._round_f32_to_tf32(right)
        return from_float32(np.matmul(left, right) + to_float32(d), d.dtype)


def _is_16_bit_float(tensor: Any) -> bool:
    return tensor.dtype.is_floating() and tensor.dtype.primitive_bitwidth == 16


class StrictReduceOps(stock.ReduceOps):
    """Reductions over whole slices; sums of 16-bit floats round at every step, as the compiled additions do."""

    def sum(self, input):
        return self.generic_reduce((input,))[0] if _is_16_bit_float(input) else super().sum(input)

    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        quiet = {np.nanmin: np.fmin.reduce, np.nanmax: np.fmax.reduce}  # without warnings where a whole slice is NaN
        return super().min_max(input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    def generic_reduce(self, input):
        axis, rank = self.axis, len(input[0].handle.data.shape)
        slabs = [t.handle.data.ravel() if axis is None else np.moveaxis(t.handle.data, axis, 0) for t in input]
        while len(slabs[0]) > 1:  # a power of two, as every Triton dimension; pairs of neighbours keep the order
            pairs = [self.to_tensor(s[half::2], t.dtype) for half in (0, 1) for s, t in zip(slabs, input, strict=True)]
            combined = self.combine_fn.fn(*pairs)
            slabs = [t.handle.data for t in (combined if isinstance(combined, tuple) else (combined,))]
        results = [s[0] for s in slabs]
        if self.keep_dims:
            results = [r.reshape((1,) * rank) if axis is None else np.expand_dims(r, axis) for r in results]
        return [self.to_tensor(r, t.dtype) for r, t in zip(results, input, strict=True)]


class StrictScanOps(stock.ScanOps):
    """Scans over whole slices, one step at a time."""

    def cumsum(self, input):
        return self.generic_scan((input,)) if _is_16_bit_float(input) else super().cumsum(input)

    def cumprod(self, input):
        return self.generic_scan((input,)) if _is_16_bit_float(input) else super().cumprod(input)

    def generic_scan(self, input):
        steps = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
        rows = [tuple(s[:1] for s in steps)]
        for i in range(1, len(steps[0])):
            pair = (*rows[-1], *(s[i : i + 1] for s in steps))
            dtypes = [t.dtype for t in input] * 2
            combined = self.combine_fn.fn(*(self.to_tensor(p, d) for p, d in zip(pair, dtypes, strict=True)))
            rows.append(tuple(t.handle.data for t in (combined if isinstance(combined, tuple) else (combined,))))
        columns = [np.moveaxis(np.concatenate(c), 0, self.axis) for c in zip(*rows, strict=True)]
        return [self.to_tensor(c, t.dtype) for c, t in zip(columns, input, strict=True)]
