"""Whole models that other libraries build: timm's relatives of the Mixer, PatchTSMixer, TinyTimeMixer.

Eager is the library's own model, ours a copy of it after ``fuse_``, and the bare products are those of its linear
layers and of its patch embedding, one after the other. Inference alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends
from ..patch import fuse_
from ..shapes import MixerShape
from . import series_models
from .bare import bare_layers, products_of
from .cases import Case
from .providers import CannotRun, all_providers
from .run import Prepared
from .timing import rotated_inputs
from .whole_model import randomize_

RELATIVES = ("gmixer_24", "resmlp_24", "gmlp_s16")  # timm's names, without the image size
OTHER_MODELS = (*RELATIVES, *series_models.SERIES_MODELS)
IMAGE = (3, 224, 224)
MANY_SHAPES = MixerShape(0, 0, 0, 0)  # their blocks are of other kinds than a Mixer's, and not all alike


def make_other_model(name: str, num_blocks: int | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """One of ``OTHER_MODELS``, a vision model with its first ``num_blocks`` alone if given, and the shape of its input
    without the batch.

    Raises:
        CannotRun: its library is not here.
    """
    try:
        if name in series_models.SERIES_MODELS:
            size = (series_models.CONTEXT, series_models.CHANNELS)
            return series_models.Forecast(series_models.series_model(name)), size
        import timm

        model = timm.create_model(f"{name}_224")
        model.blocks = model.blocks[:num_blocks]
        return model, IMAGE
    except (ImportError, RuntimeError) as error:  # timm beside a torchvision that does not load raises either
        raise CannotRun(f"{name}'s library cannot be imported: {error}") from error


def prepare_other_model(
    name: str,
    dtype: torch.dtype,
    batch_size: int,
    device: torch.device,
    *,
    num_blocks: int | None = None,
    smoke: bool = False,
    compile_mode: str | None = None,
) -> Prepared:
    """As ``workloads.prepare_workload``, of ``make_other_model(name, num_blocks)``."""
    model, size = make_other_model(name, num_blocks)
    model = randomize_(model.to(device, dtype)).eval().requires_grad_(False)
    ours = copy.deepcopy(model)
    if not fuse_(ours):
        raise CannotRun(f"fuse_ finds nothing to fuse in {name}")
    inputs = rotated_inputs((batch_size, *size), dtype, device)
    products = products_of(model, inputs[0])
    flops = 2 * sum(rows * weight.numel() for rows, weight in products)
    display_name = name if num_blocks is None else f"{name}:{num_blocks} blocks"
    case = Case("model", display_name, MANY_SHAPES, dtype, batch_size, flops, None)

    def run_on(backend: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with backends.use_backend(backend):
                return ours(x)

        try:
            run(inputs[0])
        except RuntimeError as error:  # of a backend that has no kernels for these blocks
            if "cannot run" in str(error):
                raise CannotRun(str(error)) from None
            raise
        return run

    options = {"compiler": "eager" if smoke else "inductor", "compile_mode": compile_mode}
    providers = all_providers(case, device, model, run_on, partial(bare_layers, products), **options)
    return Prepared(case, inputs, providers, lambda x: copy.deepcopy(model).double()(x.double()))
