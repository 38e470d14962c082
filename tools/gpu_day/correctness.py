"""Correctness: every tile configuration on this hardware, then inputs of all kinds, against float64.

Triton's tiles: the cases of ``python -m mixer_kernels compile-check``, at their full size. First those that this GPU
chooses for itself, then those that other GPUs would choose, as far as they fit on this one and no case before has
launched the same: so the kernels on pointers run on an sm_90 too, which takes tensor descriptors where it can.

The CUDA backend's kernels for token mixing choose by shared memory and by how many blocks the batch is: the 16-bit ones
of those cases, as for this GPU, then as for one with a single multiprocessor, which takes the widest tile that fits
into the shared memory, with this GPU's and with each smaller one. A block of the kernels of csrc/sm90 goes over the
batch by itself there, in both halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from blocks import LAYOUTS, Block
from torch import Tensor

from mixer_kernels import compile_check
from mixer_kernels.backends import triton as backend
from mixer_kernels.backends.arguments import Half
from mixer_kernels.backends.triton.launch import intercept_launches
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS, Target, assume_target, target_of

from .kernels import on_each_backend
from .launches import config_of, noted_launches
from .results import HOPPER
from .sample import (
    Sample,
    compare,
    eager_and_exact,
    float32_products,
    on_target,
    options_of,
    parameters_of,
    run_watched,
    samples_on,
)
from .tasks import Settings, Skip, Task

HALVES = ("token", "channel")
DESCRIPTORS = (90, 100, 103)  # compute capabilities whose tiles need tensor descriptors

SHAPES = (
    MixerShape(S=1, C=1, D_S=1, D_C=1),
    MixerShape(S=1, C=40, D_S=20, D_C=72),
    MixerShape(S=7, C=5, D_S=3, D_C=9),
    MixerShape(S=49, C=512, D_S=256, D_C=2048),
    MixerShape(S=63, C=127, D_S=31, D_C=127),
    MixerShape(S=65, C=129, D_S=33, D_C=129),
    MixerShape(S=196, C=512, D_S=256, D_C=2048),
    MixerShape(S=197, C=1000, D_S=98, D_C=770),
    MixerShape(S=256, C=1280, D_S=640, D_C=5120),
    MixerShape(S=257, C=40, D_S=24, D_C=48),
    MixerShape(S=784, C=1024, D_S=512, D_C=4096),
)


def tasks(settings: Settings) -> list[Task]:
    return on_each_backend(settings, lambda backend: _tasks(settings, backend))


def _tasks(settings: Settings, backend: str) -> list[Task]:
    own, others = [], []
    for target, sample, level in tile_samples(settings, backend, launches_of):
        prefix = "tiles " if target is None else f"tiles of {target.name}: "
        (own if target is None else others).append(forward_task(settings, sample, level, target, prefix))
    samples = samples_on(backend, _inputs(settings))
    inputs = [forward_task(settings, sample, level) for sample in samples for level in HALVES]
    return own + inputs + others


def forward_task(
    settings: Settings, sample: Sample, level: str, target: Target | None = None, prefix: str = ""
) -> Task:
    case = sample.task(level, None, prefix).case

    def run(values: dict[str, Any]) -> None:
        if sample.dtype == "tf32" and settings.device != "cuda":
            raise Skip("needs a GPU: PyTorch has no TF32 products on a CPU to compare with")
        block, x = sample.make(settings.device)
        before = x.clone()
        with noted_launches(sample.backend) as launches:
            actual = run_watched(settings, case, sample, level, block, x, target)
        values["config"] = config_of(launches)
        assert torch.equal(x.nan_to_num(), before.nan_to_num()), "x was written to"
        # The residual hides the error of what is added to it.
        residual = x.to(actual.dtype) if sample.mean else 0.0
        compare(values, actual - residual, *eager_and_exact(sample, level, block, x, residual))

    return sample.task(level, run, prefix)


Tiles = Iterator[tuple[Target | None, Sample, str]]


def tile_samples(settings: Settings, backend: str, launches: Callable[[Sample, str, Target], set[tuple]]) -> Tiles:
    """(target, sample, half) for the cases that reach every configuration; None for this GPU's own tiles.

    ``launches`` says what a sample launches on Triton, so that nothing of another target runs twice.
    """
    cases = _rehearsed() if settings.rehearse else _cases()
    samples = dict.fromkeys(samples_on(backend, map(_sample_of, cases)))
    if backend != "triton":
        yield from _limits(settings, backend, samples)
        return
    own = _own_target(settings)
    seen: set[tuple] = set()
    for target in (None, *(other for other in KNOWN_TARGETS.values() if _runs_on(own, other))):
        for sample in samples:
            for level in HALVES:
                launched = launches(sample, level, target or own)
                if target is None or not launched <= seen:
                    yield target, sample, level
                seen |= launched


def _sample_of(case: compile_check.Case) -> Sample:
    layout = "transposed" if case.transposed else "offset" if case.offset else "contiguous"
    return Sample(
        case.shape, case.dtype, case.stream, layout=layout, approximate=case.approximate,
        affine=not case.bare, bias=not case.bare,
    )  # fmt: skip


def _limits(settings: Settings, backend: str, samples: Iterable[Sample]) -> Tiles:
    own = _own_target(settings)
    smaller = {each.shared_memory for each in KNOWN_TARGETS.values() if each.shared_memory < own.shared_memory}
    limits = [own.shared_memory, *sorted(smaller, reverse=True)]
    if settings.rehearse or backend == HOPPER:
        limits = limits[:1]
    yield from ((None, sample, level) for sample in samples for level in HALVES)
    for limit in limits:
        target = Target(f"one multiprocessor, {limit >> 10} KiB", limit, 1)
        levels = HALVES if backend == HOPPER else ("token",)
        yield from ((target, sample, level) for sample in samples for level in levels)


def _runs_on(own: Target, other: Target) -> bool:
    if other.name == own.name or not (own.is_nvidia and other.is_nvidia) or other.shared_memory > own.shared_memory:
        return False
    return other.capability not in DESCRIPTORS or own.capability in DESCRIPTORS


def _own_target(settings: Settings) -> Target:
    with on_target(settings):
        return target_of(torch.device("cpu") if settings.rehearse else torch.empty(0, device="cuda").device)


def launches_of(sample: Sample, level: str, target: Target) -> set[tuple]:
    """What tells the launches of one half's forward pass apart."""
    run = {"token": backend.token_mixing_forward, "channel": backend.channel_mixing_forward}[level]

    def forward(block: Block, x: Tensor) -> None:
        run(x, Half(*parameters_of(block, level)), options_of(sample))

    return noted_of(sample, target, forward)


def noted_of(sample: Sample, target: Target, run: Callable[[Block, Tensor], object]) -> set[tuple]:
    """Kernel, options and dtypes of all that ``run`` launches. Meta tensors: nothing runs."""
    launched = set()

    def note(kernel: Any, grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        chosen = tuple((name, value) for name, value in options.items() if name != "PROGRAMS")
        launched.add((kernel.__name__, chosen, tuple(_dtype(arg) for arg in args)))

    block, x = sample.make("meta")
    with float32_products(sample), assume_target(target), intercept_launches(note):
        run(block, x)
    return launched


def _dtype(argument: Any) -> Any:
    if argument is None or isinstance(argument, (int, float)):
        return argument is None
    return getattr(argument, "base", argument).dtype


def _inputs(settings: Settings) -> Iterator[Sample]:
    """Shapes from one of everything to 448 pixels, layouts, options, extreme values."""
    dtypes = ("fp32", "bf16") if settings.rehearse else ("fp32", "tf32", "fp16", "bf16")
    for shape in SHAPES[:3] if settings.rehearse else SHAPES:
        yield from (Sample(shape, dtype) for dtype in dtypes)
    for tokens, channels in ((49, 40),) if settings.rehearse else ((49, 40), (196, 768), (257, 40)):
        shape = MixerShape(tokens, channels, 24, 48)
        for dtype in dtypes[-1:] if settings.rehearse else ("fp32", "bf16"):
            yield from (Sample(shape, dtype, layout=layout) for layout in LAYOUTS if layout != "contiguous")
    small = MixerShape(S=49, C=72, D_S=24, D_C=96)
    for dtype in dtypes[-1:] if settings.rehearse else dtypes:
        yield Sample(small, dtype, approximate="tanh", affine=False)
        yield Sample(small, dtype, bias=False)
        yield Sample(small, dtype, affine=False, bias=False)
        yield Sample(small, dtype, stream="fp32", mean=30.0)
        yield from (Sample(MixerShape(S=17, C=256, D_S=16, D_C=64), dtype, mean=mean) for mean in (3.0, 30.0))
        yield from (Sample(small, dtype, special=special) for special in ("NaN", "Inf", "constant rows"))


def _cases() -> Iterator[compile_check.Case]:
    """Those of the mixer's block."""
    return (case for case in compile_check.cases() if not case.relative)


def _rehearsed() -> Iterator[compile_check.Case]:
    """A few of the cases, each cut down to what an interpreter can bear."""
    for case in _cases():
        if case.shape.S == 49 or (case.shape.S == 197 and case.dtype == "bf16"):
            yield dataclasses.replace(case, shape=MixerShape(case.shape.S, 40 + case.shape.C % 8, 24, 48))
