"""Which backend runs: the names, the user's choice, and the one rule for ``auto``.

A backend is a module with ``why_not``, ``token_mixing_forward`` and ``channel_mixing_forward`` and, unless autograd
differentiates it, ``backward_kernels``, which ``backends.backward`` puts in order; it may have ``mixer_block_forward``.
Its name is the module's; that of "cuda:sm90" is cuda.sm90. Backends are imported when first asked for: importing
mixer_kernels needs neither Triton nor a GPU.

``auto`` on a GPU prefers, of the two backends with kernels,

1. the one that measured.json lists for this GPU, if it lists one of them alone;
2. else ``cuda`` on compute capability 8.x and 12.x, where its tensor core instructions are the native ones, then
   ``triton``;
3. else ``triton``, which has the instructions of 9.0 and 10.x, then ``cuda``.

What cannot run (not built, not installed, a dtype) is passed over; ``torch`` is the last resort and on the CPU the only
one. It is also what ``auto`` takes while a model is exported to ONNX or traced by TorchScript, which know PyTorch's
operators alone. ``torch.export`` and AOTInductor keep ours. ``cuda:sm90`` has to be asked for: it is ``cuda`` with
kernels for compute capability 9.0, and ``cuda`` uses those itself once they have passed on a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from ..tracing import constant_while_tracing
from .measured import measured_gpus

logger = logging.getLogger("mixer_kernels")

BACKENDS = ("cuda", "cuda:sm90", "triton", "cpu", "torch")
KERNEL_BACKENDS = ("cuda", "triton")
CHOICES = ("auto", *BACKENDS)
ENVIRONMENT_VARIABLE = "MIXER_KERNELS_BACKEND"

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("mixer_kernels_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block's calls on ``name``, one of ``CHOICES``, inside the ``with`` statement.

    Wins over ``MIXER_KERNELS_BACKEND``; a ``backend=`` argument wins over both. Holds for the current thread or task.
    A function compiled by ``torch.compile`` keeps the backend that it was compiled with.
    """
    token = _requested.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """The backend asked for by ``use_backend`` or else by ``MIXER_KERNELS_BACKEND``; "auto" if by neither."""
    return _requested.get() or _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


@constant_while_tracing
def choose(
    backend: str | None,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
) -> str:
    """The name of the backend that runs products in ``dtype`` on tensors of that device.

    Raises:
        ValueError: the name is not one of ``CHOICES``.
        RuntimeError: a backend was asked for by name and cannot run; the message says why.
    """
    name = requested_backend() if backend is None else _checked(backend, "backend")
    device = torch.device(device_type, device_index) if device_index is not None else torch.device(device_type)
    target = _exported_to()
    if target is not None and name != "torch":
        if name != "auto":
            raise RuntimeError(f"backend={name!r} cannot run: {target} has no such operators; use backend='torch'")
        return "torch"
    if name != "auto":
        reason = why_not(name, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run: {reason}")
        return name
    if device.type != "cuda":
        where = "the CPU" if device.type == "cpu" else f"a device of type {device.type!r}"
        _warn_once("auto", "torch", f"the tensors are on {where}; the kernels need a GPU")
        return "torch"
    reasons = {}
    for candidate in preferred(device):
        reason = why_not(candidate, device, dtype)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    for candidate, reason in reasons.items():
        _warn_once(candidate, "torch", reason)
    return "torch"


@functools.cache
def preferred(device: torch.device) -> tuple[str, ...]:
    """The backends with kernels in the order in which "auto" tries them on the GPU ``device``."""
    name = torch.cuda.get_device_name(device)
    measured = [backend for backend in KERNEL_BACKENDS if name in measured_gpus(backend)]
    if len(measured) == 1:
        first = measured[0]
    else:
        native = not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (8, 12)
        first = "cuda" if native else "triton"
    return first, *(backend for backend in KERNEL_BACKENDS if backend != first)


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot run this, or None if it can."""
    try:
        module = load(name)
    except ImportError as error:
        return f"{error}. Install it (pip install {name}) or use backend='torch'"
    return module.why_not(device, dtype)


def load(name: str) -> ModuleType:
    """The module of backend ``name``, imported on first use."""
    return importlib.import_module(f"{__package__}.{name.replace(':', '.')}")


def forget_packs() -> None:
    """Drop the weights that backends have prepacked for inference.

    Packs follow every change that PyTorch counts: in-place writes, optimizer steps, ``load_state_dict``, ``.to()``.
    Needed only after a write that PyTorch does not count: through ``.data``, by a replayed CUDA graph of a training
    step, by a fused optimizer under ``torch.compile``.
    """
    from . import prepack

    prepack.forget_packs()


def _exported_to() -> str | None:
    """The format without our operators that a model is being exported to right now, or None."""
    onnx = sys.modules.get("torch.onnx")  # it is imported by who exports
    if onnx is not None and onnx.is_in_onnx_export():
        return "ONNX"
    return "TorchScript" if torch.jit.is_tracing() else None


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, CHOICES))}, got {name!r}")
    return name


@functools.cache
def _warn_once(wanted: str, used: str, reason: str) -> None:
    logger.warning("backend %r: running on %r, because %s", wanted, used, reason)
