"""Models of time series on the CPU: eager PyTorch, torch.compile, ONNX Runtime, OpenVINO, this package, and the bare
matrix products of the model's linear layers; in one run.

Each round takes the providers in turn, beginning with another one. A ratio is eager's time divided by a provider's in
the same round; the row has the median of the rounds' ratios and their 20th and 80th percentile. With one thread the
clock is the process's CPU time, which other processes do not stretch; with more it is the wall's.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import info
from ..patch import fuse_
from .bare import bare_layers, products_of
from .cases import DTYPES
from .run import describe
from .series_models import CHANNELS, CONTEXT, PREDICTION, Forecast, series_model
from .timing import HostClock, measure

OURS = "mixer_kernels"
SERIES_BASELINES = ("compile", "ort", "openvino", "bare")
SAMPLE_SECONDS = 0.02  # at least, by as many calls
MIN_ROUNDS = 9
# RMS, of a result or a gradient, beside eager's in the same dtype.
MOST_RELATIVE_ERROR = {"fp32": 1e-4, "bf16": 5e-2}
SERIES_DTYPES = tuple(MOST_RELATIVE_ERROR)

Function = Callable[[Tensor], Any]  # of past values
logger = logging.getLogger("mixer_kernels")


@dataclass(frozen=True)
class SeriesRow:
    """One provider of a model at a batch size. ``reason`` says why there are no figures."""

    model: str
    mode: str  # "infer"; "train": forward, loss, backward
    batch_size: int
    threads: int
    dtype: str  # of weights and activations, as --dtype names it
    provider: str
    ms: float | None = None
    speedup: float | None = None  # over eager; median of the rounds
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    rounds: int = 0
    reason: str | None = None


def series_rows(
    name: str,
    mode: str,
    batch_size: int,
    baselines: tuple[str, ...],
    threads: int,
    seconds: float,
    say: Callable[[str], None],
    dtype: str = "fp32",
) -> list[SeriesRow]:
    """Measure model ``name`` with ``torch.set_num_threads(threads)``: eager, ``baselines``, ours, and last "bare"."""
    torch.set_num_threads(threads)
    model = series_model(name).to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(batch_size, CONTEXT, CHANNELS, generator=generator).cumsum(1).to(DTYPES[dtype])
    future = torch.randn(batch_size, PREDICTION, CHANNELS, generator=generator).to(DTYPES[dtype])
    functions: dict[str, Function] = {}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        expected = None
        others = [each for each in SERIES_BASELINES if each in baselines and each != "bare"]
        for provider in ("eager", *others, OURS, *(["bare"] if "bare" in baselines else [])):
            say(f"preparing {provider}")
            try:
                if provider == "bare":  # computes less: there is no result to compare
                    products = products_of(Forecast(model), past)
                    functions[provider] = bare_layers(products, 3 if mode == "train" else 1).run
                    continue
                if mode == "train":
                    function, check = _step(provider, model, future)
                else:
                    function = check = _forecast(provider, model, past, threads, Path(folder))
                result = check(past)
                expected = result if expected is None else expected
                error = max(map(_relative_error, result, expected))
                if not error <= MOST_RELATIVE_ERROR[dtype]:
                    raise ArithmeticError(f"wrong by {error:.1e} of the result")
                functions[provider] = function
            except ModuleNotFoundError as error:
                reasons[provider] = f"not installed: {error.name}"
            except Exception as error:  # a row says so and the run goes on
                if provider == "eager":
                    raise
                logger.debug("%s failed", provider, exc_info=True)
                reasons[provider] = describe(error)
        clock = HostClock(time.process_time if threads == 1 else time.perf_counter, SAMPLE_SECONDS)
        samples = measure(functions, [past], seconds=seconds, min_rounds=MIN_ROUNDS, progress=say, clock=clock)
    head = (name, mode, batch_size, threads, dtype)
    rows = []
    for provider in [*functions, *reasons]:
        if provider in reasons:
            rows.append(SeriesRow(*head, provider, reason=reasons[provider]))
            continue
        own = samples[provider]
        ratios = sorted(e / t for e, t in zip(samples["eager"].seconds, own.seconds, strict=True))
        figures = (statistics.median(ratios), _percentile(ratios, 0.2), _percentile(ratios, 0.8))
        rows.append(SeriesRow(*head, provider, own.median * 1e3, *figures, len(ratios)))
    return rows


def _forecast(provider: str, model: nn.Module, past: Tensor, threads: int, folder: Path) -> Function:
    """Inference: a call returns the forecast, in a list."""
    model = Forecast(copy.deepcopy(model)).eval()
    if provider in ("ort", "openvino") and past.dtype is not torch.float32:
        raise ValueError("it is measured in float32 only")
    if provider == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(
            _exported(model, past, folder), options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: past.numpy()}
        return lambda _: [torch.from_numpy(session.run(None, feed)[0])]
    if provider == "openvino":
        import openvino

        core = openvino.Core()
        hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(core.read_model(_exported(model, past, folder)), "CPU", hints)
        request = request.create_infer_request()
        feed = {0: past.numpy()}
        return lambda _: [torch.from_numpy(next(iter(request.infer(feed).values())))]
    run = _of_pytorch(provider, model)

    def forecast(past: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [run(past)]

    return forecast


def _exported(model: nn.Module, past: Tensor, folder: Path) -> str:
    """An ONNX file, made once for all who read it."""
    path = folder / "model.onnx"
    if not path.exists():
        torch.onnx.export(model, (past,), str(path), dynamo=True, verbose=False)
    return str(path)


def _step(provider: str, model: nn.Module, future: Tensor) -> tuple[Function, Function]:
    """Forward with dropout, loss, backward; and the gradients without dropout, to be checked."""
    if provider in ("ort", "openvino"):
        raise ValueError("it does not train")
    model = copy.deepcopy(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run = _of_pytorch(provider, model)

    def step(past: Tensor) -> None:
        run(past_values=past, future_values=future).loss.backward()
        for parameter in parameters:
            parameter.grad = None

    def gradients(past: Tensor) -> list[Tensor]:
        model.eval()
        loss = run(past_values=past, future_values=future).loss
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        model.train()
        return [torch.cat([gradient.flatten() for gradient in found])]

    return step, gradients


def _of_pytorch(provider: str, model: nn.Module) -> Callable[..., Any]:
    if provider == OURS:
        fuse_(model)
    if provider == "compile":
        torch.compiler.reset()
        return torch.compile(model, dynamic=False)
    return model


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def series_table(rows: list[SeriesRow]) -> str:
    """A line a row, groups under a line that names them."""
    lines, before = [], None
    for row in rows:
        group = (row.model, row.mode, row.batch_size, row.dtype)
        if group != before:
            what = "inference" if row.mode == "infer" else "training step (forward, loss, backward)"
            lines += ["", f"{row.model}, {what}, batch {row.batch_size}, {row.threads} thread(s), {row.dtype}"]
            before = group
        if row.ms is None:
            lines.append(f"  {row.provider:<14}{row.reason}")
            continue
        spread = f"{row.speedup:.2f}x eager (p20 {row.speedup_p20:.2f}, p80 {row.speedup_p80:.2f})"
        lines.append(f"  {row.provider:<14}{row.ms:>9.2f} ms  {spread}")
    return "\n".join(lines[1:])


def write_series_json(rows: list[SeriesRow], path: str | Path) -> None:
    """Rows, machine, versions."""
    versions = info.versions()
    for name in ("transformers", "granite-tsfm", "onnxruntime", "openvino"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = info.device_info(torch.device("cpu")) | {"instruction_set": info.cpu_kernels().get("instruction_set")}
    report = {"device": device, "versions": versions, "rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
