"""``python -m mixer_kernels bench``: the throughput of a whole model, in inference or training; saved bytes."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from .. import info
from ..models import FusedMixer
from ..shapes import SPECS
from .cases import DTYPES, MODES, Case, check_img_size, model_case
from .host import host_rows, host_table
from .memory import saved_rows, saved_table, write_saved_json
from .other_models import MANY_SHAPES, OTHER_MODELS, make_other_model, prepare_other_model
from .plot import check_plot, plot
from .progress import progress_line
from .providers import BACKENDS, CannotRun, provider_names
from .report import Report, Row, closing_lines, group_lines, group_rows
from .run import is_out_of_memory, release, run_group
from .series import OURS, SERIES_BASELINES, SERIES_DTYPES, series_rows, series_table, write_series_json
from .series_models import SERIES_MODELS
from .timing import rotated_inputs
from .training import Step
from .whole_model import model_providers, randomize_, reference_of

BASELINES = ("eager", "compile", "bare")
OF_OTHER_MODELS = ("batch_size", "dtype", "device", "threads", "backend", "baseline", "seconds", "json", "plot")
IN_CHANS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if none of this package's backends could be measured."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        device = _device(arguments.device)
        if arguments.threads:
            if device.type != "cpu":
                raise ValueError("--threads is for the CPU: add --device cpu")
            torch.set_num_threads(arguments.threads)
        for path in filter(None, (arguments.json, arguments.plot)):
            if not Path(path).parent.is_dir():
                raise ValueError(f"there is no directory {str(Path(path).parent)!r} to write {path!r} into")
        if arguments.dtype == "tf32" and device.type != "cuda":
            raise ValueError("--dtype tf32 is a mode of CUDA devices; on a CPU use fp32")
        if arguments.model in SERIES_MODELS and device.type == "cpu":
            return _series(arguments, parser)
        if not set(BASELINES).issuperset(arguments.baseline or BASELINES):
            raise ValueError(f"--baseline ort and openvino go with --model {' or '.join(SERIES_MODELS)} on a CPU")
        if arguments.model in OTHER_MODELS:
            _check_alone(arguments, parser, "model", OF_OTHER_MODELS)
            make_other_model(arguments.model)
        else:
            check_img_size(SPECS[arguments.model], arguments.img_size)
        if arguments.plot:
            check_plot(arguments.plot)
        if arguments.saved_bytes:
            _check_alone(arguments, parser, "saved_bytes", ("model", "img_size", "dtype", "json"))
        if arguments.host:
            _check_alone(arguments, parser, "host", ("seconds",))
    except (ValueError, RuntimeError, CannotRun) as error:
        parser.error(str(error))
    if arguments.saved_bytes:
        return _saved_bytes(arguments)
    if arguments.host:
        print(host_table(host_rows(arguments.seconds)))
        return 0
    on_gpu = device.type == "cuda"
    training = arguments.mode == "train"
    dtype_name = arguments.dtype or ("bf16" if on_gpu else "fp32")
    if dtype_name == "tf32":
        torch.set_float32_matmul_precision("high")
    dtype = DTYPES["fp32" if dtype_name == "tf32" else dtype_name]
    batch_sizes = arguments.batch_size or ([1, 32, 256] if on_gpu and not training else [32, 128] if on_gpu else [1])
    baselines = arguments.baseline  # torch.compile takes minutes on a CPU: there it has to be asked for
    if baselines is None:
        baselines = BASELINES if on_gpu else tuple(name for name in BASELINES if name != "compile")
    wanted = {"eager", *baselines, *(arguments.backend or BACKENDS)}
    rows: list[Row] = []
    print(info.device_name(device))
    with progress_line(len(batch_sizes)) as (say, advance):
        measure = partial(_measure_other, arguments, dtype, device)
        if arguments.model in SPECS:
            say(f"building Mixer-{arguments.model}")
            model = FusedMixer.from_spec(arguments.model, img_size=arguments.img_size).to(device, dtype)
            measure = partial(_measure, arguments, randomize_(model).train(training).requires_grad_(training))
        with contextlib.suppress(KeyboardInterrupt):  # what there is, is printed
            for batch_size in batch_sizes:
                of_batch = measure(batch_size, wanted, say)
                rows += of_batch
                advance(group_lines(of_batch) + "\n")
    print(closing_lines(rows) if rows else "nothing was measured")
    report = Report.of(rows, device)
    if arguments.json:
        report.write_json(arguments.json)
    if arguments.plot and rows:
        plot(rows, report.device["name"], arguments.plot)
    return 0 if any(row.ms is not None and row.provider.split()[0] in BACKENDS for row in rows) else 1


def _series(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """A model of time series on the CPU: another report."""
    takes = ("device", "batch_size", "mode", "threads", "dtype", "baseline", "seconds", "json")
    _check_alone(arguments, parser, "model", takes)
    dtype = arguments.dtype or "fp32"
    if dtype not in SERIES_DTYPES:
        raise ValueError(
            f"--dtype {dtype}: models of time series are measured in {' or '.join(SERIES_DTYPES)}; the sums of their "
            "scaling are too large for float16"
        )
    baselines = arguments.baseline
    if baselines is None:
        baselines = SERIES_BASELINES if dtype == "fp32" else ("compile", "bare")
    batch_sizes = arguments.batch_size or [1, 32, 256]
    rows = []
    with progress_line(len(batch_sizes)) as (say, advance), contextlib.suppress(KeyboardInterrupt):
        for size in batch_sizes:
            of_batch = series_rows(
                arguments.model,
                arguments.mode,
                size,
                tuple(baselines),
                torch.get_num_threads(),
                arguments.seconds,
                lambda text, size=size: say(f"batch {size}: {text}"),
                dtype,
            )
            rows += of_batch
            advance(series_table(of_batch))
    if arguments.json:
        write_series_json(rows, arguments.json)
    return 0 if any(row.ms is not None for row in rows if row.provider == OURS) else 1


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
    case = model_case(arguments.model, model, torch.empty(size, dtype=parameter.dtype, device="meta"), arguments.mode)
    try:
        inputs = rotated_inputs(size, parameter.dtype, parameter.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        names = provider_names("model", arguments.mode, parameter.device)
        names = [name for name in names if name.split()[0] in wanted]
        return group_rows(case, parameter.device, names, {}, dict.fromkeys(names, "out of memory"), {})
    providers = [each for each in model_providers(case, model, inputs) if each.name.split()[0] in wanted]
    reference = reference_of(model)
    if case.mode == "train":
        step = Step(model, batch_size, model.num_classes)
        providers, reference = [step.of(each) for each in providers], step.reference
    group = run_group(
        case,
        inputs,
        providers,
        reference,
        seconds=arguments.seconds,
        progress=lambda text: say(f"batch {batch_size}: {text}"),
        parameters=list(model.parameters()),
    )
    del inputs, providers, reference
    release(parameter.device)
    return group.rows


def _measure_other(
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    wanted: set[str],
    say: Callable[[str], None],
) -> list[Row]:
    """A relative of the Mixer, or on a GPU a model of time series."""
    say(f"batch {batch_size}: building {arguments.model}")
    try:
        prepared = prepare_other_model(arguments.model, dtype, batch_size, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        case = Case("model", arguments.model, MANY_SHAPES, dtype, batch_size, 0, None)
        names = [name for name in provider_names("model", "infer", device) if name in wanted]
        return group_rows(case, device, names, {}, dict.fromkeys(names, "out of memory"), {})
    providers = [each for each in prepared.providers if each.name in wanted]
    progress = lambda text: say(f"batch {batch_size}: {text}")  # noqa: E731
    group = run_group(
        prepared.case, prepared.inputs, providers, prepared.reference, seconds=arguments.seconds, progress=progress
    )
    del prepared, providers
    release(device)
    return group.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer_kernels bench",
        description="Throughput of a whole Mixer: eager PyTorch, torch.compile, the fused backends, and the bare "
        "matrix products, measured round by round in one run. With --saved-bytes: what training keeps, on any machine.",
    )
    parser.add_argument(
        "--model",
        choices=[*SPECS, *OTHER_MODELS],
        default="B/16",
        help="the paper's name; one of timm's relatives, in inference at 224 pixels; ptsm (PatchTSMixer) or ttm "
        "(TinyTimeMixer) (default: %(default)s)",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="PyTorch's on a CPU (default: its own choice)")
    parser.add_argument(
        "--batch-size", type=_positive, nargs="+", metavar="N", help="default: 1 32 256, to train 32 128; on a CPU 1"
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="infer",
        help="train: forward, loss, backward and AdamW, a row for each memory mode (default: %(default)s)",
    )
    parser.add_argument(
        "--saved-bytes",
        action="store_true",
        help="print the activation bytes that training keeps per block and image, of eager PyTorch and of the kernels "
        "in each memory mode; nothing is run, no GPU is needed; takes --model, --img-size, --dtype (default: bf16), "
        "--json",
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="print the host microseconds of a call, of a B/16 block and a PatchTSMixer layer, with kernels that do "
        "nothing, beside eager's and one nn.Linear's; no GPU is needed; takes --seconds",
    )
    parser.add_argument(
        "--dtype", choices=[*DTYPES, "tf32"], help="of weights and activations (default: bf16; on a CPU fp32)"
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda if there is one)")
    parser.add_argument("--img-size", type=_positive, default=224, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="backends of this package (default: all)")
    parser.add_argument(
        "--baseline",
        nargs="*",
        choices=list(dict.fromkeys((*BASELINES, *SERIES_BASELINES))),
        help="besides eager; ort and openvino of models of time series on a CPU (default: all; on a CPU compile of "
        "those alone)",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, help="to time each provider and batch size (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows, versions and device")
    parser.add_argument("--plot", metavar="FILE", help="draw the throughput (.png, .svg, .pdf); needs matplotlib")
    return parser


def _check_alone(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, option: str, takes: Sequence[str]
) -> None:
    for name, value in vars(arguments).items():
        if name not in (option, *takes) and value != parser.get_default(name):
            allowed = ", ".join(map(_spelled, takes))
            raise ValueError(f"{_spelled(option)} takes {allowed} alone: {_spelled(name)} does not go with it")


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _saved_bytes(arguments: argparse.Namespace) -> int:
    name = arguments.dtype or "bf16"
    rows = saved_rows(arguments.model, name, DTYPES["fp32" if name == "tf32" else name], arguments.img_size)
    print(saved_table(rows))
    if arguments.json:
        write_saved_json(rows, arguments.json)
    return 0


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
