"""The backends with kernels, and which of them run on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mixer_kernels import backends

from .results import BACKENDS
from .tasks import Settings, Skip, Task


def on_each_backend(settings: Settings, tasks_of: Callable[[str], Iterable[Task]]) -> list[Task]:
    """``tasks_of(backend)`` for each that runs here; for each that does not, one task that says why."""
    found: list[Task] = []
    for backend in BACKENDS:
        reason = why_not(settings, backend)
        found += tasks_of(backend) if reason is None else [absent(backend, reason)]
    return found


def why_not(settings: Settings, backend: str) -> str | None:
    if backend in settings.without:
        return "its first calls went wrong or had no end"
    index = torch.cuda.current_device() if settings.device == "cuda" else None
    return backends.why_not(backend, torch.device(settings.device, index), torch.bfloat16)


def absent(backend: str, reason: str) -> Task:
    def run(values: dict[str, Any]) -> None:
        raise Skip(reason)

    return Task(f"backend {backend}", run, backend=backend)
