"""The compiled module ``mixer_kernels._cpu``: whether it is there, which instruction set runs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from ...environment import asked_instruction_set
from ..remembered import forget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODULE = f"{__package__.rpartition('.backends')[0]}._cpu"
ISA_VARIABLE = asked_instruction_set.name
AMX = "avx512_amx"  # has to be asked for: no CPU has run it yet
WITH_BF16 = (AMX, "avx512_bf16")
"""The instruction sets that multiply bfloat16; all else is computed in float32."""


def loaded() -> ModuleType:
    """The compiled module. ImportError says why there is none."""
    # After torch: its OpenMP runtime is the pool of threads.
    return sys.modules.get(MODULE) or importlib.import_module(MODULE)  # which asks more


def instruction_set() -> str:
    """The one that runs: what ``MIXER_KERNELS_CPU_ISA`` names, or the best of those built that this CPU has.

    Raises:
        RuntimeError: the one named was not built, or this CPU lacks it.
    """
    return _instruction_set(asked_instruction_set())


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run products in ``dtype`` on ``device``, or None."""
    if device.type != "cpu":
        return f"the CPU kernels take CPU tensors, got one on {device.type}"
    if dtype not in DTYPES:
        return f"the CPU kernels take {', '.join(map(str, DTYPES))}, got {dtype}; use backend='torch'"
    try:
        instruction_set()
    except (ImportError, RuntimeError) as error:
        return why_not_loaded(error)
    return None


def why_not_auto(dtype: torch.dtype) -> str | None:
    """Why ``auto`` does not take the kernels for products in ``dtype``, or None."""
    return _why_not_auto(dtype, asked_instruction_set())


@functools.cache  # a CPU does not change
def emulates(dtype: torch.dtype) -> bool:
    """Whether this CPU has no products in ``dtype``, of 16 bits, that PyTorch could use."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return asked is not None and not getattr(torch.ops.mkldnn, asked, bool)()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernels that ``auto`` takes multiply in ``dtype``, of 16 bits, by the CPU's best instructions."""
    if dtype is not torch.bfloat16 or why_not_auto(dtype) is not None or instruction_set() not in WITH_BF16:
        return False
    return instruction_set() == AMX or AMX not in loaded().built or not loaded().runs_here(AMX)


@functools.cache  # as _instruction_set
def _why_not_auto(dtype: torch.dtype, asked: str) -> str | None:
    reason = why_not(torch.device("cpu"), dtype)
    if reason is None and _instruction_set(asked) == "baseline":
        return "this CPU has neither AVX2 nor AVX-512"
    return reason


@contextlib.contextmanager
def replaced_by(module: Any) -> Iterator[None]:
    """``module`` stands for the compiled one inside, for who measures or tests what is around it."""
    before = sys.modules.get(MODULE)
    sys.modules[MODULE] = module
    _forget()
    try:
        yield
    finally:
        del sys.modules[MODULE]
        if before is not None:
            sys.modules[MODULE] = before
        _forget()


def _forget() -> None:
    _instruction_set.cache_clear()
    _why_not_auto.cache_clear()
    forget()


def why_not_loaded(error: Exception) -> str:
    """What ``loaded`` or ``instruction_set`` raised, for people."""
    if isinstance(error, ModuleNotFoundError) and error.name == MODULE:
        return (
            "mixer_kernels was installed without its CPU kernels (`pip install` builds them where it finds a C++ "
            "compiler; with MIXER_KERNELS_BUILD_CPU=1 it says why if it does not)"
        )
    return f"{MODULE} does not load: {error}" if isinstance(error, ImportError) else str(error)


@functools.cache  # a CPU does not change, nor does a loaded module
def _instruction_set(name: str) -> str:
    module = loaded()
    if not name:
        return next(built for built in module.built if module.runs_here(built))
    if name not in module.built:
        raise RuntimeError(f"{ISA_VARIABLE}: got {name!r}, expected one of {', '.join(module.built)}")
    if not module.runs_here(name):
        raise RuntimeError(f"{ISA_VARIABLE}={name}: this CPU lacks it")
    return name
