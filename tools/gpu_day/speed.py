"""Speed: the benchmarks of mixer_kernels.bench on the shapes of the plan, all providers of one in turns.

``torch.compile`` runs in the mode of ``--compile-mode``: a search among all kernels takes minutes that this program
does not have. Its functions are compiled beside the truth, by processes of their own (ahead), and found in its caches.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

import timm_stub
import torch
import tsfm_stub

from mixer_kernels.bench.other_models import prepare_other_model
from mixer_kernels.bench.report import Row
from mixer_kernels.bench.run import CANNOT_RUN, is_defect, run_group
from mixer_kernels.bench.timing import Samples
from mixer_kernels.bench.workloads import Prepared, Workload, prepare_workload

from .plan import BACKENDS, CANNOT, FAILED, GOALS, OK, WRONG, Task, workloads
from .worker import Channel, Settings, check_device

SECONDS = 0.3  # to time each provider
COMPILE_SECONDS = 60.0  # of one function, by torch.compile or Triton
KEPT = ("ms", "call_ms", "images_per_s", "tflops", "roofline_share", "memory_mib", "rounds", "detail")


def run(task: Task, settings: Settings, channel: Channel) -> None:
    """A row for each provider but those that ``task.without`` names."""
    channel.at("building the model", seconds=30, suspects=[])
    prepared, goals = prepare(task, settings)
    if task.phase == "ahead":
        _compile(prepared, channel)
        return
    providers = [each for each in prepared.providers if each.name not in task.without]
    risk = {backend: number for number, backend in enumerate(BACKENDS)}
    names = [each.name for each in providers]
    riskiest_first = sorted(names, key=lambda name: risk.get(name.split(" ")[0], -1), reverse=True)
    suspects: list[str] = []

    def progress(text: str) -> None:
        """Told before a provider is built and called, before it is warmed up, then in each twentieth of the rounds."""
        check_device(settings, suspects=suspects)
        named = [name for name in names if text in (f"preparing {name}", f"warming up {name}")]
        suspects[:] = named or riskiest_first
        compiles = text.startswith(("preparing compile", "preparing triton"))
        channel.at(text, seconds=COMPILE_SECONDS if compiles else 0.0, suspects=suspects)

    group = run_group(
        prepared.case, prepared.inputs, providers, prepared.reference,
        seconds=SECONDS, progress=progress, parameters=prepared.parameters,
    )  # fmt: skip
    check_device(settings, suspects=riskiest_first)
    for row in group.rows:
        channel.send(row={"provider": row.provider, **figures(row, group.samples.get(row.provider), goals)})


def _compile(prepared: Prepared, channel: Channel) -> None:
    """For torch.compile's caches; no row comes of it."""
    channel.at("compiling", seconds=2 * COMPILE_SECONDS)
    with torch.no_grad():
        next(each for each in prepared.providers if each.name == "compile").build()[0](prepared.inputs[0])


def prepare(task: Task, settings: Settings) -> tuple[Prepared, Sequence[Sequence[float]] | None]:
    """The benchmark and its goals, if it has any."""
    level, name, batch_size, mode = workloads()[task.name]
    device = torch.device("cuda", torch.cuda.current_device()) if settings.device == "cuda" else torch.device("cpu")
    compiler = {"smoke": settings.device == "cpu", "compile_mode": settings.compile_mode}
    goals = GOALS.get((level, mode)) if (name, batch_size) == ("B/16", 256) else None
    if level != "model" or "/" in name:
        return prepare_workload(Workload(level, name, "bf16", batch_size, mode=mode), device, **compiler), goals
    timm_stub.define_torchvision_operators()
    with contextlib.suppress(AttributeError):  # granite-tsfm is not here
        tsfm_stub.define_packages()
    return prepare_other_model(name, torch.bfloat16, batch_size, device, **compiler), goals


def figures(row: Row, samples: Samples | None, goals: Sequence[Sequence[float]] | None) -> dict[str, Any]:
    """A row's values; ``ratios`` are words, with the goals beside those of our kernels."""
    ours = row.provider.split(" ")[0] in BACKENDS
    if samples is None:
        defect = is_defect(row.reason) and (ours or row.provider in ("eager", "torch"))
        status = WRONG if row.reason.startswith("wrong") else FAILED if defect else CANNOT
        return {"status": status, "reason": row.reason.removeprefix(f"{CANNOT_RUN}: ")}
    ratios = []
    baselines = {"eager": row.speedup_vs_eager, "compile": row.speedup_vs_compile, "bare": row.time_vs_bare}
    for index, (baseline, ratio) in enumerate(baselines.items()):
        if ratio is not None and row.provider != baseline:
            what, sign = ("of bare", "<=") if baseline == "bare" else (f"x {baseline}", ">=")
            wanted = f" (goal {sign} {goals[0][index]:g}, {goals[1][index]:g})" if goals and ours else ""
            ratios.append(f"{ratio:.2f} {what}{wanted}")
    spread = statistics.quantiles(samples.seconds, n=5, method="inclusive")
    found = {"p20": 1e3 * spread[0], "p80": 1e3 * spread[3], "ratios": ratios}
    return {"status": OK, **{name: getattr(row, name) for name in KEPT}, **found}
