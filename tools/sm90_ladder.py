"""``python tools/sm90_ladder.py``, on an H100 or H200: the kernels of csrc/sm90 timed in each of their variants.

Of B/16 in bfloat16, beside the products alone. Whether they are right in each, tests/test_cuda_sm90.py says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from blocks import make_block  # noqa: E402
from sm90_variants import PRODUCTS, SCHEDULES, ChannelProducts, TokenMixing  # noqa: E402

from mixer_kernels.bench.timing import measure, rotated_inputs  # noqa: E402
from mixer_kernels.shapes import SPECS  # noqa: E402

TOKENS = "token mixing"
BARE = "products alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[256, 32], metavar="N", help="default: 256 32")
    parser.add_argument("--seconds", type=float, default=0.1, help="to time each variant (default: %(default)g)")
    arguments = parser.parse_args()
    for batch_size in arguments.batch_size:
        for what in (TOKENS, *PRODUCTS):
            report(what, batch_size, arguments.seconds)


def report(what: str, batch_size: int, seconds: float) -> None:
    """A line for each variant; the one that the backend takes says so."""
    tokens, shape = what == TOKENS, SPECS["B/16"].block_shape()
    device = torch.device("cuda", torch.cuda.current_device())
    block = make_block(shape, torch.bfloat16, "cuda")
    xs = rotated_inputs((batch_size, shape.S, shape.C), torch.bfloat16, device)
    of = {x.data_ptr(): (TokenMixing if tokens else ChannelProducts)(block, x) for x in xs}
    first = of[xs[0].data_ptr()]
    calls = {BARE: lambda x: products(what, of[x.data_ptr()])}
    for variant in first.variants if tokens else SCHEDULES:
        arguments = (variant,) if tokens else (what, variant)
        calls[variant] = lambda x, arguments=arguments: of[x.data_ptr()].run(*arguments)
    samples = measure(calls, xs, seconds=seconds)
    chosen = "default" if tokens else first.chosen(what)
    for variant, each in samples.items():
        ratio = each.median / samples[BARE].median
        name = f"{what}, batch {batch_size}, {variant}{', chosen' if variant == chosen else ''}"
        print(f"{name:60} {1e3 * each.median:8.4f} ms  {ratio:5.2f} of bare", flush=True)


def products(what: str, each: Any) -> Tensor:
    """The matrix products of a kernel by PyTorch."""
    if what == TOKENS:
        _, _, w1, _, w2, _ = each.parameters
        return F.linear(F.linear(each.x.transpose(1, 2), w1), w2)
    _, _, w3, _, w4, _ = each.parameters
    if what == "fc2":
        return each.a @ w4.t()
    return each.u.flatten(0, 1) @ w3.t() if what == "fc1" else each.g.flatten(0, 1) @ w4


if __name__ == "__main__":
    main()
