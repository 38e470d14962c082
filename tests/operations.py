"""One call of each function of the functional API, in sizes that letters stand for: for tests and tools/gpu_day."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mixer_kernels.functional as F

PIECE = 16  # images at a time in float64
TOKENS = "w1:D,S b1:D w2:S,D b2:S "
CHANNELS = "w3:H,C b3:H w4:C,H b4:C "
PATCHES = "gamma1:F beta1:F w1:Q,P b1:Q w2:P,Q b2:P w_gate1:P,P b_gate1:P "
FEATURES = "gamma2:F beta2:F w3:G,F b3:G w4:F,G b4:F w_gate2:F,F b_gate2:F "
# Function, x without the batch, parameters, options; the letters are `sizes`.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], str, str, dict[str, Any]]] = {
    "token_mixing": (F.token_mixing, "S,C", "gamma:C beta:C " + TOKENS, {}),
    "channel_mixing": (F.channel_mixing, "S,C", "gamma:C beta:C " + CHANNELS, {}),
    "mixer_block": (F.mixer_block, "S,C", f"gamma1:C beta1:C {TOKENS} gamma2:C beta2:C {CHANNELS}", {}),
    "mixer_block swiglu": (
        F.mixer_block, "S,C",
        "gamma1:C beta1:C w1:2D,S b1:2D w2:S,D b2:S gamma2:C beta2:C w3:H,C b3:H w4:C,M b4:C", {"activation": "swiglu"},
    ),
    "token_linear": (F.token_linear, "S,C", "alpha:C beta:C w:S,S b:S scale:C", {}),
    "channel_mixing affine": (F.channel_mixing, "S,C", "gamma:C beta:C " + CHANNELS, {"norm": "affine"}),
    "spatial_gating": (F.spatial_gating, "S,H", "gamma:M beta:M w:S,S b:S", {}),
    "gated_channel_mixing": (
        F.gated_channel_mixing, "S,C",
        "gamma:C beta:C w1:H,C b1:H gate_gamma:M gate_beta:M w_gate:S,S b_gate:S w2:C,M b2:C", {},
    ),
    "gated_mixing patches": (F.gated_mixing, "N,P,F", PATCHES, {"axis": -2}),
    "gated_mixing sigmoid": (F.gated_mixing, "N,P,F", FEATURES, {"axis": -1, "gate": "sigmoid", "norm": "affine"}),
    "gated_mixing features": (F.gated_mixing, "N,P,F", FEATURES, {"axis": -1}),
    "gated_mixing channels": (
        F.gated_mixing, "N,P,F",
        "gamma:F beta:F w1:O,N b1:O w2:N,O b2:N w_gate:N,N b_gate:N", {"axis": -3, "gate_first": True},
    ),
    "gated_mixer_layer": (F.gated_mixer_layer, "N,P,F", PATCHES + FEATURES, {}),
    "gated_mixer_layer sigmoid": (
        F.gated_mixer_layer, "N,P,F", PATCHES + FEATURES, {"gate": "sigmoid", "norm": "affine"},
    ),
}  # fmt: skip


class Case(NamedTuple):
    """One call: ``x``, the gradient of the output, the parameters."""

    function: Callable[..., Tensor]
    x: Tensor
    dy: Tensor
    parameters: dict[str, Tensor]
    options: dict[str, Any]

    def results(self, backend: str) -> dict[str, Tensor]:
        """The output, and the gradients of x and of all parameters."""
        leaves = {name: t.detach().requires_grad_() for name, t in {"x": self.x, **self.parameters}.items()}
        y = self.function(*leaves.values(), **self.options, backend=backend)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"output": y.detach(), **named}

    def exact(self) -> dict[str, Tensor]:
        """``results`` in float64."""
        wide = {name: t.double() for name, t in self.parameters.items()}
        found = [
            self._replace(x=x.double(), dy=dy.double(), parameters=wide).results("torch")
            for x, dy in zip(self.x.split(PIECE), self.dy.split(PIECE), strict=True)
        ]
        joined = {name: torch.cat([each[name] for each in found]) for name in ("output", "gradient of x")}
        return {name: joined[name] if name in joined else sum(each[name] for each in found) for name in found[0]}


def make(name: str, sizes: dict[str, int], batch: int, dtype: torch.dtype, device: str) -> Case:
    """A call of ``OPERATIONS[name]`` on random numbers."""
    function, x_shape, parameters, options = OPERATIONS[name]

    def random(shape: str, std: float = 0.3, mean: float = 0.0, batch: tuple[int, ...] = ()) -> Tensor:
        extents = (*batch, *(sizes[letter] for letter in shape.split(",")))
        return (torch.randn(extents, device=device) * std + mean).to(dtype)

    x = random(x_shape, 1.0, batch=(batch,))
    made = {}
    for key, _, shape in (each.partition(":") for each in parameters.split()):
        scales = key.strip("12") in ("gamma", "alpha", "scale", "gate_gamma")
        last = sizes[shape.split(",")[-1]]
        made[key] = random(shape, last**-0.5) if "," in shape else random(shape, mean=float(scales))
    dy = random("S,M" if function is F.spatial_gating else x_shape, 1.0, batch=(batch,))
    return Case(function, x, dy, made, dict(options))
