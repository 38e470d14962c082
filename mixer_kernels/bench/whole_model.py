"""The providers of a whole model, and ``compare_model`` for a model at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends
from ..functional.checks import pays_on_cpu
from .bare import bare_model
from .cases import Case, model_case
from .progress import no_progress
from .providers import Provider, all_providers, backend_and_memory
from .report import Report
from .run import run_group
from .timing import rotated_inputs


class EagerMixer(nn.Module):
    """``model`` with its own submodules, its blocks computed as timm's ``MixerBlock`` computes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.stem(images)
        for block in self.model.blocks:
            x = x + block.drop_path(block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2))
            x = x + block.drop_path(block.mlp_channels(block.norm2(x)))
        return self.model.forward_head(self.model.norm(x))


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value: a new model's classifier and biases are zero, and hide errors."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, device=device, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


def model_providers(
    case: Case,
    model: nn.Module,
    inputs: list[Tensor],
    *,
    compiler: str = "inductor",
    compile_mode: str | None = None,
) -> list[Provider]:
    """Every provider of a whole model, all on the same weights, in the order of ``provider_names``.

    They compute the logits alone; for mode "train" ``training.with_step`` takes each further.
    """

    def run_on(name: str) -> Callable[[Tensor], Tensor]:
        backend, memory = backend_and_memory(name)

        def run(images: Tensor) -> Tensor:
            for block in model.blocks if memory else ():
                block.memory = memory
            with backends.use_backend(backend):
                return model(images)

        return run

    eager, bare = EagerMixer(model), partial(bare_model, case, model, inputs)
    return all_providers(case, inputs[0].device, eager, run_on, bare, compiler=compiler, compile_mode=compile_mode)


def reference_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Eager in float64, on a copy of the weights that lives only while it runs."""
    return lambda images: EagerMixer(copy.deepcopy(model).double())(images.double())


def compare_model(model: nn.Module, images: Tensor, *, name: str = "model", seconds: float = 1.0) -> Report:
    """Measure ``model`` on ``images``: fused, by the backend that "auto" picks here, against eager, same weights.

    Prints nothing; ``print(compare_model(...))`` shows the table.

    Args:
        model: a ``FusedMixer``, or timm's ``MlpMixer`` with ``FusedMixerBlock``, in eval mode.
        images: one batch ``[B, in_chans, H, W]``, on the model's device and in its dtype. Only its shape, dtype and
            device are used; the values are random.
        name: what the table calls it.
        seconds: about how long to measure each of the two.

    Raises:
        ValueError: the model is in training mode, ``images`` is not 4-D or empty.
    """
    if model.training:
        raise ValueError("compare_model measures inference: call model.eval() first")
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images must be (batch, channels, height, width), not empty, got shape {tuple(images.shape)}")
    case, device = model_case(name, model, images), images.device
    inputs = rotated_inputs(images.shape, images.dtype, device)
    tokens = torch.empty(images.shape[0], case.shape.S, case.shape.C, device="meta")
    pays = device.type == "cpu" and pays_on_cpu("mixer_block", case.dtype, tokens, ())
    chosen = backends.choose("auto", device.type, device.index, case.dtype, ("mixer_block",), pays)
    eager, *others = model_providers(case, model, inputs)
    providers = [eager, next(provider for provider in others if provider.name == chosen)]
    group = run_group(case, inputs, providers, reference_of(model), seconds=seconds, progress=no_progress)
    return Report.of(group.rows, device)
