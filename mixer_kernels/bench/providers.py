"""Who computes a case: eager PyTorch, ``torch.compile``, this package's backends, and the bare matrix products.

A provider is built for one case and then called with one input after another. What it needs besides (weights, buffers)
is allocated when it is built. Building raises ``CannotRun`` with the reason where it cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, functional
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


@dataclass
class Weights:
    """One block's weights, in the shapes of ``functional.mixer_block``."""

    gamma1: Tensor
    beta1: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma2: Tensor
    beta2: Tensor
    w3: Tensor
    b3: Tensor
    w4: Tensor
    b4: Tensor

    @classmethod
    def random(cls, shape: MixerShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
        """Products of variance one, biases and norms away from 0 and 1, so that a missing one shows."""
        generator = torch.Generator(device).manual_seed(seed)
        S, C, D_S, D_C = shape.S, shape.C, shape.D_S, shape.D_C

        def normal(*size: int, std: float = 0.2, mean: float = 0.0) -> Tensor:
            return (torch.randn(*size, device=device, generator=generator) * std + mean).to(dtype)

        return cls(
            gamma1=normal(C, mean=1.0), beta1=normal(C),
            w1=normal(D_S, S, std=1 / math.sqrt(S)), b1=normal(D_S),
            w2=normal(S, D_S, std=1 / math.sqrt(D_S)), b2=normal(S),
            gamma2=normal(C, mean=1.0), beta2=normal(C),
            w3=normal(D_C, C, std=1 / math.sqrt(C)), b3=normal(D_C),
            w4=normal(C, D_C, std=1 / math.sqrt(D_C)), b4=normal(C),
        )  # fmt: skip

    @classmethod
    def empty(cls, shape: MixerShape, dtype: torch.dtype) -> Weights:
        """Sizes without data, on the meta device, for what needs gradients."""
        S, C, D_S, D_C = shape.S, shape.C, shape.D_S, shape.D_C
        sizes = (C,), (C,), (D_S, S), (D_S,), (S, D_S), (S,), (C,), (C,), (D_C, C), (D_C,), (C, D_C), (C,)
        return cls(*(torch.empty(size, dtype=dtype, device="meta", requires_grad=True) for size in sizes))

    @classmethod
    def names(cls, level: str) -> list[str]:
        """What ``half(level)`` returns, by name."""
        names = [field.name for field in fields(cls)]
        return {"token": names[:6], "channel": names[6:], "block": names}[level]

    def require_gradients(self) -> Weights:
        """For training; in place."""
        for weight in self.all():
            weight.requires_grad_()
        return self

    def all(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def half(self, level: str) -> list[Tensor]:
        """The arguments of ``functional``'s function of that level, after ``x``."""
        return [getattr(self, name) for name in self.names(level)]

    def double(self) -> Weights:
        return Weights(*(weight.detach().double() for weight in self.all()))


def eager_token_mixing(x: Tensor, weights: Weights) -> Tensor:
    """What timm's ``MixerBlock`` runs for its first half, transposes included."""
    n = F.layer_norm(x, x.shape[-1:], weights.gamma1, weights.beta1, EPS)
    a = F.gelu(F.linear(n.transpose(1, 2), weights.w1, weights.b1))
    return x + F.linear(a, weights.w2, weights.b2).transpose(1, 2)


def eager_channel_mixing(u: Tensor, weights: Weights) -> Tensor:
    """What timm's ``MixerBlock`` runs for its second half."""
    n = F.layer_norm(u, u.shape[-1:], weights.gamma2, weights.beta2, EPS)
    return u + F.linear(F.gelu(F.linear(n, weights.w3, weights.b3)), weights.w4, weights.b4)


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
    device = inputs[0].device

    def run_eager(x: Tensor) -> Tensor:
        return eager(x, weights)

    def run_on(name: str) -> Callable[[Tensor], Tensor]:
        function, arguments = FUSED[case.level], weights.half(case.level)
        backend, memory = backend_and_memory(name)
        options = {"backend": backend} if memory is None else {"backend": backend, "memory": memory}
        return lambda x: function(x, *arguments, eps=EPS, **options)

    return [
        Provider("eager", lambda: (run_eager, None)),
        compiled(run_eager, device, compiler, compile_mode),
        *(fused(name, lambda name=name: run_on(name), case.dtype, device) for name in ours_of(case, device)),
        bare(lambda: bare_function(case, inputs)),
    ]


def ours_of(case: Case, device: torch.device) -> tuple[str, ...]:
    """The names of this package's rows."""
    return provider_names(case.level, case.mode, device)[2:-1]


def compiled(
    function: Callable[[Tensor], Tensor],
    device: torch.device,
    compiler: str = "inductor",
    mode: str | None = None,
) -> Provider:
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
    name: str, function: Callable[[], Callable[[Tensor], Tensor]], dtype: torch.dtype, device: torch.device
) -> Provider:
    """This package, as ``backend_and_memory(name)`` says."""
    backend, _ = backend_and_memory(name)

    def build() -> tuple[Callable[[Tensor], Tensor], None]:
        reason = backends.why_not(backend, device, dtype)
        if reason is None and device.type == "cpu" and backend not in ("cpu", "torch"):
            reason = "a stand-in for a GPU runs it on the CPU, whose speed says nothing about the kernels"
        if reason is not None:
            raise CannotRun(reason)
        return function(), None

    return Provider(name, build)


def bare(products: Callable[[], BareProducts]) -> Provider:
    """The bare matrix products, nothing else."""

    def build() -> tuple[Callable[[Tensor], Tensor], str]:
        built = products()
        return built.run, built.layout

    return Provider("bare", build, computes_case=False)
