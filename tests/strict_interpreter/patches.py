"""Puts the strict parts into Triton 3.9.0's interpreter; only `install()` imports this, with TRITON_INTERPRET set."""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from threadpoolctl import ThreadpoolController
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .builder import StrictBuilder, StrictReduceOps, StrictScanOps, StrictSemantic
from .errors import StrictError
from .memory import LaunchMemory
from .recording import Launch, publish, recording
from .types import block_type, tensor

_one_launch_at_a_time = threading.RLock()  # the interpreter's builder is global
_threads = ThreadpoolController()


def compiled_kernels() -> list[str]:
    """Names of the @triton.jit functions in imported modules that were decorated without the interpreter."""
    return [
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if issubclass(type(value), JITFunction)  # isinstance would ask lazy and deprecated objects for their class
    ]


def apply() -> None:
    builder = stock.interpreter_builder
    builder.__class__ = StrictBuilder
    builder.options = dataclasses.replace(builder.options, debug=True)  # tl.device_assert raises too
    stock.interpreter_semantic.__class__ = StrictSemantic
    # Patch triton.language once and for good: stock does and undoes it at every launch, slower than most kernels here.
    stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    stock._patch_lang = lambda fn: stock._LangPatchScope()
    for language in (tl, tl.core):
        language.range = int32_range
    stock._strict_range = int32_range  # the rewriter copies this module's names to where kernels live
    stock.FunctionRewriter.ast_transformer = _StrictTransformer()
    stock.InterpretedFunction.rewritten_fn.clear()
    stock._get_np_dtype = _get_np_dtype
    stock.ReduceOps, stock.ScanOps = StrictReduceOps, StrictScanOps
    stock._implicit_cvt = _implicit_cvt
    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    stock.GridExecutor = StrictGridExecutor
    JITFunction.run = _refuse_compiled_kernel


def _refuse_compiled_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"kernel {self.__name__} was decorated while TRITON_INTERPRET was not 1; "
        "call strict_interpreter.install() before importing the module that defines it"
    )


def int32_range(arg1: Any, arg2: Any = None, step: Any = None, **options: Any) -> Iterator[Any]:
    """A kernel's `range` and `tl.range`. Counters are int32 (int64 where a bound is), as in compiled loops.

    Scheduling options have no meaning here.
    """
    start, stop = (0, arg1) if arg2 is None else (arg1, arg2)
    bounds = (start, stop, 1 if step is None else step)
    counter = range(*(int(b) for b in bounds))
    wide = any(isinstance(b, tl.tensor) and b.dtype.primitive_bitwidth == 64 for b in bounds)
    wide = wide or any(not -(2**31) <= int(b) < 2**31 for b in bounds)
    dtype, np_dtype = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
    for i in counter:
        yield tl.tensor(stock.TensorHandle(np.array([i], np_dtype), dtype), dtype)


class _StrictTransformer(stock.ASTTransformer):
    def visit_For(self, node: ast.For) -> ast.For:
        node = self.generic_visit(node)
        call = node.iter
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range":
            call.func = ast.copy_location(ast.Name(id="_strict_range", ctx=ast.Load()), call.func)
        return node


_stock_np_dtype = functools.cache(stock._get_np_dtype)  # stock builds its table anew at every call


def _get_np_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _stock_np_dtype(scalar)


_stock_implicit_cvt = stock._implicit_cvt


def _implicit_cvt(arg: Any) -> Any:
    value = _stock_implicit_cvt(arg)  # comes back here for what is inside a tuple or a descriptor
    if hasattr(arg, "data_ptr"):
        value.handle.data = np.array([stock.interpreter_builder.launch.virtual_address(arg)], np.uint64)
    return value


class StrictGridExecutor(stock.GridExecutor):
    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        launch = stock.interpreter_builder.launch
        for name, arg in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
            _add_tensors(launch, name, arg)
        launch.find_regions()
        return args, kwargs

    def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        """Nothing to copy back: a CPU tensor's storage is its own host copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        # NaN and Inf are data. On tiles, BLAS threads mostly wait for each other: 100 times slower on a busy machine.
        with _one_launch_at_a_time, np.errstate(all="ignore"), _threads.limit(limits=1, user_api="blas"):
            builder = stock.interpreter_builder
            launch = builder.launch = LaunchMemory(self.fn.__name__)
            try:
                super().__call__(*args, **kwargs)
                if recording():
                    read, written = launch.bytes_touched("load"), launch.bytes_touched("store")
                    publish(Launch(launch.kernel, launch.grid, read, written, launch.dot_flops))
            except stock.InterpreterError as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, StrictError):
                    cause = cause.__cause__
                if cause is None:
                    raise
                raise cause from None
            finally:
                builder.launch = None


def _add_tensors(launch: LaunchMemory, name: str, arg: Any) -> None:
    if isinstance(arg, tuple):
        for i, member in enumerate(arg):
            _add_tensors(launch, f"{name}[{i}]", member)
    elif isinstance(arg, TensorDescriptor):
        _add_tensors(launch, name, arg.base)
    elif hasattr(arg, "data_ptr"):
        tensor = stock._unwrap_tensor(arg)
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"argument {name!r} is on {tensor.device}; the strict interpreter takes CPU tensors only"
            )
        launch.add(name, tensor, arg)
