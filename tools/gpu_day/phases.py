"""The phases, in their order, and their shares of the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

TASK_SECONDS = 90.0
MAX_JOBS = 16
HOPPER_PHASE = "hopper"


@dataclass(frozen=True)
class Phase:
    """``share``: of the time that is left, against the shares of the phases behind it: time saved goes to them."""

    name: str
    share: float
    jobs: int = 1  # processes at most; several where there is more to compile than to compute, and nothing is timed
    required: bool = True  # False: what it does not reach is missing, not wrong
    per_backend: bool = True  # whether it checks each backend with kernels
    task_seconds: float = TASK_SECONDS  # for one task, at most; infinite if it keeps to the phase's end by itself


PHASES = (
    Phase("probe", 30, per_backend=False),
    Phase("build", 130, per_backend=False, task_seconds=math.inf),
    Phase(HOPPER_PHASE, 30, jobs=4, per_backend=False, task_seconds=15.0),
    Phase("correctness", 200, jobs=MAX_JOBS),
    Phase("gradients", 150, jobs=MAX_JOBS),
    Phase("sanitizers", 60, jobs=9, required=False, per_backend=False, task_seconds=math.inf),
    Phase("repeats", 60),
    Phase("streams", 40),
    Phase("large", 50),
    Phase("compiled", 45),
    Phase("ladder", 40, required=False, per_backend=False),
    Phase("benchmarks", 110, required=False, per_backend=False),
    Phase("tests", 45, required=False, per_backend=False, task_seconds=math.inf),
)
NAMES = tuple(phase.name for phase in PHASES)
REQUIRED = frozenset(phase.name for phase in PHASES if phase.required)
PER_BACKEND = frozenset(phase.name for phase in PHASES if phase.per_backend)
