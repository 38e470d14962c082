"""What ``pytest benchmarks`` measures: on a GPU the paper's models, on a CPU a few small shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import FusedMixer
from ..shapes import SPECS
from .cases import DTYPES, Case, function_case, model_case
from .providers import EAGER, Provider, Weights, function_providers
from .timing import rotated_inputs
from .whole_model import model_providers, randomize_, reference_of

IMG_SIZE = 224
IN_CHANS = 3


@dataclass(frozen=True)
class Workload:
    """One group of benchmarks. Its text is part of their ids: ``-k "block and B/16 and bf16-256"``."""

    level: str  # one of cases.LEVELS
    name: str  # one of shapes.SPECS
    dtype: str  # one of cases.DTYPES
    batch_size: int
    num_blocks: int | None = None  # of a whole model; None for as many as it has

    def __str__(self) -> str:
        return f"{self.display_name}-{self.dtype}-{self.batch_size}"

    @property
    def display_name(self) -> str:
        return self.name if self.num_blocks is None else f"{self.name}:{self.num_blocks} blocks"


@dataclass
class Prepared:
    """A workload with its tensors: what ``run_group`` takes."""

    case: Case
    inputs: list[Tensor]
    providers: list[Provider]
    reference: Callable[[Tensor], Tensor]


def prepare_workload(workload: Workload, device: torch.device, *, smoke: bool = False) -> Prepared:
    """Make weights, inputs and providers; in a smoke run ``torch.compile`` traces but generates no code."""
    dtype, compiler = DTYPES[workload.dtype], "eager" if smoke else "inductor"
    if workload.level != "model":
        case = function_case(workload.level, workload.name, dtype, workload.batch_size, IMG_SIZE)
        weights = Weights.random(case.shape, dtype, device)
        inputs = rotated_inputs((workload.batch_size, case.shape.S, case.shape.C), dtype, device)
        providers = function_providers(case, inputs, weights, compiler=compiler)
        return Prepared(case, inputs, providers, lambda x: EAGER[workload.level](x, weights.double()))
    options = {} if workload.num_blocks is None else {"num_blocks": workload.num_blocks}
    model = FusedMixer.from_spec(workload.name, img_size=IMG_SIZE, **options).to(device, dtype)
    randomize_(model).eval().requires_grad_(False)
    inputs = rotated_inputs((workload.batch_size, IN_CHANS, IMG_SIZE, IMG_SIZE), dtype, device)
    case = model_case(workload.display_name, model, inputs[0])
    return Prepared(case, inputs, model_providers(case, model, inputs, compiler=compiler), reference_of(model))


def workloads(level: str, device: torch.device) -> list[Workload]:
    """The workloads of one level on this kind of device."""
    if device.type == "cpu":
        return _ON_CPU[level]
    on_all = (256, 32, 1) if level in ("block", "model") else (256,)
    chosen = [Workload(level, name, "bf16", batch_size) for name in SPECS for batch_size in on_all]
    if level in ("token", "channel"):
        chosen += [Workload(level, "B/16", "bf16", batch_size) for batch_size in (32, 1)]
    return chosen + [Workload(level, "B/16", dtype, 256) for dtype in ("fp16", "fp32")]


_ON_CPU = {
    "token": [Workload("token", "S/32", "fp32", 4), Workload("token", "S/16", "fp32", 1)],
    "channel": [Workload("channel", "S/32", "fp32", 4)],
    "block": [Workload("block", "S/32", "fp32", 4), Workload("block", "S/32", "bf16", 4)],
    "model": [Workload("model", "S/32", "fp32", 2, num_blocks=2)],
}
