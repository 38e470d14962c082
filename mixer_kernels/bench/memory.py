"""How much memory a call takes, and how much of it training keeps from the forward for the backward pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.arguments import Options
from ..shapes import SPECS, MixerShape
from .providers import EPS, Weights, eager_block

IMAGES = 2  # in a batch whose saved bytes are counted: with one, some copies would be views


def memory_of(function: Callable[[Tensor], Any], x: Tensor, mode: str, parameters: Sequence[Tensor]) -> int | None:
    """Bytes: on a GPU the peak of one call over what was allocated before it; on a CPU what autograd saves, if at all.

    PyTorch does not count what the CPU's allocator hands out.
    """
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        with torch.no_grad():
            function(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    return (saved_bytes(lambda: function(x), parameters) or None) if mode == "train" else None


def saved_bytes(function: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes of the tensors that autograd saves while ``function`` runs: each storage once, ``parameters`` not."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that none of them is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    exempt = {parameter.untyped_storage()._cdata for parameter in parameters}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in exempt)


@dataclass(frozen=True)
class SavedRow:
    """What one block keeps of one image: ``eager`` PyTorch, or the kernels in memory mode ``fast`` or ``min``."""

    name: str
    S: int
    C: int
    D_S: int
    D_C: int
    dtype: str
    memory: str
    bytes_per_image: float
    vs_eager: float


def saved_rows(name: str, dtype_name: str, dtype: torch.dtype, img_size: int = 224) -> list[SavedRow]:
    """Saved bytes of a block of the paper's model ``name``.

    Counted on meta tensors, which have sizes and no data: no kernel runs, and none needs to be here.
    """
    shape = SPECS[name].block_shape(img_size)
    functions = {
        "eager": eager_block,
        "fast": lambda x, weights: _kernels(x, weights, dtype, keep_z=True),
        "min": lambda x, weights: _kernels(x, weights, dtype, keep_z=False),
    }
    counted = {memory: _saved_by(function, shape, dtype) / IMAGES for memory, function in functions.items()}
    sizes = asdict(shape)
    return [
        SavedRow(
            name, **sizes, dtype=dtype_name, memory=memory, bytes_per_image=count, vs_eager=count / counted["eager"]
        )
        for memory, count in counted.items()
    ]


def _saved_by(function: Callable[[Tensor, Weights], Tensor], shape: MixerShape, dtype: torch.dtype) -> int:
    weights = Weights.random(shape, dtype, torch.device("cpu")).map(lambda w: w.to("meta")).require_gradients()
    x = torch.empty(IMAGES, shape.S, shape.C, dtype=dtype, device="meta", requires_grad=True)
    return saved_bytes(lambda: function(x, weights), weights.all())


def _kernels(x: Tensor, weights: Weights, dtype: torch.dtype, keep_z: bool) -> Tensor:
    """The operators that ``functional.mixer_block`` calls on a GPU; on meta tensors they make tensors of the sizes.

    Which are the same for every backend with kernels.
    """
    options = (*Options(dtype, EPS).inputs, "cuda")
    u = ops.token_mixing(x, *weights.half("token"), *options)[0]
    return ops.channel_mixing(u, *weights.half("channel"), *options, keep_z)[0]


def saved_table(rows: Sequence[SavedRow]) -> str:
    """A line for eager and for each memory mode."""
    first = rows[0]
    sizes = f"S {first.S}, C {first.C}, D_S {first.D_S}, D_C {first.D_C}"
    lines = [
        f"activations that training keeps, per block and image: Mixer-{first.name} ({sizes}), {first.dtype}",
        f"  {'memory':6}  {'MiB':>8}  of eager",
    ]
    lines += [f"  {row.memory:6}  {row.bytes_per_image / 2**20:8.3f}  {row.vs_eager:8.2f}" for row in rows]
    return "\n".join(lines)


def write_saved_json(rows: Sequence[SavedRow], path: str | Path) -> None:
    """Write the rows under ``saved_bytes``."""
    Path(path).write_text(json.dumps({"saved_bytes": [asdict(row) for row in rows]}, indent=2) + "\n", encoding="utf-8")
