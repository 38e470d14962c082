"""Inputs for kernel tests: parameters of a block, ``x`` in the layouts that people have, eager and exact results."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
from torch import Tensor

import mixer_kernels.functional as F
from mixer_kernels.accuracy import Reference, reference
from mixer_kernels.shapes import MixerShape

TOKEN_NAMES = ("gamma1", "beta1", "w1", "b1", "w2", "b2")
CHANNEL_NAMES = ("gamma2", "beta2", "w3", "b3", "w4", "b4")
KERNEL_BACKENDS = ("triton", "cuda")
PRODUCTS = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
    "cuda:sm90": (torch.float16, torch.bfloat16),
}  # the dtypes of the products that a backend has
LAYOUTS = ("contiguous", "transposed", "channel slice", "offset")


def kernels_in(*dtypes: torch.dtype):
    """Parametrizes a test over ``backend`` and ``dtype``: each backend with kernels in those of ``dtypes`` it has."""
    pairs = [
        pytest.param(backend, dtype, id=f"{backend} {dtype}")
        for backend in KERNEL_BACKENDS
        for dtype in dtypes
        if dtype in PRODUCTS[backend]
    ]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, indirect=["backend"])


def finest(backend: str) -> torch.dtype:
    """The dtype of ``backend`` that rounds least."""
    return PRODUCTS[backend][0]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's parameters in one dtype, by the names of ``functional.mixer_block``."""

    shape: MixerShape
    parameters: dict[str, Tensor | None]

    def to(self, dtype: torch.dtype) -> Block:
        return Block(self.shape, {n: None if p is None else p.to(dtype) for n, p in self.parameters.items()})

    def token(self) -> list[Tensor | None]:
        return [self.parameters[name] for name in TOKEN_NAMES]

    def channel(self) -> list[Tensor | None]:
        return [self.parameters[name] for name in CHANNEL_NAMES]


def make_block(
    shape: MixerShape, dtype: torch.dtype, device: str, affine: bool = True, bias: bool = True, gain: float = 1.0
) -> Block:
    """Random parameters at the scale of trained ones; ``gain`` scales gamma."""
    S, C, D_S, D_C = dataclasses.astuple(shape)

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device) * columns**-0.5

    def vector(size: int, wanted: bool, offset: float = 0.0) -> Tensor | None:
        return offset + 0.3 * torch.randn(size, device=device) if wanted else None

    parameters = {
        "w1": weight(D_S, S), "b1": vector(D_S, bias), "w2": weight(S, D_S), "b2": vector(S, bias),
        "w3": weight(D_C, C), "b3": vector(D_C, bias), "w4": weight(C, D_C), "b4": vector(C, bias),
    }  # fmt: skip
    for half in "12":
        gamma = vector(C, affine, offset=1.0)
        parameters[f"gamma{half}"] = None if gamma is None else gain * gamma
        parameters[f"beta{half}"] = vector(C, affine)
    return Block(shape, parameters).to(dtype)


def make_x(
    batch_size: int, shape: MixerShape, dtype: torch.dtype, device: str, layout: str = "contiguous", mean: float = 0.0
) -> Tensor:
    """``x [B, S, C]`` with rows of ``mean`` standard deviations and the strides of ``layout``."""
    S, C = shape.S, shape.C
    values = (torch.randn(batch_size, S, C, device=device) + mean).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "transposed":  # timm's patch embedding: flatten(2).transpose(1, 2)
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channel slice":
        wide = torch.full((batch_size, S, C + 5), torch.nan, dtype=dtype, device=device)
        wide[..., 2 : C + 2] = values
        return wide[..., 2 : C + 2]
    if layout == "offset":
        flat = torch.full((values.numel() + 1,), torch.nan, dtype=dtype, device=device)
        flat[1:] = values.flatten()
        return flat[1:].view(batch_size, S, C)
    raise ValueError(layout)


class Watched:
    """The compiled module of the cuda backend, with the names of the calls that launch kernels noted in ``calls``.

    Without ``run`` they are noted only.
    """

    SIZES = (
        "padded_tokens", "weight_gradient_splits", "gelu_backward_tiles", "norm_backward_parts", "driver_version",
        "sm90_takes", "sm90_padded_tokens", "sm90_gelu_backward_tiles", "sm90_channel_schedule",
    )  # fmt: skip

    def __init__(self, module: ModuleType, run: bool = True) -> None:
        self.module, self.run = module, run
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        value = getattr(self.module, name)
        if not callable(value) or name in self.SIZES:
            return value

        def call(*args, **kwargs):
            self.calls.append(name)
            return value(*args, **kwargs) if self.run else None

        return call


def run(block: Block, x: Tensor, backend: str, **options) -> Tensor:
    """``functional.mixer_block`` without gradients."""
    with torch.no_grad():
        return F.mixer_block(x, **block.parameters, backend=backend, **options)


def run_exact(
    block: Block, x: Tensor, dtype: torch.dtype | None = None, products: torch.dtype | None = None, **options
) -> Reference:
    """The block in float64 on the torch backend, to judge results in ``dtype`` (default: that of ``x``)."""
    wide = block.to(torch.float64)
    return reference(lambda: run(wide, x.double(), "torch", **options), dtype or x.dtype, products)
