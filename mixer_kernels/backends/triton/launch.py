"""One door for every kernel launch, so that launches can be counted, and compiled without a GPU."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

MAX_GRID = 2**31 - 1  # programs along axis 0; CUDA C++ Programming Guide, "Technical Specifications"

Interceptor = Callable[[Any, tuple[int], tuple[Any, ...], dict[str, Any]], None]

# Set and put back by intercept_launches.
_interceptor: contextvars.ContextVar[Interceptor | None] = contextvars.ContextVar("mixer_kernels_launch", default=None)


@contextlib.contextmanager
def intercept_launches(interceptor: Interceptor) -> Iterator[None]:
    """Hand every launch to ``interceptor(kernel, grid, args, options)`` instead of running it."""
    token = _interceptor.set(interceptor)
    try:
        yield
    finally:
        _interceptor.reset(token)


def launch(kernel, programs: int, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``programs`` programs along axis 0, on the current device and stream.

    Kernels read vectors as contiguous: one with another stride, such as a column, goes as a copy. Results are new
    tensors, and contiguous.
    """
    if programs > MAX_GRID:
        raise ValueError(f"{kernel.__name__} needs {programs} programs, the grid holds {MAX_GRID}: split the batch")
    args = tuple([arg.contiguous() if isinstance(arg, Tensor) and arg.dim() == 1 else arg for arg in args])
    # Contraction to FMA is what the accuracy tests assume; Triton's default is about to change.
    options["enable_fp_fusion"] = True
    interceptor = _interceptor.get()
    if interceptor is not None:
        interceptor(kernel, (programs,), args, options)
    else:
        kernel[(programs,)](*args, **options)


def needs_int64(extents: tuple[int, ...], strides: tuple[int, ...], padding: int = 256) -> bool:
    """Whether an offset inside one image, tile padding included, may pass 2^31."""
    return sum((extent + padding) * stride for extent, stride in zip(extents, strides, strict=True)) >= 2**31
