"""``python -m mixer_kernels cost``: what each launch of a block computes and moves, what bounds it, how long it takes.

A prediction, not a measurement: the Triton kernels are compiled for the GPU, which need not be there, and a static
model (``machine_model``) says which share of the tensor peak their code allows. How much of such a bound and of a
memory's bandwidth GPUs have been seen to reach makes the range.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..bench.cases import check_img_size
from ..bench.roofline import floor_seconds
from ..machine_model import Analysis, read
from ..shapes import SPECS
from .gpus import GPUS, Gpu, gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
# Published speed over the model's bound: FlashAttention-3 on an H100 0.63 to 0.75, Triton's tutorial attention 0.83,
# FlashAttention-2 on an A100 0.97 to 0.99.
REACHED = (0.63, 0.99)
# Of the tensor peak, by the library's products: 584 of 989 TFLOP/s for 65536 x 1024 x 1024 on an H100, 790 for 8192^3
# on an H200.
LIBRARY = (0.59, 0.80)
# Of a memory's bandwidth: LayerNorm kernels on an H100 three quarters, a copy on an H200 4.3 of 4.8 TB/s.
MEMORY = (0.75, 0.90)
LAUNCH_SECONDS = (1e-6, 3e-6)  # the least that a launch takes, assumed
NOTE = (
    "A prediction, not a measurement: compiled for the GPU and read by a static model. Memory that is read twice, L2,\n"
    "bank conflicts, lowered clocks and gaps between launches are not in it."
)


@dataclass(frozen=True)
class Row:
    """One launch. ``share``: of the tensor peak, by the model, None where there is no product of ours."""

    launch: str
    programs: int | None
    useful_flops: int
    executed_flops: int
    bytes: int
    bound_by: str
    share: float | None
    seconds: tuple[float, float]


@dataclass
class Cost:
    """Of one block."""

    model: str
    gpu: str
    dtype: str
    batch_size: int
    training: bool
    floor_seconds: float
    rows: list[Row] = field(default_factory=list)
    is_prediction: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.model not in SPECS:
            raise ValueError(f"--model: got {arguments.model}, expected one of {', '.join(SPECS)}")
        device = gpu(arguments.gpu)
        check_img_size(SPECS[arguments.model], arguments.img_size)
        if arguments.batch_size < 1:
            raise ValueError(f"--batch-size: got {arguments.batch_size}, expected 1 or more")
        if arguments.frozen and arguments.training:
            raise ValueError("--frozen goes with inference: in training weights change, and every call packs them")
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            raise ValueError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
        import triton  # noqa: F401
    except ValueError as error:
        parser.error(str(error))
    except ImportError:
        print("cost: the Triton kernels are compiled, and Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    found = predict(
        arguments.model, device, arguments.batch_size, arguments.dtype, img_size=arguments.img_size,
        autocast=arguments.autocast, training=arguments.training, frozen=arguments.frozen,
    )  # fmt: skip
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mixer_kernels cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="B/16", metavar="NAME", help=f"one of {', '.join(SPECS)} (default: B/16)")
    parser.add_argument("--gpu", default="h200", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h200)")
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--img-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the products (default: bf16)")
    parser.add_argument("--autocast", action="store_true", help="a float32 stream and float32 weights")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--frozen", action="store_true", help="inference after freeze_: weights are packed already")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    return parser


def predict(
    model: str,
    device: Gpu,
    batch_size: int,
    dtype: str,
    img_size: int = 224,
    autocast: bool = False,
    training: bool = False,
    frozen: bool = False,
) -> Cost:
    """Compile and model every launch of a block. Replaces Triton's driver for the rest of the process."""
    from ..compile_check import compile_for
    from .launches import Block, launches

    shape, products = SPECS[model].block_shape(img_size), DTYPES[dtype]
    stream = torch.float32 if autocast else products
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    compile_for(device.target)
    try:
        found = launches(Block(shape, batch_size, products, stream, training, frozen), device.target)
    finally:
        torch.set_float32_matmul_precision(previous)
    flops = shape.block_flops(batch_size) * (3 if training else 1)
    least = shape.block_bytes(batch_size, products.itemsize, stream.itemsize)
    floor = floor_seconds(flops, least, dtype, device.name)
    cost = Cost(model, device.name, dtype, batch_size, training, floor)
    cost.rows += [_row(launch, device, dtype) for launch in found]
    return cost


def table(cost: Cost) -> str:
    """For people."""
    passes = "forward and backward" if cost.training else "forward"
    lines = [
        f"a block of {cost.model}, {passes}, batch {cost.batch_size}, {cost.dtype}, on {cost.gpu}: backend 'triton'",
        _line("launch", "programs", "GFLOP", "executed", "MB", "bound by", "share", "us"),
    ]
    for row in cost.rows:
        programs = "-" if row.programs is None else str(row.programs)
        share = "-" if row.share is None else f"{row.share:.0%}"
        flops = [f"{each / 1e9:.1f}" if row.executed_flops else "-" for each in (row.useful_flops, row.executed_flops)]
        lines.append(
            _line(row.launch, programs, *flops, f"{row.bytes / 1e6:.1f}", row.bound_by, share, _range(row.seconds))
        )
    seconds = tuple(sum(row.seconds[i] for row in cost.rows) for i in (0, 1))
    sums = [sum(getattr(row, name) for row in cost.rows) for name in ("useful_flops", "executed_flops", "bytes")]
    flops, moved = [f"{each / 1e9:.1f}" for each in sums[:2]], f"{sums[2] / 1e6:.1f}"
    lines.append(_line(f"{len(cost.rows)} launches", "", *flops, moved, "", "", _range(seconds)))
    lines.append(f"at the peak of products and memory: {cost.floor_seconds * 1e6:.0f} us")
    return "\n".join([*lines, NOTE])


def _line(launch: str, programs: str, useful: str, executed: str, moved: str, pipe: str, share: str, us: str) -> str:
    return f"{launch:36}{programs:>9}{useful:>9}{executed:>10}{moved:>9}  {pipe:8}{share:>6}{us:>18}"


def _row(launch, device: Gpu, dtype: str) -> Row:
    peak = device.peak.tflops[dtype] * 1e12
    memory = launch.bytes / (device.peak.gb_per_s * 1e9)
    pipe, share, products = "memory", None, (0.0, 0.0)
    if launch.is_library and launch.work.executed:
        pipe, products = "tensor", tuple(launch.work.executed / (peak * reached) for reached in reversed(LIBRARY))
    elif launch.work.executed:
        compiled = launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)
        [code] = read(compiled.asm["cubin"]).values()
        analysis = Analysis(code, warps=compiled.metadata.num_warps, shared=compiled.metadata.shared)
        hot = analysis.hottest()
        pipe, share = hot.shares.pipe, hot.shares.bound
        whole = _whole_share(analysis, launch.work.turns, share)
        ideal = launch.work.executed / peak * _tail(launch.work.tiles, analysis.blocks * device.target.multiprocessors)
        products = (ideal / (share * REACHED[1]), ideal / (whole * REACHED[0]))
    low = max(products[0], memory / MEMORY[1], LAUNCH_SECONDS[0])
    high = max(products[1], memory / MEMORY[0], LAUNCH_SECONDS[1])
    if not launch.work.executed or products[0] < memory / MEMORY[1]:
        pipe = "memory"
    if low == LAUNCH_SECONDS[0]:
        pipe = "launch"
    return Row(
        launch.name, launch.programs, launch.work.useful, launch.work.executed, launch.bytes, pipe, share, (low, high)
    )


def _whole_share(analysis: Analysis, turns: int, share: float) -> float:
    """With what is outside the hot loop, where one program is one tile; else the loop's own."""
    hot = analysis.hottest()
    around = next(loop for loop in analysis.flow.root.walk() if hot.loop in loop.inner)
    if around is not analysis.flow.root or hot.shares.played is None:
        return share
    return min(share, analysis.whole({hot.loop.header: turns}).shares.bound)


def _tail(tiles: int, slots: int) -> float:
    """How much longer all take than their work does, since the last of them fill the GPU's ``slots`` in part only."""
    return -(-tiles // slots) * slots / tiles


def _range(seconds: tuple[float, float]) -> str:
    return f"{seconds[0] * 1e6:.1f} - {seconds[1] * 1e6:.1f}"
