"""Repeats: the same call on a large batch, again and again, bit for bit; and right at that size."""

from __future__ import annotations

from typing import Any

import torch

from mixer_kernels.shapes import SPECS, MixerShape

from .sample import Sample, compare, eager_and_exact, on_target, ours, planted
from .tasks import Settings, Task

REPEATS = 100


def tasks(settings: Settings) -> list[Task]:
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
    return [_task(settings, sample) for sample in samples]


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
