"""The launches of a block, counted: the package's own code runs on meta tensors, and every launch is written down.

What a launch moves are the tensors that it is given, each once: what it reads again comes from a cache at best. What it
computes is read off its tile and its grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import triton as backend
from ..backends.arguments import Half, Options, precision_of
from ..backends.backward import Pass, channel_mixing_backward, differentiate, token_mixing_backward
from ..backends.rounding import cdiv, round_up
from ..backends.triton.launch import intercept_launches
from ..shapes import MixerShape
from ..tuning.target import Target, assume_target

# Of PyTorch's operators these launch nothing.
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias")
_LIBRARY_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products: the ``useful`` ones, which the result needs, and what is ``executed`` with padding and
    recomputation; in how many ``tiles``, with so many ``turns`` of the hot loop each."""

    useful: int = 0
    executed: int = 0
    tiles: int = 0
    turns: int = 0


@dataclass(frozen=True)
class Launch:
    """``kernel``, ``arguments`` and ``options`` as Triton takes them; None and empty for PyTorch's own."""

    name: str
    programs: int | None
    bytes: int
    work: Work
    kernel: Any = None
    arguments: tuple = ()
    options: dict[str, Any] | None = None

    @property
    def is_library(self) -> bool:
        return self.kernel is None


@dataclass(frozen=True)
class Block:
    """One call of a block: ``dtype`` of the products, ``stream`` of x; ``frozen``: its weights are packed already."""

    shape: MixerShape
    batch_size: int
    dtype: torch.dtype
    stream: torch.dtype
    training: bool = False
    frozen: bool = False


def launches(block: Block, target: Target) -> list[Launch]:
    """Of the forward pass of ``block`` and, in training, of the backward pass, in order. Without dropout."""
    found: list[Launch] = []

    def note(kernel, grid, arguments, options) -> None:
        name = kernel.__name__.strip("_")
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        work = work_of(name, named, block.shape)
        found.append(Launch(name, grid[0], bytes_of(arguments), work, kernel, arguments, options))

    with assume_target(target), intercept_launches(note), _Operators(found):
        for _ in _passes(block, found):
            pass
    return found


def bytes_of(arguments: Any) -> int:
    """Of the tensors among ``arguments``, each part of memory once."""
    parts = {}
    for each in _tensors(arguments):
        if each.numel():
            parts[each.untyped_storage()._cdata, each.storage_offset(), each.shape] = each.numel() * each.itemsize
    return sum(parts.values())


def work_of(name: str, named: dict[str, Any], shape: MixerShape) -> Work:
    """Products of Triton's kernel ``name`` by its arguments and options. KeyError where they are not what a formula
    expects, ValueError where there is none."""
    if any(word in name for word in ("statistics", "norm", "branch", "pack", "sum_parts")):
        return Work()
    if name in ("token_mixing_fwd_kernel", "token_mixing_bwd_kernel"):
        batch_size, _, channels = named["x_ptr"].shape
        depth, tokens = named["D"], named["w1_ptr"].shape[1]
        rows = batch_size * round_up(channels, named["BLOCK_C"])
        # The backward pass computes z again: three products, two of which the gradients need.
        products = 3 if name == "token_mixing_bwd_kernel" else 2
        executed = 2 * products * rows * tokens * depth
        tiles = rows // named["BLOCK_C"]
        return Work(shape.token_flops(batch_size), executed, tiles, depth // named["BLOCK_D"])
    if name in ("token_weight_gradient_kernel", "token_weight_gradient_descriptor_kernel"):
        steps, splits = named["B"] * cdiv(named["C"], named["BLOCK_C"]), named["SPLITS"]
        tiles = cdiv(named["M"], named["BLOCK_M"]) * cdiv(named["N"], named["BLOCK_N"])
        executed = 2 * tiles * named["BLOCK_M"] * named["BLOCK_N"] * steps * named["BLOCK_C"]
        return Work(shape.token_flops(named["B"]) // 2, executed, tiles * splits, cdiv(steps, splits))
    if name in ("channel_product_kernel", "channel_product_descriptor_kernel"):
        return _product(named, named["M"], named["N"], named["K"])
    if name in ("channel_gelu_bwd_kernel", "channel_gelu_bwd_descriptor_kernel"):
        return _product(named, named["M"], named["D_C"], named["C"])
    raise ValueError(f"cost knows no formula for the products of {name}: add it to work_of in cost/launches.py")


def _product(named: dict[str, Any], rows: int, columns: int, depth: int) -> Work:
    tiles, turns = cdiv(rows, named["BLOCK_M"]) * cdiv(columns, named["BLOCK_N"]), cdiv(depth, named["BLOCK_K"])
    tile = named["BLOCK_M"] * named["BLOCK_N"] * named["BLOCK_K"]
    return Work(2 * rows * columns * depth, 2 * tiles * turns * tile, tiles, turns)


def _passes(block: Block, found: list[Launch]) -> Iterator[None]:
    shape = block.shape
    options = Options(block.dtype, precision=precision_of(block.dtype))

    def parameter(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=block.stream, device="meta")

    def half(columns: int, hidden: int) -> Half:
        fc1, fc2 = (parameter(hidden, columns), parameter(hidden)), (parameter(columns, hidden), parameter(columns))
        return Half(parameter(shape.C), parameter(shape.C), *fc1, *fc2)

    x = torch.empty(block.batch_size, shape.S, shape.C, dtype=block.stream, device="meta")
    tokens, channels = half(shape.S, shape.D_S), half(shape.C, shape.D_C)
    if not block.training:
        packing = backend.Packing(block.dtype)
        backend.mixer_block_forward(x, tokens, channels, options, 1e-6, packing)
        if block.frozen:
            found.clear()
            backend.mixer_block_forward(x, tokens, channels, options, 1e-6, backend.Packing(block.dtype, packing.made))
        yield
        return
    u, *token_kept = backend.token_mixing_forward(x, tokens, options)
    _, *channel_kept = backend.channel_mixing_forward(u, channels, options, keep_z=True)
    yield
    for backward, inputs, kept, parameters in (
        (channel_mixing_backward, u, channel_kept, channels),
        (token_mixing_backward, x, token_kept, tokens),
    ):
        wanted = [True] * (1 + len(parameters))
        dy = torch.empty(inputs.shape, dtype=inputs.dtype, device="meta")
        differentiate(backward, Pass(backend, dy, kept, inputs, options, wanted), (parameters,))
    yield


class _Operators(TorchDispatchMode):
    """Writes PyTorch's own launches down: every operator whose result is no view of what it was given."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and name not in _NO_LAUNCH and any(True for _ in _tensors((args, result))):
            self._found.append(
                Launch(f"aten.{name}", None, bytes_of((args, kwargs, result)), _library_work(name, args))
            )
        return result


def _library_work(name: str, args: tuple) -> Work:
    if name not in _LIBRARY_PRODUCTS:
        return Work()
    left, right = [each for each in args if isinstance(each, Tensor)][-2:]
    flops = 2 * left.numel() * right.shape[-1]
    return Work(flops, flops)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_tensors, value))
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif hasattr(value, "base") and isinstance(value.base, Tensor):  # a tensor descriptor
        yield value.base
