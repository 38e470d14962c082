"""``python -m gpu_day.sanitized BACKEND``: every kernel of a CUDA backend on tiny inputs, for a sanitizer to watch.

Inputs are made on the CPU and copied: that memory was written, a sanitizer then knows whatever it watches. Whether the
results are right, other phases tell.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from blocks import Block
from sm90_variants import PRODUCTS, SCHEDULES, ChannelProducts, TokenMixing
from torch import Tensor

from mixer_kernels.backends.cuda import library
from mixer_kernels.functional import MEMORY_MODES
from mixer_kernels.shapes import MixerShape

from .results import HOPPER
from .sample import Sample, gradients_of, ours

DONE = "gpu_day.sanitized: calls:"
NOISE = {"dropout_p": 0.2, "drop_path_p": 0.3}

SAMPLES = tuple(
    Sample(MixerShape(*sizes), dtype, stream, batch_size=2, layout=layout, affine=full, bias=full, backend=backend)
    for backend, sizes, dtype, stream, layout, full in (
        ("cuda", (20, 24, 16, 32), "bf16", None, "contiguous", True),
        ("cuda", (17, 13, 7, 9), "fp16", None, "offset", False),
        ("cuda", (49, 40, 24, 48), "bf16", "fp32", "transposed", True),
        ("cuda", (257, 24, 16, 32), "bf16", None, "transposed", True),
        ("cuda", (257, 13, 7, 9), "fp16", "fp32", "channel slice", False),
        (HOPPER, (49, 72, 24, 96), "bf16", None, "contiguous", True),
        (HOPPER, (196, 72, 70, 40), "fp16", None, "contiguous", False),
        (HOPPER, (256, 136, 64, 264), "bf16", None, "contiguous", True),
    )
)


def main(arguments: list[str]) -> None:
    if "--beyond" in arguments:
        beyond()
    else:
        print(f"{DONE} {sum(1 for _ in calls('cuda', *arguments))}", flush=True)


def calls(device: str, backend: str) -> Iterator[Tensor]:
    """Forward, then forward and backward in every memory mode, the last with dropout and stochastic depth.

    What csrc/sm90 has in several variants in each of them, too.
    """
    for sample in SAMPLES:
        if sample.backend != backend:
            continue
        block, x = sample.make("cpu")
        dy = torch.randn(x.shape).to(x.dtype).to(device)
        block = Block(block.shape, {n: None if p is None else p.to(device) for n, p in block.parameters.items()})
        x = _copied(x, device)
        yield _finished(ours(sample, "block", block, x))
        for memory in MEMORY_MODES:
            noise = NOISE if memory == MEMORY_MODES[-1] else {}
            yield _finished(gradients_of(sample, "block", block, x, dy, memory=memory, **noise)["x"])
        if backend == HOPPER and sample.affine:
            mixing, products = TokenMixing(block, x), ChannelProducts(block, x)
            yield from (_finished(mixing.run(variant)) for variant in mixing.variants)
            for product, schedule in itertools.product(PRODUCTS, SCHEDULES):
                yield from map(_finished, products.run(product, schedule).values())


def beyond() -> None:
    """One image more than there is memory for: what a sanitizer has to notice."""
    x = torch.ones(2, 20, 24, dtype=torch.bfloat16, device="cuda")
    g = torch.empty_like(x)
    kind = library.TYPES[x.dtype]
    library.loaded().branch_gradient(
        library.pointer(x), kind, (3, 20, 24), (0, 0.0, 0.0), library.pointer(g), kind, library.stream_of(x)
    )
    torch.cuda.synchronize()


def _copied(x: Tensor, device: str) -> Tensor:
    """With its strides, and with what lies between its elements."""
    elements = x.untyped_storage().nbytes() // x.itemsize
    storage = torch.as_strided(x, (elements,), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def _finished(result: Tensor) -> Tensor:
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
