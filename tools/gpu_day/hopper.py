"""Hopper: the first calls of the kernels of csrc/sm90 on this machine, small ones, one process each at worst.

They wait for each other by barriers, and a mistake in those is no wrong number but a kernel without end. What goes
wrong here is left out of all later phases.
"""

from __future__ import annotations

from mixer_kernels.shapes import MixerShape

from .correctness import HALVES, forward_task
from .gradients import backward_task
from .kernels import absent, why_not
from .results import HOPPER
from .sample import Sample, samples_on
from .tasks import Settings, Task

# Each padded token axis, each a bit less than full; tails along channels and hidden units; more tiles than one.
SHAPES = (
    MixerShape(S=16, C=64, D_S=64, D_C=64),
    MixerShape(S=49, C=72, D_S=24, D_C=96),
    MixerShape(S=196, C=136, D_S=96, D_C=264),
    MixerShape(S=256, C=200, D_S=160, D_C=520),
)


def tasks(settings: Settings) -> list[Task]:
    reason = why_not(settings, HOPPER)
    if reason is not None:
        return [absent(HOPPER, reason)]
    shapes = SHAPES[:2] if settings.rehearse else SHAPES
    dtypes = ("bf16",) if settings.rehearse else ("bf16", "fp16")
    samples = samples_on(HOPPER, [Sample(shape, dtype) for dtype in dtypes for shape in shapes])
    forward = [forward_task(settings, sample, level) for sample in samples for level in HALVES]
    return forward + [backward_task(settings, sample, level, "fast") for sample in samples for level in HALVES]
