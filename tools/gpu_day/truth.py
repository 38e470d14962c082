"""Truth: each operator of each backend once, small and odd, then at full size, forward and backward, against float64.

The rule is that of mixer_kernels.accuracy. At full size float64 goes through the batch a few images at a time.
"""

from __future__ import annotations

import inspect
from typing import Any

import operations
import torch

from mixer_kernels import backends
from mixer_kernels.accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, Errors, reference, why_inaccurate
from mixer_kernels.bench.providers import CannotRun
from mixer_kernels.functional import MEMORY_MODES

from .plan import FULL, OK, SMALL, Task
from .worker import Channel, Settings, check_device

DIMENSIONS = {  # odd, but C a multiple of 8, as csrc/sm90 wants it; H = 2 M
    SMALL: {"S": 49, "C": 72, "D": 26, "2D": 52, "H": 138, "M": 69, "N": 3, "P": 13, "Q": 30, "F": 20, "G": 45, "O": 7},
    FULL: {
        "S": 196, "C": 768, "D": 384, "2D": 768, "H": 3072, "M": 1536, "N": 7, "P": 64, "Q": 128, "F": 64, "G": 128,
        "O": 14,
    },
}  # fmt: skip
BATCH = {SMALL: 3, FULL: 256}


def run(task: Task, settings: Settings, channel: Channel) -> dict[str, Any]:
    """The row's figures; AssertionError where the rule does not hold."""
    name, size = task.name.split(", ")
    case = make(name, size, settings.device)
    reason = backends.why_not(task.backend, case.x.device, case.x.dtype)
    if reason is not None:
        raise CannotRun(reason)
    channel.at("calling the kernels")
    actual = case.results(task.backend)
    check_device(settings)
    channel.at("calling eager PyTorch, and float64", seconds=30)
    eager = case.results("torch")
    exact = reference(case.exact, case.x.dtype, draws=None if size == SMALL else 2)
    problems, max_err, vs_eager = [], 0.0, 0.0
    for what, result in actual.items():
        ours, theirs = (Errors.of(t[what].double() - exact[what].value) for t in (actual, eager))
        max_err = max(max_err, ours.max)
        vs_eager = max(vs_eager, ours.rms / theirs.rms if theirs.rms else 0.0)
        factor = FORWARD_FACTOR if what == "output" else GRADIENT_FACTOR
        problems += [f"{what}: {why}" for why in [why_inaccurate(result, eager[what], exact[what], factor)] if why]
    assert not problems, "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if problems[4:] else "")
    return {"status": OK, "max_err": max_err, "vs_eager": vs_eager}


def make(name: str, size: str, device: str) -> operations.Case:
    """In bfloat16: the dtype that all backends have. Each memory mode at one size."""
    case = operations.make(name, DIMENSIONS[size], BATCH[size], torch.bfloat16, device)
    has_modes = "memory" in inspect.signature(case.function).parameters
    memory = {"memory": MEMORY_MODES[size == SMALL]} if has_modes else {}
    return case._replace(options={**case.options, **memory})
