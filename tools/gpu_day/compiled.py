"""Compiled: torch.compile(fullgraph=True) of the operators, and of timm's models with our blocks, equals eager mode."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from accuracy import assert_accurate, reference
from blocks import PRODUCTS

from mixer_kernels import FusedMixerBlock, use_backend
from mixer_kernels.shapes import SPECS, MixerShape

from .kernels import on_each_backend
from .sample import (
    EPS,
    LEVELS,
    Sample,
    arithmetic,
    compare,
    eager_and_exact,
    on_target,
    ours,
    parameters_of,
    planted,
    samples_on,
)
from .tasks import Settings, Skip, Task


def tasks(settings: Settings) -> list[Task]:
    return on_each_backend(settings, lambda backend: _tasks(settings, backend))


def _tasks(settings: Settings, backend: str) -> list[Task]:
    if settings.rehearse:
        samples = [Sample(MixerShape(S=20, C=24, D_S=16, D_C=32), "bf16")]
    else:
        b16 = SPECS["B/16"].block_shape()
        samples = [Sample(b16, dtype, batch_size=8) for dtype in ("bf16", "fp32")]
        samples += [
            Sample(b16, "bf16", stream="fp32", batch_size=8),
            Sample(b16, "bf16", batch_size=8, layout="transposed"),
        ]
    found = [_operator(settings, level, sample) for sample in samples_on(backend, samples) for level in LEVELS]
    dtypes = PRODUCTS[backend][:1] if settings.rehearse else PRODUCTS[backend]
    return found + [_timm(settings, backend, dtype) for dtype in dtypes]


def _compile(settings: Settings, function: Any) -> Any:
    """A rehearsal traces and does not generate code."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager" if settings.rehearse else "inductor")


def _operator(settings: Settings, level: str, sample: Sample) -> Task:
    case = sample.task(level, None).case

    def run(values: dict[str, Any]) -> None:
        block, x = sample.make(settings.device)
        parameters = parameters_of(block, level)

        def call(x: torch.Tensor) -> torch.Tensor:
            # Something to compile on both sides of the operator.
            return LEVELS[level](x * 1.0, *parameters, eps=EPS, backend=sample.backend) * 1.0

        with on_target(settings):
            expected = ours(sample, level, block, x)
            with arithmetic(sample, settings.device):
                actual = planted(settings, case, _compile(settings, call)(x))
        compare(values, actual, *eager_and_exact(sample, level, block, x))
        if sample.layout == "contiguous":  # of others, the compiler may hand the operator a copy, which has other tiles
            assert torch.equal(actual, expected), "the compiled result is not the eager one, bit for bit"

    return sample.task(level, run)


def _timm(settings: Settings, backend: str, dtype: torch.dtype) -> Task:
    name = "mixer_s32_224" if settings.rehearse else "mixer_b16_224"
    dtype_name = str(dtype).removeprefix("torch.")
    case = f"timm {name} with block_layer=FusedMixerBlock {backend} {dtype_name}"

    def run(values: dict[str, Any]) -> None:
        if importlib.util.find_spec("timm") is None:
            raise Skip("timm is not installed")
        import timm_stub

        timm_stub.define_torchvision_operators()
        import timm

        options = {"img_size": 64, "num_classes": 10} if settings.rehearse else {}
        timms = timm.create_model(name, **options).eval().requires_grad_(False)
        model = timm.create_model(name, block_layer=FusedMixerBlock, **options).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for each in (timms, model):
            each.blocks = each.blocks[: 1 if settings.rehearse else 4]
        for parameter in timms.parameters():  # timm's classifier starts as zeros
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.load_state_dict(timms.state_dict())
        size = timms.stem.img_size[0]
        images = torch.randn(2, 3, size, size, generator=generator).to(settings.device, dtype)
        eager = timms.to(settings.device, dtype)(images)
        wide = timms.double()
        exact = reference(lambda: wide(images.double()), dtype)
        model = model.to(settings.device, dtype)
        with on_target(settings), use_backend(backend):
            actual = model(images)
            if settings.planted("error", case):
                actual[-1, -1] += 1
            compare(values, actual, eager, exact, "logits")
            traced = _compile(settings, model)(images)
        assert_accurate(traced, eager, exact, what="logits of the compiled model")

    return Task(case, run, dtype_name, name, backend=backend)
