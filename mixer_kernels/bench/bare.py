"""The bare matrix products: the same FLOPs through the library that PyTorch calls, and nothing else.

No norm, bias, activation, residual or transpose, all buffers allocated beforehand: what the rest of a block costs is
what a provider takes longer than this. Of the token half's products there are several layouts; the fastest here is
taken. Forward and backward are three times the forward products: each has two in the backward pass, of the same FLOPs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..shapes import MixerShape
from .cases import Case
from .timing import measure

ALIGNMENT = 16  # bytes; rows that are no multiple of it keep a product from the library's fastest kernels
TRIAL_SECONDS = 0.02


class BareProducts(NamedTuple):
    """``run(x)`` computes the products of one block or half, with the next of its weights; ``layout`` says how."""

    run: Callable[[Tensor], Tensor]
    layout: str


def bare_function(case: Case, inputs: list[Tensor], num_blocks: int = 1) -> BareProducts:
    """The products of the token half, the channel half or the block on ``inputs [B, S, C]``.

    Calls take turns among ``num_blocks`` sets of weights, so that a model's blocks do not find theirs in the cache.
    """
    products = _forward_products(case, inputs, num_blocks)
    if case.passes == 1:
        return products

    def run(x: Tensor) -> Tensor:
        for _ in range(case.passes):
            y = products.run(x)
        return y

    return BareProducts(run, f"{case.passes} x ({products.layout})")


def _forward_products(case: Case, inputs: list[Tensor], num_blocks: int) -> BareProducts:
    if case.level == "channel":
        return _channel_products(case, inputs, num_blocks)
    layouts = _token_layouts(case, inputs, num_blocks)
    samples = measure({each.layout: each.run for each in layouts}, inputs, seconds=TRIAL_SECONDS)
    token = min(layouts, key=lambda each: samples[each.layout].median)
    if case.level == "token":
        return token
    channel = _channel_products(case, inputs, num_blocks)

    def run(x: Tensor) -> Tensor:
        token.run(x)
        return channel.run(x)  # the same x: products need not feed each other to cost what they cost

    return BareProducts(run, f"{token.layout}; {channel.layout}")


def bare_model(case: Case, model: torch.nn.Module, inputs: list[Tensor]) -> BareProducts:
    """The products of patch embedding, blocks and classifier on ``inputs [B, in_chans, H, W]``."""
    shape, batch_size, num_blocks = case.shape, case.batch_size, len(model.blocks)
    options = _options(case, inputs)
    streams = [torch.randn(batch_size, shape.S, shape.C, **options) for _ in range(2)]
    block = bare_function(case, streams, num_blocks)
    patch = model.stem.proj.weight.detach().flatten(1)
    stem = torch.empty(batch_size * shape.S, shape.C, **options)
    head = None if getattr(model.head, "weight", None) is None else model.head.weight.detach()
    pooled = torch.randn(batch_size, shape.C, **options)

    def run(images: Tensor) -> Tensor:
        for _ in range(min(case.passes, 2)):  # the images need no gradient
            torch.mm(images.view(batch_size * shape.S, patch.shape[1]), patch.T, out=stem)
        for index in range(num_blocks):
            block.run(streams[index % 2])
        logits = pooled
        if head is not None:
            for _ in range(case.passes):
                logits = torch.mm(pooled, head.T)
        return logits

    return BareProducts(run, block.layout)


def products_of(model: torch.nn.Module, x: Tensor) -> list[tuple[int, Tensor]]:
    """(rows, weight) of each product with weights that ``model(x)`` computes, in their order."""
    found: list[tuple[int, Tensor]] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight = module.weight.detach().flatten(1)
        found.append((output.numel() // len(weight), weight))

    layers = [each for each in model.modules() if isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))]
    hooks = [each.register_forward_hook(note) for each in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def bare_layers(products: list[tuple[int, Tensor]], passes: int = 1) -> BareProducts:
    """Those of ``products_of``, each ``passes`` times; operands of one size share a buffer, and so do results."""
    operands: dict[tuple[int, int], Tensor] = {}
    results: dict[tuple[int, int], Tensor] = {}
    for rows, weight in products:
        for buffers, columns in ((results, weight.shape[0]), (operands, weight.shape[1])):
            if (rows, columns) not in buffers:
                buffers[rows, columns] = torch.randn(rows, columns, dtype=weight.dtype, device=weight.device)

    def run(x: Tensor) -> Tensor:
        for rows, weight in products:
            result = results[rows, weight.shape[0]]
            for _ in range(passes):
                torch.mm(operands[rows, weight.shape[1]], weight.T, out=result)
        return result

    return BareProducts(run, f"{len(products)} products")


def _channel_products(case: Case, inputs: list[Tensor], num_blocks: int) -> BareProducts:
    """``h = x . W3'``, ``y = h . W4'`` over all rows at once."""
    shape, options = case.shape, _options(case, inputs)
    rows = case.batch_size * shape.S
    weights = _weights(shape.C, shape.D_C, num_blocks, options)
    h, y = torch.empty(rows, shape.D_C, **options), torch.empty(rows, shape.C, **options)

    def run(x: Tensor) -> Tensor:
        w3, w4 = next(weights)
        torch.mm(x.view(rows, shape.C), w3.T, out=h)
        return torch.mm(h, w4.T, out=y)

    return BareProducts(run, "channels: mm")


def _token_layouts(case: Case, inputs: list[Tensor], num_blocks: int) -> list[BareProducts]:
    """All ways to lay out the token half's products, S as it is and S padded to ``ALIGNMENT``."""
    S, step = case.shape.S, ALIGNMENT // case.dtype.itemsize
    layouts = []
    for tokens in dict.fromkeys((S, -(-S // step) * step)):
        label = f"S = {tokens}" if tokens == S else f"S padded to {tokens}"
        layouts.append(_rows_of_channels(case, inputs, num_blocks, tokens, f"tokens: mm, {label}"))
        layouts.append(_image_by_image(case, inputs, num_blocks, tokens, f"tokens: bmm, {label}"))
    return layouts


def _rows_of_channels(case: Case, inputs: list[Tensor], num_blocks: int, tokens: int, layout: str) -> BareProducts:
    """``[B*C, S] . W1'``, ``[B*C, D_S] . W2'``: as in eager PyTorch, where the transpose has been paid for before."""
    shape, options = case.shape, _options(case, inputs)
    rows = case.batch_size * shape.C
    weights = _weights(tokens, shape.D_S, num_blocks, options)
    h, y = torch.empty(rows, shape.D_S, **options), torch.empty(rows, tokens, **options)
    operand = _operand(shape, tokens, (rows, tokens), inputs, options)

    def run(x: Tensor) -> Tensor:
        w1, w2 = next(weights)
        torch.mm(operand(x), w1.T, out=h)
        return torch.mm(h, w2.T, out=y)

    return BareProducts(run, layout)


def _image_by_image(case: Case, inputs: list[Tensor], num_blocks: int, tokens: int, layout: str) -> BareProducts:
    """``W1 . x[b]``, ``W2 . h[b]`` for each image: no transpose at all."""
    shape, batch_size, options = case.shape, case.batch_size, _options(case, inputs)
    weights = _weights(tokens, shape.D_S, num_blocks, options)
    h = torch.empty(batch_size, shape.D_S, shape.C, **options)
    y = torch.empty(batch_size, tokens, shape.C, **options)
    operand = _operand(shape, tokens, (batch_size, tokens, shape.C), inputs, options)

    def run(x: Tensor) -> Tensor:
        w1, w2 = next(weights)
        torch.bmm(w1.expand(batch_size, -1, -1), operand(x), out=h)
        return torch.bmm(w2.expand(batch_size, -1, -1), h, out=y)

    return BareProducts(run, layout)


def _operand(
    shape: MixerShape, tokens: int, size: tuple[int, ...], inputs: list[Tensor], options: dict
) -> Callable[[Tensor], Tensor]:
    """``x`` itself seen as ``size``; where padded, a buffer of that size for each ``x``, so that these rotate too."""
    if tokens == shape.S:
        return lambda x: x.view(size)
    buffers = {x.data_ptr(): torch.randn(size, **options) for x in inputs}
    return lambda x: buffers[x.data_ptr()]


def _weights(width: int, hidden: int, num_blocks: int, options: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights of both products, ``[hidden, width]`` and ``[width, hidden]``, block after block without end."""
    return itertools.cycle(
        [
            (torch.randn(hidden, width, **options) / width**0.5, torch.randn(width, hidden, **options) / hidden**0.5)
            for _ in range(num_blocks)
        ]
    )


def _options(case: Case, inputs: list[Tensor]) -> dict:
    return {"dtype": case.dtype, "device": inputs[0].device}
