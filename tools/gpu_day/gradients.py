"""Gradients: every backward tile configuration on this hardware, then inputs of all kinds, against float64.

The cases are those of correctness; the rule allows three times eager's own error. Tiles of other GPUs are a setting of
the calling thread, and autograd runs the backward pass on threads of its own: tiles are checked by calling the backend,
all else through autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from blocks import CHANNEL_NAMES, LAYOUTS, TOKEN_NAMES, Block
from torch import Tensor

from mixer_kernels import backends
from mixer_kernels.backends.arguments import Half
from mixer_kernels.backends.backward import channel_mixing_backward, differentiate, token_mixing_backward
from mixer_kernels.functional import MEMORY_MODES
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import Target

from .correctness import SHAPES, noted_of, tile_samples
from .kernels import on_each_backend
from .launches import config_of, noted_launches
from .memory import watched_memory
from .sample import (
    Sample,
    compare_gradients,
    float32_products,
    gradients_of,
    on_target,
    options_of,
    parameters_of,
    planted,
    samples_on,
)
from .tasks import Settings, Skip, Task


def tasks(settings: Settings) -> list[Task]:
    return on_each_backend(settings, lambda backend: _tasks(settings, backend))


def _tasks(settings: Settings, backend: str) -> list[Task]:
    own, others = [], []
    for target, sample, level in tile_samples(settings, backend, _launches):
        if settings.rehearse and (sample.dtype, sample.stream) != ("bf16", "bf16"):
            continue
        (own if target is None else others).append(_tile(settings, sample, level, target))
    inputs = [
        backward_task(settings, on_backend, level, memory)
        for sample, level, memory in _samples(settings)
        for on_backend in samples_on(backend, [sample])
    ]
    return own + inputs + others


def _tile(settings: Settings, sample: Sample, level: str, target: Target | None) -> Task:
    prefix = f"backward tiles{f' of {target.name}' if target else ''}: "
    case = sample.task(level, None, prefix).case

    def run(values: dict[str, Any]) -> None:
        if sample.dtype == "tf32" and settings.device != "cuda":
            raise Skip("needs a GPU: PyTorch has no TF32 products on a CPU to compare with")
        block, x = sample.make(settings.device)
        dy = torch.randn(x.shape, device=x.device).to(x.dtype)
        with on_target(settings, target), float32_products(sample), noted_launches(sample.backend) as launches:
            with watched_memory() as watch, torch.no_grad():
                actual = _direct(sample, level, block, x, dy)
            watch.check_zones()
        planted(settings, case, actual["x"])
        values["config"] = config_of(launches)
        compare_gradients(values, sample, level, block, x, dy, actual)

    return sample.task(level, run, prefix)


def _direct(sample: Sample, level: str, block: Block, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Gradients by name, from the backend's own functions."""
    backend = backends.load(sample.backend)
    names, forward, backward, options = {
        "token": (TOKEN_NAMES, backend.token_mixing_forward, token_mixing_backward, {}),
        "channel": (CHANNEL_NAMES, backend.channel_mixing_forward, channel_mixing_backward, {"keep_z": True}),
    }[level]
    half, call = Half(*parameters_of(block, level)), options_of(sample)
    _, *kept = forward(x, half, call, **options)
    wanted = [t is not None for t in (x, *half)]
    gradients = differentiate(backward, backend, dy, kept, x, (half,), call, wanted)
    return {name: t for name, t in zip(("x", *names), gradients, strict=True) if t is not None}


def _launches(sample: Sample, level: str, target: Target) -> set[tuple]:
    return noted_of(sample, target, lambda block, x: _direct(sample, level, block, x, torch.empty_like(x)))


def backward_task(settings: Settings, sample: Sample, level: str, memory: str) -> Task:
    prefix = f"{memory}: " if level != "token" else ""
    case = sample.task(level, None, prefix).case

    def run(values: dict[str, Any]) -> None:
        if sample.dtype == "tf32" and settings.device != "cuda":
            raise Skip("needs a GPU: PyTorch has no TF32 products on a CPU to compare with")
        block, x = sample.make(settings.device)
        dy = torch.randn(x.shape, device=x.device).to(x.dtype)
        before = x.clone(), dy.clone()
        options = {"memory": memory} if level != "token" else {}
        with on_target(settings), watched_memory() as watch:
            actual = gradients_of(sample, level, block, x, dy, **options)
            if settings.device == "cuda":
                torch.cuda.synchronize()
        watch.check_zones()
        assert torch.equal(x, before[0]) and torch.equal(dy, before[1]), "x or its incoming gradient was written to"
        planted(settings, case, actual["x"])
        compare_gradients(values, sample, level, block, x, dy, actual)

    return sample.task(level, run, prefix)


def _samples(settings: Settings) -> Iterator[tuple[Sample, str, str]]:
    """Shapes, dtypes, memory modes, layouts, options."""
    dtypes = ("fp32", "bf16") if settings.rehearse else ("fp32", "tf32", "fp16", "bf16")
    small = MixerShape(S=49, C=72, D_S=24, D_C=96)
    # Of one of everything a gradient is a sum of a few roundings, which says nothing about who rounds better.
    for shape in SHAPES[2:3] if settings.rehearse else SHAPES[1:]:
        for dtype in dtypes:
            yield Sample(shape, dtype), "token", "fast"
            for memory in MEMORY_MODES:
                yield Sample(shape, dtype), "channel", memory
    for shape in (small,) if settings.rehearse else (small, MixerShape(S=257, C=40, D_S=24, D_C=48)):
        for dtype in dtypes[-1:] if settings.rehearse else ("fp32", "bf16"):
            for layout in LAYOUTS[1:2] if settings.rehearse else LAYOUTS:
                yield Sample(shape, dtype, layout=layout), "block", "fast"
    for dtype in dtypes[-1:] if settings.rehearse else dtypes:
        if settings.rehearse:
            small = MixerShape(S=20, C=24, D_S=16, D_C=32)
        for memory in MEMORY_MODES[1:] if settings.rehearse else MEMORY_MODES:
            yield Sample(small, dtype, approximate="tanh", affine=False), "block", memory
            yield Sample(small, dtype, bias=False), "block", memory
            if dtype in ("fp16", "bf16"):
                yield Sample(small, dtype, stream="fp32"), "block", memory
