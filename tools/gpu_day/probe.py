"""Probe: what this machine is, and whether the checks of this program notice what they are there for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accuracy import reference

from mixer_kernels import info
from mixer_kernels.shapes import MixerShape

from .memory import watched_memory
from .sample import Sample, compare, eager_and_exact, ours
from .tasks import Settings, Task


def tasks(settings: Settings) -> list[Task]:
    def machine(values: dict[str, Any]) -> None:
        values["facts"] = facts(settings)
        if settings.device == "cuda" and torch.cuda.is_available():
            reason = values["facts"]["triton"]["why_not"]
            assert not reason, f"the Triton backend cannot run here: {reason}"

    if settings.device == "cuda" and not torch.cuda.is_available():
        return [Task("machine", machine)]
    return [
        Task("machine", machine),
        Task("self-test: a wrong element is noticed", lambda _: _wrong_element(settings.device)),
        Task("self-test: an unwritten element is noticed", lambda _: _unwritten_element(settings.device)),
        Task("self-test: a write beside the output is noticed", lambda _: _write_beside(settings.device)),
    ]


def facts(settings: Settings) -> dict[str, Any]:
    """Versions, device (clocks and driver by nvidia-smi), TF32 settings; without a GPU, "device" is None."""
    found: dict[str, Any] = {"versions": info.versions(), "device": None, "cuda_kernels": info.cuda_kernels()}
    if settings.rehearse:
        found["device"] = info.device_info(torch.device("cpu"))
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        found["device"] = info.device_info(device)
        found["device"]["free_memory_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 1)
        found["triton"] = info.backend_info("triton", device)
    found["tf32"] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    found["environment"] = {name: os.environ[name] for name in info.ENVIRONMENT_VARIABLES if name in os.environ}
    found["tf32"] |= {name: value for name, value in found["environment"].items() if "TF32" in name}
    return found


def _notices(what: str, check: Callable[[], None]) -> None:
    try:
        check()
    except AssertionError:
        return
    raise AssertionError(f"{what} went unnoticed: nothing that this program finds right can be trusted")


def _wrong_element(device: str) -> None:
    sample = Sample(MixerShape(S=49, C=72, D_S=24, D_C=96), "bf16")
    block, x = sample.make(device)
    actual, (eager, exact) = ours(sample, "block", block, x), eager_and_exact(sample, "block", block, x)
    compare({}, actual, eager, exact)
    ulps = 2.0**-4 * exact.value.abs().max()  # 8 units in the last place of the largest value
    actual[1, 20, 30] += ulps.to(actual.dtype)
    _notices("a wrong element", lambda: compare({}, actual, eager, exact))


def _unwritten_element(device: str) -> None:
    with watched_memory() as watch:
        t = torch.empty(2, 3, dtype=torch.bfloat16, device=device)
    t.view(-1)[:5] = 1
    watch.check(t)
    exact = reference(lambda: torch.ones(2, 3, dtype=torch.float64, device=device), t.dtype)
    _notices("an unwritten element", lambda: compare({}, t, torch.ones_like(t), exact))


def _write_beside(device: str) -> None:
    for offset in (-1, 6):
        with watched_memory() as watch:
            t = torch.empty(2, 3, dtype=torch.bfloat16, device=device)
        torch.as_strided(t, (1,), (1,), t.storage_offset() + offset).fill_(torch.nan)
        _notices("a write beside the output", lambda watch=watch, t=t: watch.check(t))
