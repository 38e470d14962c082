"""A strict interpreter for Triton kernels on the CPU: what a GPU gets wrong now and then, it gets wrong every time.

    import strict_interpreter
    strict_interpreter.install()          # before any module with @triton.jit is imported

    with strict_interpreter.poisoned_memory(), strict_interpreter.record() as launches:
        y = call_kernels(x)

Over Triton's own interpreter, which is wrong for bfloat16 and silent about the rest:

- bfloat16 arithmetic in float32, rounded to nearest even after every operation; 16-bit `tl.dot` with exact products and
  float32 accumulation; `input_precision="tf32"` rounds float32 operands to TF32, "ieee" and "tf32x3" don't.
- Masked lanes of a load without `other` hold NaN, or an integer that stands out; fresh memory does in
  `poisoned_memory()`.
- `OutOfBounds`: each unmasked lane must hit an element that sizes and strides of *the argument its pointer came from*
  reach. Memory between the rows of a slice, or of a neighbouring argument, is out of bounds.
- `Race`: two programs, or two lanes of one store, on one element that one of them writes. Atomics may meet atomics.
- `Int32Overflow`: integer add, sub, mul that leave their type, loop counters included, masked lanes too.
- `GridTooLarge`: more than 2^31 - 1, 65535, 65535 programs.

Not seen: races inside one program (a missing `tl.debug_barrier`), what only the compiler decides (pipelining, warp
specialization, registers, accumulation order), misaligned vector accesses. Pointers not passed as tensor arguments are
refused. As on a GPU, `tl.max` and `tl.maximum` drop NaN unless told to propagate it.

Importing this package patches nothing and doesn't import Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import GridTooLarge, Int32Overflow, OutOfBounds, Race, StrictError
from .recording import Launch, record

__all__ = [
    "GridTooLarge",
    "Int32Overflow",
    "Launch",
    "OutOfBounds",
    "Race",
    "StrictError",
    "install",
    "poisoned_memory",
    "record",
]

TRITON_VERSION = "3.9.0"
"""The only version whose private interpreter classes this package knows."""

_installed = False


def install() -> None:
    """Set TRITON_INTERPRET=1 and make Triton's interpreter strict, for the rest of the process; again does nothing.

    Raises RuntimeError if Triton isn't the version that this was written for, or if it, or a module with kernels, was
    imported before without the interpreter.
    """
    global _installed
    if _installed:
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        _apply()
    except BaseException:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        raise
    _installed = True


def _apply() -> None:
    import triton

    if triton.__version__ != TRITON_VERSION:
        raise RuntimeError(
            f"strict_interpreter patches private parts of triton {TRITON_VERSION}, found {triton.__version__}: "
            f"pip install triton=={TRITON_VERSION}, or port it and run tests/test_strict_interpreter.py"
        )
    from . import patches

    compiled = patches.compiled_kernels()
    if compiled:
        standard = [name for name in compiled if name.startswith("triton.")]
        kernels = [name for name in compiled if not name.startswith("triton.")]
        what = f"{', '.join(kernels[:5])} decorated" if kernels else f"triton imported (e.g. {standard[0]})"
        raise RuntimeError(
            f"strict_interpreter.install() came too late: {what} without TRITON_INTERPRET=1; "
            "call it first thing, in conftest.py"
        )
    patches.apply()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty, empty_like, new_empty and resize_ give NaN, or the greatest integer, in fresh memory.

    Uses torch.utils.deterministic.fill_uninitialized_memory, which needs deterministic algorithms on (warn only). The
    state before comes back at the end.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not enabled or warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
