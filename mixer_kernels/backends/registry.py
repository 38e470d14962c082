"""Which backend runs: the names, the user's choice, and the one rule for ``auto``.

A backend is a module with the functions of ``protocol.Backend``. Its name is the module's; that of "cuda:sm90" is
cuda.sm90. Backends are imported when first asked for: importing mixer_kernels needs neither Triton nor a GPU.

``auto`` on a GPU prefers, of the two backends with kernels,

1. the one that measured.json lists for this GPU, if it lists one of them alone;
2. else ``cuda`` on compute capability 8.x and 12.x, where its tensor core instructions are the native ones, then
   ``triton``;
3. else ``triton``, which has the instructions of 9.0 and 10.x, then ``cuda``.

What cannot run (not built, not installed, a dtype, a feature that it does not have) is passed over; ``torch`` is the
last resort. On the CPU ``auto`` takes ``cpu`` by the table ``FASTER_ON_CPU``, with AVX2 or AVX-512, else ``torch``.
It is also what ``auto`` takes while a model is exported to ONNX or traced by TorchScript, which know PyTorch's
operators alone. ``torch.export`` and AOTInductor keep ours. ``cuda:sm90`` has to be asked for: it is ``cuda`` with
kernels for compute capability 9.0, and ``cuda`` uses those itself once they have passed on a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import sys
from collections.abc import Iterator

import torch

from ..environment import Variable
from ..tracing import constant_while_tracing
from ..words import one_of, warn_once
from .measured import measured_gpus
from .protocol import Backend

BACKENDS = ("cuda", "cuda:sm90", "triton", "cpu", "torch")
KERNEL_BACKENDS = ("cuda", "triton")
NEVER, LEAST_OF_A_MIXER = sys.maxsize, 32768  # elements of x
# From how many elements of x on `auto` takes `cpu`, in inference and in training; by dtype of the products, operator.
# Measured against PyTorch's operators with AVX2 and with AVX-512: a layer was faster at every size, in every dtype. A
# single mixer of 7,168 elements trained at 0.9 of their speed, of 57,344 at 1.0 to 1.8. The token half of an MLP-Mixer
# ran at 1.1 to 2.1; where x is small the call costs what it gains, and at batch 1 it trained slower. In 16 bits blocks
# ran at 2 to 4 times the speed of PyTorch's emulated products, but the token half at 0.7 to 1.2 of a CPU's own. Where
# the kernels multiply bfloat16 too, it ran at 1.5 to 2.0 with AVX512_BF16. Where PyTorch has AMX they need it as well.
# TSMixer ran at 1.3 to 2 in inference, whatever the size; a layer of 24,576 elements trained at 1.1, of 49,152 at 1.2
# to 1.3, of 196,608 at 1.3 to 1.5, of 768 at 0.7; a feature mixing alone needs more. In 16 bits it was not measured.
_OF_SERIES = {"gated_mixer_layer": (0, 0), "gated_mixing": (0, 32768)}
_OF_MIXERS_IN_16_BITS = {"token_mixing": (1, NEVER), "mixer_block": (1, NEVER)}  # with the kernels' products or none
FASTER_ON_CPU = {
    torch.float32: {
        **_OF_SERIES,
        "time_mixing": (0, 24576),
        "feature_mixing": (0, 131072),
        "tsmixer_layer": (0, 24576),
        "token_mixing": (LEAST_OF_A_MIXER, NEVER),
        "mixer_block": (LEAST_OF_A_MIXER, NEVER),
    },
    torch.bfloat16: _OF_SERIES | _OF_MIXERS_IN_16_BITS,
    torch.float16: _OF_SERIES | _OF_MIXERS_IN_16_BITS,
}
CHOICES = ("auto", *BACKENDS)
ENVIRONMENT_VARIABLE = "MIXER_KERNELS_BACKEND"

_asked_by_environment = Variable(ENVIRONMENT_VARIABLE)

# Set and put back by use_backend.
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("mixer_kernels_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``with use_backend("torch"): ...`` runs the calls inside the ``with`` statement on one backend.

    ``name`` is "auto", "cuda", "cuda:sm90", "triton", "cpu" or "torch". It wins over ``MIXER_KERNELS_BACKEND``; a
    ``backend=`` argument wins over both. It holds for the current thread or task.
    A function compiled by ``torch.compile`` keeps the backend that it was compiled with.
    """
    token = _requested.set(one_of("use_backend", name, CHOICES))
    try:
        yield
    finally:
        _requested.reset(token)


@constant_while_tracing
def requested_backend() -> str:
    """The backend asked for by ``use_backend`` or else by ``MIXER_KERNELS_BACKEND``; "auto" if by neither."""
    asked = _requested.get()
    if asked is not None:
        return asked
    asked = _asked_by_environment()
    return one_of(ENVIRONMENT_VARIABLE, asked, CHOICES) if asked else "auto"


@constant_while_tracing
def least_on_cpu(operator: str, dtype: torch.dtype) -> tuple[int, int] | None:
    """Of ``FASTER_ON_CPU``; None if ``auto`` does not take ``cpu`` for ``operator`` with products in ``dtype``."""
    least = FASTER_ON_CPU.get(dtype, {}).get(operator)
    if dtype is not torch.float32 and operator in _OF_MIXERS_IN_16_BITS:
        cpu = load("cpu")
        if not (cpu.emulates(dtype) or cpu.multiplies(dtype)):
            return None
    return least


@constant_while_tracing
def auto_on_cpu(features: tuple[str, ...], dtype: torch.dtype, pays: bool) -> str:
    """What "auto" means for an operator and what it has to have besides, with products in ``dtype``, on tensors on the
    CPU; ``pays``: by ``FASTER_ON_CPU``, on this call's elements."""
    if pays:
        if exported_to() is not None:
            return "torch"
        cpu = load("cpu")
        if all(map(cpu.has, features)):
            reason = cpu.why_not_auto(dtype)
            if reason is None:
                return "cpu"
            warn_once(f"backend 'cpu': running on 'torch', because {reason}")
            return "torch"
    warn_once("backend 'auto': running on 'torch', because on the CPU no kernels are known to be faster at this call")
    return "torch"


@constant_while_tracing
def choose(
    backend: str | None,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    features: tuple[str, ...] = (),
    pays: bool = False,
) -> str:
    """The name of the backend that runs products in ``dtype`` on tensors of that device, and has these ``features``.

    ``pays``: as for ``auto_on_cpu``.

    Raises:
        ValueError: the name is not one of ``CHOICES``.
        RuntimeError: a backend was asked for by name and cannot run; the message says why.
    """
    name = requested_backend() if backend is None else one_of("backend", backend, CHOICES)
    if name == "torch":
        return name  # it always can
    target = exported_to()
    if target is not None:
        if name != "auto":
            raise RuntimeError(f"backend={name!r} cannot run: {target} has no such operators; use backend='torch'")
        return "torch"
    if name == "auto" and device_type != "cuda":
        if device_type == "cpu":
            return auto_on_cpu(features, dtype, pays)
        where = f"on a device of type {device_type!r}"
        warn_once(f"backend 'auto': running on 'torch', because the tensors are {where}; the kernels need a GPU")
        return "torch"
    device = torch.device(device_type, device_index) if device_index is not None else torch.device(device_type)
    if name != "auto":
        reason = why_not(name, device, dtype, features)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run: {reason}")
        return name
    reasons = {}
    for candidate in preferred(device):
        reason = why_not(candidate, device, dtype, features)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    for candidate, reason in reasons.items():
        warn_once(f"backend {candidate!r}: running on 'torch', because {reason}")
    return "torch"


@functools.cache  # a tensor's device has an index, and stays what it is while the process lives
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


def why_not(name: str, device: torch.device, dtype: torch.dtype, features: tuple[str, ...] = ()) -> str | None:
    """Why backend ``name`` cannot run this, or None if it can."""
    try:
        backend = load(name)
    except ImportError as error:
        return f"{error}. Install it (pip install {name}) or use backend='torch'"
    for feature in features:
        if not backend.has(feature):
            others = [other for other in KERNEL_BACKENDS if other != name and _runs(other, device, dtype, features)]
            others.append("torch")
            return f"it has no kernels for {feature}; use {' or '.join(f'backend={other!r}' for other in others)}"
    return backend.why_not(device, dtype)


def load(name: str) -> Backend:
    """The module of backend ``name``, imported on first use."""
    return importlib.import_module(f"{__package__}.{name.replace(':', '.')}")


def _runs(name: str, device: torch.device, dtype: torch.dtype, features: tuple[str, ...]) -> bool:
    try:
        return all(map(load(name).has, features)) and load(name).why_not(device, dtype) is None
    except ImportError:
        return False


def exported_to() -> str | None:
    """The format without our operators that a model is being exported to right now, or None."""
    # It is imported by who exports; another thread may be at it right now.
    in_export = getattr(sys.modules.get("torch.onnx"), "is_in_onnx_export", None)
    if in_export is not None and in_export():
        return "ONNX"
    return "TorchScript" if torch.jit.is_tracing() else None
