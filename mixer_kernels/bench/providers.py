"""Who computes a case: eager PyTorch, ``torch.compile``, this package's backends, and the bare matrix products.

A provider is built for one case and then called with one input after another. What it needs besides (weights, buffers)
is allocated when it is built. Building raises ``CannotRun`` with the reason where it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, functional
from ..backends.arguments import Half
from ..shapes import MixerShape
from .bare import BareProducts, bare_function
from .cases import Case

EPS = 1e-6  # timm's
BACKENDS = backends.BACKENDS
PROVIDERS = ("eager", "compile", *reversed(BACKENDS), "bare")  # in the order of the rows
TRAINING_PROVIDERS = (  # one row a memory mode
    "eager", "compile", "torch", "triton fast", "triton min", "cuda:sm90 fast", "cuda:sm90 min", "cuda fast",
    "cuda min", "bare",
)  # fmt: skip


def provider_names(level: str, mode: str, device: torch.device) -> tuple[str, ...]:
    """The rows of a case, in their order. The token half saves the same in each memory mode. ``cpu`` does not train
    and has no channel half."""
    if mode == "train" and level != "token":
        return TRAINING_PROVIDERS
    has_cpu = device.type == "cpu" and mode == "infer" and level != "channel"
    return tuple(name for name in PROVIDERS if name != "cpu" or has_cpu)


def backend_and_memory(provider: str) -> tuple[str, str | None]:
    """What a row of this package runs on: the backend's name and the memory mode, None where there is no choice."""
    backend, _, memory = provider.partition(" ")
    return backend, memory or None


class CannotRun(Exception):
    """Why a provider has no row with figures here."""


@dataclass
class Provider:
    """``build`` returns the function to time, and a few words about it for the report's ``detail``."""

    name: str
    build: Callable[[], tuple[Callable[[Tensor], Any], str | None]]  # in mode "train" see training
    computes_case: bool = True  # False: it does less, so there is no result to compare with eager's


class Weights(NamedTuple):
    """One block's weights, as ``functional.mixer_block`` takes them."""

    tokens: Half
    channels: Half

    @classmethod
    def random(cls, shape: MixerShape, dtype: torch.dtype, device: torch.device) -> Weights:
        """Products of variance one, biases and norms away from 0 and 1, so that a missing one shows."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 0.2, mean: float = 0.0) -> Tensor:
            return (torch.randn(*size, device=device, generator=generator) * std + mean).to(dtype)

        def half(width: int, hidden: int) -> Half:
            return Half(
                normal(shape.C, mean=1.0),
                normal(shape.C),
                normal(hidden, width, std=width**-0.5),
                normal(hidden),
                normal(width, hidden, std=hidden**-0.5),
                normal(width),
            )

        return cls(half(shape.S, shape.D_S), half(shape.C, shape.D_C))

    @classmethod
    def names(cls, level: str) -> list[str]:
        """What ``half(level)`` returns, by name."""
        tokens, channels = ["gamma1", "beta1", "w1", "b1", "w2", "b2"], ["gamma2", "beta2", "w3", "b3", "w4", "b4"]
        return {"token": tokens, "channel": channels, "block": tokens + channels}[level]

    def half(self, level: str) -> list[Tensor]:
        """The arguments of ``functional``'s function of that level, after ``x``."""
        return {"token": [*self.tokens], "channel": [*self.channels], "block": self.all()}[level]

    def all(self) -> list[Tensor]:
        return [*self.tokens, *self.channels]

    def map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        return Weights(*(Half(*map(change, half)) for half in self))

    def require_gradients(self) -> Weights:
        """For training; in place."""
        return self.map(Tensor.requires_grad_)

    def double(self) -> Weights:
        return self.map(lambda weight: weight.detach().double())


def eager_token_mixing(x: Tensor, weights: Weights) -> Tensor:
    """What timm's ``MixerBlock`` runs for its first half, transposes included."""
    gamma, beta, w1, b1, w2, b2 = weights.tokens
    n = F.layer_norm(x, x.shape[-1:], gamma, beta, EPS)
    return x + F.linear(F.gelu(F.linear(n.transpose(1, 2), w1, b1)), w2, b2).transpose(1, 2)


def eager_channel_mixing(u: Tensor, weights: Weights) -> Tensor:
    """What timm's ``MixerBlock`` runs for its second half."""
    gamma, beta, w3, b3, w4, b4 = weights.channels
    n = F.layer_norm(u, u.shape[-1:], gamma, beta, EPS)
    return u + F.linear(F.gelu(F.linear(n, w3, b3)), w4, b4)


def eager_block(x: Tensor, weights: Weights) -> Tensor:
    return eager_channel_mixing(eager_token_mixing(x, weights), weights)


EAGER = {"token": eager_token_mixing, "channel": eager_channel_mixing, "block": eager_block}
FUSED = {
    "token": functional.token_mixing,
    "channel": functional.channel_mixing,
    "block": functional.mixer_block,
}


def function_providers(
    case: Case, inputs: list[Tensor], weights: Weights, *, compiler: str = "inductor", compile_mode: str | None = None
) -> list[Provider]:
    """Every provider of the token half, the channel half or the block, in the order of ``provider_names``.

    They compute the result alone; for mode "train" ``training.with_gradients`` takes each further.
    """
    eager = EAGER[case.level]

    def run_eager(x: Tensor) -> Tensor:
        return eager(x, weights)

    def run_on(name: str) -> Callable[[Tensor], Tensor]:
        function, arguments = FUSED[case.level], weights.half(case.level)
        backend, memory = backend_and_memory(name)
        options = {"backend": backend} if memory is None else {"backend": backend, "memory": memory}
        return lambda x: function(x, *arguments, eps=EPS, **options)

    bare = partial(bare_function, case, inputs)
    return all_providers(case, inputs[0].device, run_eager, run_on, bare, compiler=compiler, compile_mode=compile_mode)


def all_providers(
    case: Case,
    device: torch.device,
    eager: Callable[[Tensor], Tensor],
    run_on: Callable[[str], Callable[[Tensor], Tensor]],
    bare: Callable[[], BareProducts],
    *,
    compiler: str,
    compile_mode: str | None,
) -> list[Provider]:
    """In the order of ``provider_names``; ``run_on(name)`` makes the function of one of this package's rows."""
    return [
        Provider("eager", lambda: (eager, None)),
        compiled(eager, device, compiler, compile_mode),
        *(fused(name, run_on, case.dtype, device) for name in provider_names(case.level, case.mode, device)[2:-1]),
        Provider("bare", bare, computes_case=False),
    ]


def compiled(function: Callable[[Tensor], Tensor], device: torch.device, compiler: str, mode: str | None) -> Provider:
    """``torch.compile`` of the eager function, static shapes, no graph break.

    On a GPU in mode "max-autotune-no-cudagraphs": the choice among all kernels, without the CUDA graph, which would
    copy each input into its own buffer first; launch times are kept out of device time for every provider alike
    (see timing). On a CPU in the default mode. ``mode`` wins over both. With ``compiler="eager"`` the function is
    traced and not compiled.
    """
    if mode is None:
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" and compiler == "inductor" else "default"

    def build() -> tuple[Callable[[Tensor], Tensor], str]:
        # One code object serves all shapes; past a few PyTorch would stop compiling it.
        torch.compiler.reset()
        chosen = None if mode == "default" else mode
        run = torch.compile(function, backend=compiler, mode=chosen, fullgraph=True, dynamic=False)
        return run, f"mode={mode}"

    return Provider("compile", build)


def fused(
    name: str, run_on: Callable[[str], Callable[[Tensor], Tensor]], dtype: torch.dtype, device: torch.device
) -> Provider:
    """This package, as ``backend_and_memory(name)`` says."""
    backend, _ = backend_and_memory(name)

    def build() -> tuple[Callable[[Tensor], Tensor], None]:
        reason = backends.why_not(backend, device, dtype)
        if reason is None and device.type == "cpu" and backend not in ("cpu", "torch"):
            reason = "a stand-in for a GPU runs it on the CPU, whose speed says nothing about the kernels"
        if reason is not None:
            raise CannotRun(reason)
        return run_on(name), None

    return Provider(name, build)
