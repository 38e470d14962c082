"""Repeats: the same call on a large batch, again and again, bit for bit; and right at that size. Backward as well."""

from __future__ import annotations

from typing import Any

import torch

from mixer_kernels.functional import MEMORY_MODES
from mixer_kernels.shapes import SPECS, MixerShape

from .kernels import on_each_backend
from .sample import (
    Sample,
    compare,
    compare_gradients,
    eager_and_exact,
    gradients_of,
    on_target,
    ours,
    planted,
    samples_on,
)
from .tasks import Settings, Task

REPEATS = 100


def tasks(settings: Settings) -> list[Task]:
    return on_each_backend(settings, lambda backend: _tasks(settings, backend))


def _tasks(settings: Settings, backend: str) -> list[Task]:
    if settings.rehearse:
        small = MixerShape(S=20, C=24, D_S=16, D_C=32)
        samples = [Sample(small, dtype, batch_size=2) for dtype in ("bf16", "fp32")]
    else:
        b16, many = SPECS["B/16"].block_shape(), SPECS["B/16"].block_shape(img_size=448)
        samples = [Sample(b16, dtype, batch_size=256) for dtype in ("bf16", "fp16", "tf32")]
        samples += [
            Sample(b16, "fp32", batch_size=64),  # IEEE products have no matrix instruction: ten times slower
            Sample(b16, "bf16", stream="fp32", batch_size=256),
            Sample(b16, "bf16", layout="transposed", batch_size=256),
            Sample(many, "bf16", batch_size=64),
        ]
    samples = samples_on(backend, samples)
    backward = [(samples[0], memory) for memory in MEMORY_MODES]
    backward += [(sample, "fast") for sample in samples[1:]]
    return [_task(settings, sample) for sample in samples] + [_backward(settings, *each) for each in backward]


def _task(settings: Settings, sample: Sample) -> Task:
    count = 3 if settings.rehearse else REPEATS
    case = sample.task("block", None).case

    def run(values: dict[str, Any]) -> None:
        block, x = sample.make(settings.device)
        with on_target(settings):
            first = planted(settings, case, ours(sample, "block", block, x))
            equal = 1
            for _ in range(count - 1):
                equal += torch.equal(planted(settings, case, ours(sample, "block", block, x)), first)
        values["repeats_equal"] = equal
        images = sorted({0, sample.batch_size // 2, sample.batch_size - 1})
        compare(values, first[images], *eager_and_exact(sample, "block", block, x[images]))
        assert equal == count, f"{count - equal} of {count} results are not equal to the first"

    return sample.task("block", run)


def _backward(settings: Settings, sample: Sample, memory: str) -> Task:
    """Output and every gradient. They are compared with float64 on a few images: weight gradients sum over all."""
    count = 3 if settings.rehearse else REPEATS
    prefix = f"forward + backward, {memory}: "
    case = sample.task("block", None, prefix).case

    def run(values: dict[str, Any]) -> None:
        block, x = sample.make(settings.device)
        dy = torch.randn(x.shape, device=x.device).to(x.dtype)

        def call(x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
            results = gradients_of(sample, "block", block, x, dy, memory=memory)
            planted(settings, case, results["x"])
            return results

        with on_target(settings):
            first = call(x, dy)
            equal, different = 1, set()
            for _ in range(count - 1):
                again = call(x, dy)
                names = {name for name in first if not torch.equal(again[name], first[name])}
                equal += not names
                different |= names
            values["repeats_equal"] = equal
            few = slice(0, 4)
            compare_gradients(values, sample, "block", block, x[few], dy[few], call(x[few], dy[few]))
        assert equal == count, f"{count - equal} of {count} differ from the first in {', '.join(sorted(different))}"

    return sample.task("block", run, prefix)
