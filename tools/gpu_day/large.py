"""Large: more than 2^31 elements, dense and by strides, grids of a million programs, and nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixer_kernels.shapes import MixerShape

from .kernels import on_each_backend
from .launches import noted_launches
from .memory import watched_memory
from .sample import Sample, compare, eager_and_exact, on_target, ours, planted, run_watched, samples_on
from .tasks import Settings, Skip, Task

LIMIT = 2**31
HALVES = ("token", "channel")


def tasks(settings: Settings) -> list[Task]:
    return on_each_backend(
        settings, lambda backend: [*_empty(settings, backend), *_strided(settings, backend), *_dense(settings, backend)]
    )


def _empty(settings: Settings, backend: str) -> Iterator[Task]:
    for level in (*HALVES, "block"):
        sample = Sample(MixerShape(S=49, C=72, D_S=24, D_C=96), "bf16", batch_size=0, backend=backend)

        def run(values: dict[str, Any], level: str = level, sample: Sample = sample) -> None:
            block, x = sample.make(settings.device)
            with noted_launches(sample.backend) as launches:
                y = ours(sample, level, block, x)
            assert y.shape == x.shape and y.dtype is x.dtype, f"{tuple(y.shape)} {y.dtype} from an empty batch"
            assert not launches, f"{len(launches)} launches for an empty batch"

        yield sample.task(level, run, "B = 0: ")


def _strided(settings: Settings, backend: str) -> Iterator[Task]:
    """Views whose elements lie more than 2^31 elements apart, most of them never touched."""
    limit = 2**20 if settings.rehearse else LIMIT
    for tokens in (3, 257):
        far = {
            "images": (limit + 64, 8, 1),
            "tokens": (8, limit // (tokens - 1) + 8, 1),
            "channels": (1, 2, limit // 7 + 16),
        }
        for name, strides in far.items():
            for level in HALVES:
                sample = Sample(MixerShape(S=tokens, C=8, D_S=16, D_C=16), "bf16", batch_size=2, backend=backend)
                prefix = f"{name} far apart: "
                case = sample.task(level, None, prefix).case

                def run(
                    values: dict[str, Any], sample: Sample = sample, level: str = level, case: str = case,
                    strides: tuple[int, ...] = strides,
                ) -> None:  # fmt: skip
                    block, near = sample.make(settings.device)
                    extent = sum((n - 1) * stride for n, stride in zip(near.shape, strides, strict=True)) + 1
                    _need(settings, 2 * extent)
                    x = torch.empty(extent, dtype=near.dtype, device=near.device).as_strided(near.shape, strides)
                    x.copy_(near)
                    actual = run_watched(settings, case, sample, level, block, x)
                    compare(values, actual, *eager_and_exact(sample, level, block, near))

                yield sample.task(level, run, prefix)


def _dense(settings: Settings, backend: str) -> Iterator[Task]:
    """A batch that is computed whole and checked piece by piece."""
    if settings.rehearse:
        cases = [("grid of 20 programs", "block", Sample(MixerShape(S=16, C=8, D_S=8, D_C=8), batch_size=20), 0)]
    else:
        thin = MixerShape(S=196, C=768, D_S=64, D_C=64)
        many = MixerShape(S=784, C=768, D_S=3072, D_C=64)
        images = LIMIT // (thin.S * thin.C) + 3
        hidden = LIMIT // (thin.S * 3072) + 3
        grid = 2**20
        # What is large, the half, the sample, the bytes in use at once: 10 an element while x is made.
        cases = [
            ("grid of a million programs", "block", Sample(MixerShape(S=16, C=16, D_S=16, D_C=16), batch_size=grid), 0),
            ("x > 2^31", "token", Sample(thin, batch_size=images), 10 * LIMIT),
            ("x > 2^31", "channel", Sample(thin, batch_size=images), 10 * LIMIT),
            ("x > 2^31 transposed", "token", Sample(thin, batch_size=images, layout="transposed"), 10 * LIMIT),
            ("hidden > 2^31", "channel", Sample(MixerShape(196, 768, 384, 3072), batch_size=hidden), 5 * LIMIT),
            ("hidden > 2^31", "token", Sample(many, batch_size=LIMIT // (3072 * 768) + 3), 5 * LIMIT),
        ]
    for name, level, each, nbytes in cases:
        for sample in samples_on(backend, [each]):
            prefix = f"{name}: "
            case = sample.task(level, None, prefix).case
            yield sample.task(level, _by_pieces(settings, case, level, sample, nbytes), prefix)


def _by_pieces(
    settings: Settings, case: str, level: str, sample: Sample, nbytes: int
) -> Callable[[dict[str, Any]], None]:
    def run(values: dict[str, Any]) -> None:
        _need(settings, nbytes)
        block, x = sample.make(settings.device)
        with on_target(settings), watched_memory() as watch:
            y = ours(sample, level, block, x)
        watch.check(y)
        planted(settings, case, y)
        step = -(-sample.batch_size // (4 if settings.rehearse else 64))
        starts = range(0, sample.batch_size, step)
        for first in starts:
            piece = slice(first, first + step)
            with on_target(settings):
                alone = ours(sample, level, block, x[piece])
            # Equal, if both were compiled alike; else (64-bit offsets are compiled apart) as accurate as any result.
            if first in (0, starts[-1]) or not torch.equal(y[piece], alone):
                compare(values, y[piece], *eager_and_exact(sample, level, block, x[piece]))

    return run


def _need(settings: Settings, nbytes: int) -> None:
    if settings.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if free < 1.1 * nbytes:
            raise Skip(f"needs {1.1 * nbytes / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
