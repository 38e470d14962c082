"""How often a right kernel misses the accuracy rule by chance: ``python tools/accuracy_by_chance.py --seeds 1000``.

The right kernel is PyTorch's float32 with another order of summation: every product and sum adds its terms one by one,
last to first, where eager adds them in blocks. The shapes are the smallest of the tests' matrix, where chance is
largest. Each tensor, an output or a gradient, is one comparison.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from blocks import make_block, make_x
from test_backward import gradients
from test_relatives_patchtsmixer import evaluate, make

import mixer_kernels.functional as F
from mixer_kernels.accuracy import DECOMPOSED, FORWARD_FACTOR, GRADIENT_FACTOR, reference, why_inaccurate
from mixer_kernels.shapes import MixerShape

aten = torch.ops.aten

BLOCKS = (
    (1, MixerShape(S=1, C=1, D_S=1, D_C=1)),
    (2, MixerShape(S=1, C=2, D_S=1, D_C=1)),
    (3, MixerShape(S=7, C=5, D_S=3, D_C=9)),
)
SERIES = ((2, 3, 4, 8),)  # batch, channels, patches, features
MIXERS = ("channels", "patches", "features")


class LastToFirst(TorchDispatchMode):
    """float32 sums one term at a time, beginning with the last."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in DECOMPOSED:
            with self:
                return DECOMPOSED[packet][func](*args, **kwargs)
        if packet in (aten.mm, aten.bmm):
            return _product(*args)
        if packet in (aten.addmm, aten.baddbmm):
            return args[0] + _product(*args[1:])
        if packet in (aten.sum, aten.mean):
            x, dims, keepdim = args[0], args[1] if len(args) > 1 else [], args[2] if len(args) > 2 else False
            total = _sum(x, dims or list(range(x.dim())), keepdim)
            return total / (x.numel() / max(total.numel(), 1)) if packet is aten.mean else total
        return func(*args, **kwargs)


def _product(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=a.dtype)
    for k in reversed(range(a.shape[-1])):
        total = total + a[..., k : k + 1] * b[..., k : k + 1, :]
    return total


def _sum(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    dims = sorted(d % x.dim() for d in dims)
    rest = [d for d in range(x.dim()) if d not in dims]
    terms = x.permute(*dims, *rest).flatten(0, len(dims) - 1) if dims else x[None]
    total = torch.zeros_like(terms[0])
    for term in reversed(terms):
        total = total + term
    return total.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else total


def comparisons(seed: int) -> dict[str, str | None]:
    """Every comparison of one seed by name, and why it missed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    outcome = {}
    for batch_size, shape in BLOCKS:
        block, x = make_block(shape, torch.float32, "cpu"), make_x(batch_size, shape, torch.float32, "cpu")
        dy, wide = torch.randn_like(x), block.to(torch.float64)

        def compute(block, x, dy):
            with torch.no_grad():
                output = F.mixer_block(x, **block.parameters, backend="torch")
            return {"output": output, **gradients(block, x, dy, "torch")}

        exact = partial(compute, wide, x.double(), dy.double())
        outcome |= _judged(f"{shape}", partial(compute, block, x, dy), exact)
    for shape in SERIES:
        for mixer in MIXERS:
            x, parameters = make(mixer, shape, torch.float32, "cpu")
            dy, wide = torch.randn_like(x), {k: t.double() for k, t in parameters.items()}
            exact = partial(evaluate, mixer, x.double(), wide, "torch", dy.double())
            outcome |= _judged(f"{mixer} {shape}", partial(evaluate, mixer, x, parameters, "torch", dy), exact)
    return outcome


def _judged(name, compute, exact) -> dict[str, str | None]:
    eager, judged = compute(), reference(exact, torch.float32)
    with LastToFirst():
        actual = compute()
    return {
        f"{name}: {what}": why_inaccurate(
            actual[what], eager[what], judged[what], FORWARD_FACTOR if what == "output" else GRADIENT_FACTOR
        )
        for what in actual
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    count, missed = 0, Counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        seeds = tqdm(pool.imap(comparisons, range(arguments.seeds)), total=arguments.seeds, unit="seed", disable=None)
        for outcome in seeds:
            count += len(outcome)
            for name, reason in outcome.items():
                if reason is not None:
                    missed[name] += 1
                    print(f"missed: {name}: {reason}")
    print(f"{sum(missed.values())} of {count} comparisons missed the rule")
    return int(sum(missed.values()) > count / 100_000)


if __name__ == "__main__":
    sys.exit(main())
