"""What ``pytest benchmarks`` measures: on a GPU the paper's models, on a CPU a few small shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models import FusedMixer
from ..shapes import SPECS
from .cases import DTYPES, function_case, model_case
from .other_models import OTHER_MODELS, prepare_other_model
from .providers import EAGER, Weights, function_providers
from .run import Prepared
from .timing import rotated_inputs
from .training import Step, gradients_reference, with_gradients
from .whole_model import model_providers, randomize_, reference_of

IMG_SIZE = 224
IN_CHANS = 3


@dataclass(frozen=True)
class Workload:
    """One group of benchmarks. Its text is part of their ids: ``-k "block and B/16 and bf16-256"``."""

    level: str  # one of cases.LEVELS
    name: str  # one of shapes.SPECS, or of OTHER_MODELS at level "model" in mode "infer"
    dtype: str  # one of cases.DTYPES
    batch_size: int
    num_blocks: int | None = None  # of a whole model; None for as many as it has
    mode: str = "infer"  # one of cases.MODES

    def __str__(self) -> str:
        text = f"{self.display_name}-{self.dtype}-{self.batch_size}"
        return f"{text}-train" if self.mode == "train" else text

    @property
    def display_name(self) -> str:
        return self.name if self.num_blocks is None else f"{self.name}:{self.num_blocks} blocks"


def prepare_workload(
    workload: Workload, device: torch.device, *, smoke: bool = False, compile_mode: str | None = None
) -> Prepared:
    """Make weights, inputs and providers; in a smoke run ``torch.compile`` traces but generates no code."""
    training = workload.mode == "train"
    dtype, compiler = DTYPES[workload.dtype], {"compiler": "eager" if smoke else "inductor"}
    compiler["compile_mode"] = compile_mode
    if workload.name in OTHER_MODELS:
        name, batch_size, num_blocks = workload.name, workload.batch_size, workload.num_blocks
        return prepare_other_model(
            name, dtype, batch_size, device, num_blocks=num_blocks, smoke=smoke, compile_mode=compile_mode
        )
    if workload.level != "model":
        case = function_case(workload.level, workload.name, dtype, workload.batch_size, IMG_SIZE, workload.mode)
        weights = Weights.random(case.shape, dtype, device)
        inputs = rotated_inputs((workload.batch_size, case.shape.S, case.shape.C), dtype, device)
        if training:
            weights.require_gradients()
        providers = function_providers(case, inputs, weights, **compiler)
        if training:
            providers = [with_gradients(provider, workload.level, inputs, weights) for provider in providers]
            reference = gradients_reference(workload.level, inputs, weights)
            return Prepared(case, inputs, providers, reference, weights.all())
        return Prepared(case, inputs, providers, lambda x: EAGER[workload.level](x, weights.double()))
    options = {} if workload.num_blocks is None else {"num_blocks": workload.num_blocks}
    model = FusedMixer.from_spec(workload.name, img_size=IMG_SIZE, **options).to(device, dtype)
    randomize_(model).train(training).requires_grad_(training)
    inputs = rotated_inputs((workload.batch_size, IN_CHANS, IMG_SIZE, IMG_SIZE), dtype, device)
    case = model_case(workload.display_name, model, inputs[0], workload.mode)
    providers = model_providers(case, model, inputs, **compiler)
    if training:
        step = Step(model, workload.batch_size, model.num_classes)
        return Prepared(case, inputs, [step.of(each) for each in providers], step.reference, list(model.parameters()))
    return Prepared(case, inputs, providers, reference_of(model))


def workloads(level: str, device: torch.device, mode: str = "infer") -> list[Workload]:
    """The workloads of one level and mode on this kind of device."""
    if mode == "train":
        return _TRAINING_ON_CPU[level] if device.type == "cpu" else _training_on_gpu(level)
    if device.type == "cpu":
        return _ON_CPU[level]
    on_all = (256, 32, 1) if level in ("block", "model") else (256,)
    chosen = [Workload(level, name, "bf16", batch_size) for name in SPECS for batch_size in on_all]
    if level in ("token", "channel"):
        chosen += [Workload(level, "B/16", "bf16", batch_size) for batch_size in (32, 1)]
    if level == "model":
        chosen += [Workload(level, name, "bf16", batch_size) for name in OTHER_MODELS for batch_size in (256, 1)]
    return chosen + [Workload(level, "B/16", dtype, 256) for dtype in ("fp16", "fp32")]


def _training_on_gpu(level: str) -> list[Workload]:
    # Of 64 images, L/16 in eager PyTorch keeps 10 GiB in bfloat16.
    names = {"block": SPECS, "model": ("S/16", "B/16", "L/16")}.get(level, ("B/16",))
    batch_size = 64 if level == "model" else 128
    chosen = [Workload(level, name, "bf16", batch_size, mode="train") for name in names]
    return chosen + [Workload(level, "B/16", dtype, batch_size, mode="train") for dtype in ("fp16", "fp32")]


_ON_CPU = {
    "token": [Workload("token", "S/32", "fp32", 4), Workload("token", "S/16", "fp32", 1)],
    "channel": [Workload("channel", "S/32", "fp32", 4)],
    "block": [Workload("block", "S/32", "fp32", 4), Workload("block", "S/32", "bf16", 4)],
    "model": [Workload("model", "S/32", "fp32", 2, num_blocks=2)],
}

_TRAINING_ON_CPU = {
    "token": [Workload("token", "S/32", "fp32", 2, mode="train")],
    "channel": [Workload("channel", "S/32", "fp32", 2, mode="train")],
    "block": [Workload("block", "S/32", "fp32", 2, mode="train")],
    "model": [Workload("model", "S/32", "fp32", 2, num_blocks=1, mode="train")],
}
