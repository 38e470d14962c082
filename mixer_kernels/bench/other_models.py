"""Whole models that other libraries build: timm's relatives of the Mixer, PatchTSMixer, TinyTimeMixer.

Eager is the library's own model, ours a copy of it after ``fuse_``, and the bare products are those of its linear
layers and of its patch embedding, one after the other.
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
from .bare import BareProducts
from .cases import Case
from .providers import CannotRun, all_providers
from .timing import rotated_inputs
from .whole_model import randomize_
from .workloads import Prepared

IMAGE = (3, 224, 224)
MANY_SHAPES = MixerShape(0, 0, 0, 0)  # their blocks are of other kinds than a Mixer's, and not all alike


def make_other_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model by the name that timm has for it, or "ptsm" or "ttm", and the shape of its input without the batch.

    Raises:
        CannotRun: its library is not here.
    """
    try:
        if name in series_models.SERIES_MODELS:
            size = (series_models.CONTEXT, series_models.CHANNELS)
            return series_models.Forecast(series_models.series_model(name)), size
        import timm

        return timm.create_model(f"{name}_224"), IMAGE
    except (ImportError, RuntimeError) as error:  # timm beside a torchvision that does not load raises either
        raise CannotRun(f"{name}'s library cannot be imported: {error}") from error


def prepare_other_model(
    name: str,
    dtype: torch.dtype,
    batch_size: int,
    device: torch.device,
    *,
    smoke: bool = False,
    compile_mode: str | None = None,
) -> Prepared:
    """As ``workloads.prepare_workload``, of ``make_other_model(name)``."""
    model, size = make_other_model(name)
    model = randomize_(model.to(device, dtype)).eval().requires_grad_(False)
    ours = copy.deepcopy(model)
    if not fuse_(ours):
        raise CannotRun(f"fuse_ finds nothing to fuse in {name}")
    inputs = rotated_inputs((batch_size, *size), dtype, device)
    products = _products(model, inputs[0])
    flops = 2 * sum(rows * weight.numel() for rows, weight in products)
    case = Case("model", name, MANY_SHAPES, dtype, batch_size, flops, None)

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
    providers = all_providers(case, device, model, run_on, partial(_bare, products), **options)
    return Prepared(case, inputs, providers, lambda x: copy.deepcopy(model).double()(x.double()))


def _products(model: nn.Module, x: Tensor) -> list[tuple[int, Tensor]]:
    """(rows, weight) of each product with weights, in their order."""
    found: list[tuple[int, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight = module.weight.detach().flatten(1)
        found.append((output.numel() // len(weight), weight))

    hooks = [each.register_forward_hook(note) for each in model.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def _bare(products: list[tuple[int, Tensor]]) -> BareProducts:
    """Products of one size share their buffers."""
    buffers: dict[tuple[int, int], Tensor] = {}
    for rows, weight in products:
        for columns in weight.shape:
            if (rows, columns) not in buffers:
                buffers[rows, columns] = torch.randn(rows, columns, dtype=weight.dtype, device=weight.device)

    def run(x: Tensor) -> Tensor:
        for rows, weight in products:
            result = torch.mm(buffers[rows, weight.shape[1]], weight.T)
        return result

    return BareProducts(run, f"{len(products)} products")
