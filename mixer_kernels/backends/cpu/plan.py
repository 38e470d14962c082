"""A forward pass as the compiled module takes it: all that calls on inputs of one layout have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import GatedHalf, Options
from .library import instruction_set, loaded

READ = (torch.float32, torch.bfloat16)
"""The dtypes in which tensors of a forward pass are read and written as they are."""


class Packing:
    """Weights in the order in which products in ``dtype`` read them, for an owner who promises that they stay:
    ``kept``, by the instruction set that they are packed for. Without an owner a call packs them for itself where that
    pays."""

    def __init__(self, dtype: torch.dtype, kept: Mapping[str, Tensor]) -> None:
        self._dtype, self._kept, self.made = dtype, kept, {}

    def packs(self, isa: str, *call: Any) -> Tensor:
        """Those of ``call``: kept, or made now."""
        name = f"{isa}, {self._dtype}"
        if name not in self._kept:
            module = loaded()
            self.made[name] = pack = torch.empty(module.pack_size(isa, *call), dtype=torch.float32, device="cpu")
            module.pack(isa, *call, pack.data_ptr())
            return pack
        return self._kept[name]


class ForwardPlan:
    """The pass on every ``x`` of this layout, all but the addresses of x and y; parameters are read where they are."""

    def __init__(
        self,
        x: Tensor,
        axis: int,
        mixers: Sequence[GatedHalf],
        eps: Sequence[float],
        options: Options,
        gate_first: bool,
        packing: Packing | None,
    ) -> None:
        given = [parameter for mixer in mixers for parameter in mixer]
        mixers = as_read(mixers)
        taken = [parameter for mixer in mixers for parameter in mixer]
        self.copies = [copy for copy, parameter in zip(taken, given, strict=True) if copy is not parameter]
        """Of parameters, and their packs unless they are kept: a plan that has some must not outlive its call."""
        self._dtype, self._is_readable, self._forward = x.dtype, readable(x) is x, None
        if x.numel() == 0:
            return
        isa, packs = instruction_set(), 0
        call = (input_of(readable(x)), axis, mixers_of(mixers, eps), noise_and_form(options, gate_first))
        if packing is not None:
            packs = packing.packs(isa, *call).data_ptr()
            self.copies += packing.made.values()
        self._forward = loaded().Forward(isa, *call, packs)

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """``y``; writes ``u``, what the first of two mixers gives, in float32."""
        dtype = self._dtype if self._dtype in READ else torch.float32
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        if self._forward is not None:
            x = x if self._is_readable else readable(x)
            self._forward(address(x), y.data_ptr(), address(u), torch.get_num_threads())
        return y if dtype is self._dtype else y.to(self._dtype)


def readable(x: Tensor) -> Tensor:
    """``x`` in a dtype that is read, with its features side by side."""
    is_dense = x.stride(-1) == 1 or x.shape[-1] == 1
    x = x if is_dense else x.contiguous()
    return x if x.dtype in READ else x.float()


def as_read(mixers: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    """Parameters of a call, contiguous: in bfloat16 if all are, else in float32."""
    if all([parameter is None or parameter.dtype is torch.bfloat16 for mixer in mixers for parameter in mixer]):
        return [[None if parameter is None else parameter.contiguous() for parameter in mixer] for mixer in mixers]
    return [in_float32(mixer) for mixer in mixers]


def in_float32(mixer: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if parameter is None else dense(parameter) for parameter in mixer]


def dense(t: Tensor) -> Tensor:
    """``t``, contiguous, in float32."""
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.contiguous().float()


def new_float32(t: Tensor) -> Tensor:
    """A contiguous tensor of ``t``'s shape."""
    return torch.empty_like(t, dtype=torch.float32, memory_format=torch.contiguous_format)


def input_of(x: Tensor) -> tuple[int | bool, ...]:
    """``[B, S, C]`` as ``[B, 1, S, C]``."""
    if x.dim() == 3:
        x = x.unsqueeze(1)
    return (address(x), *x.shape, *x.stride()[:3], x.dtype is torch.bfloat16)


def mixers_of(mixers: Sequence[Sequence[Tensor | None]], eps: Sequence[float]) -> tuple[tuple | bool, ...]:
    described = [(*map(address, mixer), mixer[2].shape[0], one_eps) for mixer, one_eps in zip(mixers, eps, strict=True)]
    return (*described, mixers[0][2].dtype is torch.bfloat16)


def noise_and_form(options: Options, gate_first: bool) -> tuple[bool, bool, bool, bool, bool, float, int]:
    return (
        gate_first,
        options.gate == "sigmoid",
        options.norm == "affine",
        options.tanh,
        options.dtype is torch.bfloat16,
        options.dropout_p,
        address(options.seed),
    )


def address(t: Tensor | None) -> int:
    """0 for None, which the kernels take for absent."""
    if t is None:
        return 0
    pointer = t.data_ptr()
    if pointer == 0 and t.numel() > 0:
        raise RuntimeError(f"a tensor of shape {tuple(t.shape)} has no memory: its storage was freed")
    return pointer
