"""A process that runs tasks; see supervise for who talks to it, and how."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plan import CANNOT, FAILED, OK, WRONG, Task
from .record import ROOT, sources

PR_SET_PDEATHSIG = 1


class Fault(Exception):
    """This process can do no more: the reason, and whose doing it may be, the likeliest first."""


@dataclass(frozen=True)
class Settings:
    """What the command line says to a worker."""

    device: str = "cuda"
    compile_mode: str = "default"
    bounded: str = ""  # a module _C with bounded waits, to be used in the place of the installed one


class Channel:
    """The pipe to the supervisor; what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._file = os.dup(1)
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        os.write(self._file, json.dumps(message).encode() + b"\n")  # short, so whole, whichever thread sends it

    def at(self, what: str, **values: Any) -> None:
        """A sign of life. ``seconds``: how long the next may take to come; ``suspects``: whose doing it is if not."""
        self.send(at=what, **values)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hung kernel must not outlive the program
    channel, settings = Channel(), Settings(**json.loads(sys.argv[-1]))
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    channel.send(hello=_hello(settings, channel))
    for line in sys.stdin:
        try:
            _run(Task(**json.loads(line)["run"]), settings, channel)
            channel.send(done=True)
        except Fault as fault:
            reason, suspects = fault.args
            channel.send(fault=reason, suspects=suspects)


def _hello(settings: Settings, channel: Channel) -> dict[str, Any]:
    """What a results file is about. Makes the context: a first call would be slow."""
    import torch
    import torch._dynamo  # a first call would import it, in its own time

    from mixer_kernels import info
    from mixer_kernels.backends.cuda import library

    device = torch.device(settings.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return {"device": None}
        device = torch.zeros(1, device="cuda").device
        _beat_when_triton_compiles(channel)
    if settings.bounded:
        sys.path.insert(0, os.path.dirname(settings.bounded))
        library.install(importlib.import_module("_C"))
    facts = {"device": info.device_info(device), "versions": info.versions(), "cuda_kernels": info.cuda_kernels()}
    return {**facts, "sources": sources(*(ROOT / "mixer_kernels").rglob("*.py"))}


def _beat_when_triton_compiles(channel: Channel) -> None:
    """Compiling is no hang. Triton before 3.4 has no such hooks: there its kernels have to be quick to compile."""
    with contextlib.suppress(ImportError):
        from triton.knobs import runtime

        beat = lambda *args, **kwargs: channel.at("compiling by Triton", seconds=60)  # noqa: E731
        runtime.jit_cache_hook = runtime.jit_post_compile_hook = beat


def _run(task: Task, settings: Settings, channel: Channel) -> None:
    import torch

    from mixer_kernels.bench.providers import CannotRun

    torch.manual_seed(zlib.crc32(task.key.encode()))  # the same numbers, whichever process runs it
    start, row = time.monotonic(), None
    try:
        module = {"ahead": "speed"}.get(task.phase, task.phase)
        run = _warm_up if module == "warm-up" else importlib.import_module(f"{__package__}.{module}").run
        row = run(task, settings, channel)
    except Fault:
        raise
    except CannotRun as reason:
        row = {"status": CANNOT, "reason": str(reason)}
    except Exception as error:  # a row says so and the run goes on
        traceback.print_exc()
        row = {"status": WRONG if isinstance(error, AssertionError) else FAILED, "reason": describe(error)}
    check_device(settings, (row or {}).get("reason", ""))
    if row is not None:
        channel.send(row={"provider": task.backend, "seconds": round(time.monotonic() - start, 2), **row})


def _warm_up(task: Task, settings: Settings, channel: Channel) -> dict[str, Any]:
    """What is slow the first time on a cold machine: imports from its disk, cuBLAS, inductor."""
    import torch

    channel.at("importing", seconds=90)
    import mixer_kernels.bench.workloads  # noqa: F401

    if settings.device == "cuda":
        channel.at("multiplying", seconds=60)
        x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
        for dtype in (x.dtype, torch.float64):
            (x.to(dtype) @ x.to(dtype)).sum().item()
        channel.at("compiling by inductor", seconds=90)
        torch.compile(lambda a: torch.nn.functional.gelu(a) * 2)(x).sum().item()
    return {"status": OK}


def check_device(settings: Settings, before: str = "", suspects: Sequence[str] = ()) -> None:
    """Raise Fault if a kernel has failed: nothing works in this process from then on."""
    import torch

    if settings.device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Fault(f"{before} {describe(error)}".strip(), list(suspects)) from None


def describe(error: BaseException) -> str:
    text = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])[:400]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
