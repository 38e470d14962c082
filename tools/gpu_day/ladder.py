"""Ladder: the kernels of csrc/sm90 in each of their variants, beside the products alone by PyTorch.

Of token mixing: blocks alone or in clusters that share the weights, two or three consumers, GELU under a product or
behind it. Of the channel products: each tile, alone or in clusters. One row a variant; the channel products' row that
the backend takes says so, of token mixing that is "default".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import reference
from blocks import make_block
from sm90_variants import PRODUCTS, SCHEDULES, ChannelProducts, TokenMixing
from torch import Tensor

from mixer_kernels.bench.timing import measure, rotated_inputs
from mixer_kernels.compile_check import TORCH_DTYPES
from mixer_kernels.shapes import SPECS, MixerShape

from .kernels import absent, why_not
from .results import HOPPER
from .sample import compare
from .tasks import Settings, Task

SECONDS = 0.15  # to time each variant
BARE = "products alone"

Case = tuple[MixerShape, str, int]  # shape, dtype, batch size


def tasks(settings: Settings) -> list[Task]:
    reason = why_not(settings, HOPPER)
    if reason is not None:
        return [absent(HOPPER, reason)]
    found = []
    for case in _cases(settings):
        found.append(_task(settings, "token mixing", case, _token_mixing))
        found += [_task(settings, product, case, _channel_product(product)) for product in PRODUCTS]
    return found


def _cases(settings: Settings) -> list[Case]:
    if settings.rehearse:
        return [(MixerShape(S=49, C=72, D_S=24, D_C=264), "bf16", 2)]
    shapes = {name: SPECS[name].block_shape() for name in ("B/16", "B/32", "S/16", "L/16")}
    return [
        *((shapes["B/16"], "bf16", batch_size) for batch_size in (256, 32, 1)),
        *((shapes[name], "bf16", 256) for name in ("B/32", "L/16", "S/16")),
        (shapes["B/16"], "fp16", 256),
    ]


Functions = dict[str, Callable[[Any], Any]]  # of what belongs to an input, by the variant's name


def _token_mixing(first: TokenMixing) -> tuple[Functions, str]:
    def bare(mixing: TokenMixing) -> Tensor:
        _, _, w1, _, w2, _ = mixing.parameters
        return F.linear(F.linear(mixing.x.transpose(1, 2), w1), w2)

    def in_variant(name: str) -> Callable[[TokenMixing], dict[str, Tensor]]:
        return lambda mixing: {"u": mixing.run(name)}

    return {**{name: in_variant(name) for name in first.variants}, BARE: bare}, "default"


def _channel_product(product: str) -> Callable[[ChannelProducts], tuple[Functions, str]]:
    def bare(products: ChannelProducts) -> Tensor:
        _, _, w3, _, w4, _ = products.parameters
        left, right = {
            "fc1": (products.u.flatten(0, 1), w3.t()),
            "fc2": (products.a, w4.t()),
            "gelu_backward": (products.g.flatten(0, 1), w4),
        }[product]
        return left @ right

    def on_schedule(name: str) -> Callable[[ChannelProducts], dict[str, Tensor]]:
        return lambda products: products.run(product, name)

    def functions(first: ChannelProducts) -> tuple[Functions, str]:
        return {**{name: on_schedule(name) for name in SCHEDULES}, BARE: bare}, first.chosen(product)

    return functions


def _task(settings: Settings, what: str, case: Case, functions_of: Callable[[Any], tuple[Functions, str]]) -> Task:
    shape, dtype, batch_size = case

    def run(values: dict[str, Any]) -> None:
        device = torch.device(settings.device, None if settings.rehearse else torch.cuda.current_device())
        block = make_block(shape, TORCH_DTYPES[dtype], settings.device)
        make = TokenMixing if what == "token mixing" else ChannelProducts
        xs = rotated_inputs((batch_size, shape.S, shape.C), TORCH_DTYPES[dtype], device)
        inputs = [make(block, x) for x in xs]
        functions, chosen = functions_of(inputs[0])
        _check(values, what, inputs[0], functions, TORCH_DTYPES[dtype])
        candidates = {name: _of_input(xs, inputs, function) for name, function in functions.items()}
        samples = measure(candidates, xs, seconds=0.001 if settings.rehearse else SECONDS)
        bare = samples[BARE].median
        values["rows"] = [
            {
                "config": f"{name}, chosen" if name == chosen else name,
                "ms": 1e3 * each.median,
                "vs_bare": each.median / bare,
            }
            for name, each in samples.items()
        ]

    shape_name = f"{shape.S}x{shape.C} ({shape.D_S}, {shape.D_C})"
    return Task(f"{what} {shape_name} batch {batch_size}", run, dtype, shape_name, backend=HOPPER)


def _check(values: dict[str, Any], what: str, first: Any, functions: Functions, dtype: torch.dtype) -> None:
    """A variant that is fast and wrong is neither."""

    def expected(each: torch.dtype) -> dict[str, Tensor]:
        return {"u": first.expected(each)} if what == "token mixing" else first.expected(what, each)

    eager, exact = expected(dtype), reference(lambda: expected(torch.float64), dtype)
    for variant, function in functions.items():
        if variant != BARE:
            for name, actual in function(first).items():
                compare(values, actual, eager[name], exact[name], f"{name} in variant {variant!r}")


def _of_input(xs: Iterable[Tensor], inputs: Iterable[Any], function: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
    of = {x.data_ptr(): each for x, each in zip(xs, inputs, strict=True)}
    return lambda x: function(of[x.data_ptr()])
