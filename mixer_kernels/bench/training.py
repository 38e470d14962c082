"""Training: a half or a block forward and backward, a whole model for a step.

Both take the providers of the forward pass further, all on the same weights. A step's learning rate is 0: AdamW does
all its work, counts as a change of the weights, and leaves them as they are, so that every provider computes the same
in every round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .providers import EAGER, Provider, Weights
from .whole_model import EagerMixer

PIECE = 16  # images whose gradients are computed at a time in float64

Function = Callable[[Tensor], Tensor]
Results = dict[str, Tensor]  # "output", and the gradients, whose names begin with "gradient"


def with_gradients(provider: Provider, level: str, inputs: list[Tensor], weights: Weights) -> Provider:
    """``provider`` of a half or a block with the gradients of ``x`` and of all weights, as ``Results``.

    ``weights`` must require gradients. An input's incoming gradient is the input before it.
    """
    parameters = weights.half(level)
    names = ["output", *_gradient_names(level)]

    def run(forward: Function, x: Tensor) -> Results:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = forward(leaf)
            gradients = torch.autograd.grad(y, [leaf, *parameters], _incoming(inputs, x))
        return dict(zip(names, [y.detach(), *gradients], strict=True))

    return _extended(provider, run)


def gradients_reference(level: str, inputs: list[Tensor], weights: Weights) -> Callable[[Tensor], Results]:
    """Eager in float64, a few images at a time."""

    def reference(x: Tensor) -> Results:
        exact = weights.double().require_gradients()
        parameters, dy = exact.half(level), _incoming(inputs, x)
        outputs, input_gradients = [], []
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        with torch.enable_grad():
            for images, dy_images in zip(x.split(PIECE), dy.split(PIECE), strict=True):
                leaf = images.double().requires_grad_()
                y = EAGER[level](leaf, exact)
                first, *others = torch.autograd.grad(y, [leaf, *parameters], dy_images.double())
                outputs.append(y.detach())
                input_gradients.append(first)
                sums = [total.add_(gradient) for total, gradient in zip(sums, others, strict=True)]
        names = ["output", *_gradient_names(level)]
        return dict(zip(names, [torch.cat(outputs), torch.cat(input_gradients), *sums], strict=True))

    return reference


class Step:
    """A training step of ``model`` on random labels: forward, cross entropy, backward, AdamW."""

    def __init__(self, model: nn.Module, batch_size: int, num_classes: int) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        self._labels = torch.randint(num_classes, (batch_size,), device=device, generator=generator)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type == "cuda")

    def of(self, provider: Provider) -> Provider:
        """``provider`` of the logits with the rest of the step; its function returns ``Results``."""

        def run(forward: Function, images: Tensor) -> Results:
            with torch.enable_grad():
                logits = forward(images)
                F.cross_entropy(logits.float(), self._labels).backward()
            self._optimizer.step()
            results = _results(logits, self._parameters)
            self._optimizer.zero_grad()  # now, so that the next call's gradients count as memory of that call
            return results

        return _extended(provider, run)

    def reference(self, images: Tensor) -> Results:
        """Eager in float64, a few images at a time, on a copy of the weights."""
        model = copy.deepcopy(self._model).double()
        model.zero_grad(set_to_none=True)
        eager, logits = EagerMixer(model), []
        with torch.enable_grad():
            for piece, labels in zip(images.split(PIECE), self._labels.split(PIECE), strict=True):
                logits.append(eager(piece.double()))
                (F.cross_entropy(logits[-1], labels, reduction="sum") / len(self._labels)).backward()
        return _results(torch.cat(logits), dict(model.named_parameters()))


def _extended(provider: Provider, run: Callable[[Function, Tensor], Results]) -> Provider:
    """``provider`` with ``run(its function, x)`` in place of its function; the bare products stay what they are."""

    def build() -> tuple[Callable[[Tensor], Results], str | None]:
        forward, detail = provider.build()
        return partial(run, forward), detail

    return replace(provider, build=build) if provider.computes_case else provider


def _results(logits: Tensor, parameters: dict[str, Tensor]) -> Results:
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in parameters.items()}
    return {"output": logits.detach(), **gradients}


def _gradient_names(level: str) -> list[str]:
    names = Weights.names(level)
    return [f"gradient of {name}" for name in ("x", *names)]


def _incoming(inputs: list[Tensor], x: Tensor) -> Tensor:
    place = next(index for index, each in enumerate(inputs) if each.data_ptr() == x.data_ptr())
    return inputs[place - 1]
