"""What the command line tells a phase, and the tasks that a phase is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Skip(Exception):
    """Why a task has nothing to say on this machine."""


class Cut(Exception):
    """What a task was doing when its time was up."""


@dataclass(frozen=True)
class Settings:
    """What the command line says to a phase."""

    phase: str
    rehearse: bool = False
    compile_mode: str = "default"
    plants: tuple[str, ...] = ()
    without: tuple[str, ...] = ()  # backends whose first calls went wrong
    ends: float = math.inf  # of the phase, as time.time() counts

    @property
    def seconds_left(self) -> float:
        return self.ends - time.time()

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def planted(self, kind: str, case: str) -> bool:
        """Whether a ``--plant kind:text`` names this case."""
        return any(plant.startswith(f"{kind}:") and plant[len(kind) + 1 :] in case for plant in self.plants)


@dataclass(frozen=True)
class Task:
    """One row. ``run`` fills a dictionary by the names of Row's fields; it raises AssertionError if a check fails."""

    case: str
    run: Callable[[dict[str, Any]], None] = field(repr=False)
    dtype: str = ""
    shape: str = ""
    config: str = ""
    backend: str = ""  # whose kernels it is about

    def described(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("case", "dtype", "shape", "config", "backend")}
