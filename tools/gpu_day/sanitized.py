"""``python -m gpu_day.sanitized``: every kernel of the CUDA backend on tiny inputs, for a sanitizer to watch.

Inputs are made on the CPU and copied: that memory was written, a sanitizer then knows whatever it watches. Whether the
results are right, other phases tell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from blocks import Block
from torch import Tensor

from mixer_kernels.backends.cuda import library
from mixer_kernels.functional import MEMORY_MODES
from mixer_kernels.shapes import MixerShape

from .sample import Sample, gradients_of, ours

DONE = "gpu_day.sanitized: calls:"
NOISE = {"dropout_p": 0.2, "drop_path_p": 0.3}

SAMPLES = tuple(
    Sample(MixerShape(*sizes), dtype, stream, batch_size=2, layout=layout, affine=full, bias=full, backend="cuda")
    for sizes, dtype, stream, layout, full in (
        ((20, 24, 16, 32), "bf16", None, "contiguous", True),
        ((17, 13, 7, 9), "fp16", None, "offset", False),
        ((49, 40, 24, 48), "bf16", "fp32", "transposed", True),
        ((257, 24, 16, 32), "bf16", None, "transposed", True),
        ((257, 13, 7, 9), "fp16", "fp32", "channel slice", False),
    )
)


def main(arguments: list[str]) -> None:
    if "--beyond" in arguments:
        beyond()
    else:
        print(f"{DONE} {sum(1 for _ in calls('cuda'))}", flush=True)


def calls(device: str) -> Iterator[Tensor]:
    """Forward, then forward and backward in every memory mode, the last with dropout and stochastic depth."""
    for sample in SAMPLES:
        block, x = sample.make("cpu")
        dy = torch.randn(x.shape).to(x.dtype).to(device)
        block = Block(block.shape, {n: None if p is None else p.to(device) for n, p in block.parameters.items()})
        x = _copied(x, device)
        yield _finished(ours(sample, "block", block, x))
        for memory in MEMORY_MODES:
            noise = NOISE if memory == MEMORY_MODES[-1] else {}
            yield _finished(gradients_of(sample, "block", block, x, dy, memory=memory, **noise)["x"])


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
