"""``python -m mixer_kernels bench``: the throughput of a whole model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import backends
from ..models import FusedMixer
from ..shapes import SPECS
from .cases import DTYPES, check_img_size, model_case
from .plot import check_plot, plot
from .progress import progress_line
from .providers import PROVIDERS
from .report import Report, Row, group_rows
from .run import is_out_of_memory, release, run_group
from .timing import rotated_inputs
from .whole_model import model_providers, randomize_, reference_of

BASELINES = ("eager", "compile", "bare")
IN_CHANS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if none of this package's backends could be measured."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        device = _device(arguments.device)
        check_img_size(SPECS[arguments.model], arguments.img_size)
        if arguments.dtype == "tf32" and device.type != "cuda":
            raise ValueError("--dtype tf32 is a mode of CUDA devices; on a CPU use fp32")
        if arguments.plot:
            check_plot(arguments.plot)
        for path in filter(None, (arguments.json, arguments.plot)):
            if not Path(path).parent.is_dir():
                raise ValueError(f"there is no directory {str(Path(path).parent)!r} to write {path!r} into")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    on_gpu = device.type == "cuda"
    dtype_name = arguments.dtype or ("bf16" if on_gpu else "fp32")
    if dtype_name == "tf32":
        torch.set_float32_matmul_precision("high")
    dtype = DTYPES["fp32" if dtype_name == "tf32" else dtype_name]
    batch_sizes = arguments.batch_size or ([1, 32, 256] if on_gpu else [1])
    wanted = {"eager", *arguments.baseline, *(arguments.backend or backends.BACKENDS)}
    rows: list[Row] = []
    with progress_line(len(batch_sizes)) as (say, advance):
        say(f"building Mixer-{arguments.model}")
        model = FusedMixer.from_spec(arguments.model, img_size=arguments.img_size).to(device, dtype)
        randomize_(model).eval().requires_grad_(False)
        for batch_size in batch_sizes:
            rows += _measure(arguments, model, batch_size, wanted, say)
            advance()
    report = Report.of(rows, device)
    print(report.device["name"])
    print(report)
    if arguments.json:
        report.write_json(arguments.json)
    if arguments.plot:
        plot(rows, report.device["name"], arguments.plot)
    return 0 if any(row.ms is not None and row.provider in backends.BACKENDS for row in rows) else 1


def _measure(
    arguments: argparse.Namespace,
    model: torch.nn.Module,
    batch_size: int,
    wanted: set[str],
    say: Callable[[str], None],
) -> list[Row]:
    parameter = next(model.parameters())
    size = (batch_size, IN_CHANS, arguments.img_size, arguments.img_size)
    # The case needs the sizes of a batch, not the batch: there may be no memory for one.
    case = model_case(arguments.model, model, torch.empty(size, dtype=parameter.dtype, device="meta"))
    try:
        inputs = rotated_inputs(size, parameter.dtype, parameter.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        names = [name for name in PROVIDERS if name in wanted]
        return group_rows(case, parameter.device, names, {}, dict.fromkeys(names, "out of memory"), {})
    providers = [each for each in model_providers(case, model, inputs) if each.name in wanted]
    group = run_group(
        case,
        inputs,
        providers,
        reference_of(model),
        seconds=arguments.seconds,
        progress=lambda text: say(f"batch {batch_size}: {text}"),
    )
    del inputs, providers
    release(parameter.device)
    return group.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer_kernels bench",
        description="Throughput of a whole Mixer: eager PyTorch, torch.compile, the fused backends, and the bare "
        "matrix products, measured round by round in one run.",
    )
    parser.add_argument("--model", choices=SPECS, default="B/16", help="the paper's name (default: %(default)s)")
    parser.add_argument("--batch-size", type=_positive, nargs="+", metavar="N", help="default: 1 32 256; on a CPU 1")
    parser.add_argument("--mode", choices=["infer"], default="infer", help="what to measure (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, "tf32"], help="of weights and activations (default: bf16; on a CPU fp32)"
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda if there is one)")
    parser.add_argument("--img-size", type=_positive, default=224, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument(
        "--backend", nargs="+", choices=backends.BACKENDS, help="backends of this package (default: all)"
    )
    parser.add_argument(
        "--baseline", nargs="*", choices=BASELINES, default=BASELINES, help="besides eager (default: all)"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, help="to time each provider and batch size (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows, versions and device")
    parser.add_argument("--plot", metavar="FILE", help="draw the throughput (.png, .svg, .pdf); needs matplotlib")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device
