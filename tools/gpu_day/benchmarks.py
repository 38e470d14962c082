"""Benchmarks: mixer_kernels.bench on the paper's shapes, the most wanted first, for as long as there is time.

All providers of a workload are measured in one run; each backend with kernels has a row to itself, with its ratios to
eager PyTorch, ``torch.compile`` and the bare products. ``torch.compile`` runs in the mode of ``--compile-mode``: a
search among all kernels ("max-autotune-no-cudagraphs", that of ``make bench``) takes minutes that this program does not
have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from mixer_kernels.bench.progress import no_progress
from mixer_kernels.bench.providers import backend_and_memory
from mixer_kernels.bench.report import Row
from mixer_kernels.bench.run import is_defect, run_group
from mixer_kernels.bench.workloads import Workload, prepare_workload

from .results import BACKENDS, FAILED, OK, SKIPPED
from .tasks import Settings, Task

SECONDS = 0.3  # to time each provider
LEVELS = ("block", "token", "channel")
WORKLOADS = (
    *(Workload("block", "B/16", "bf16", batch_size) for batch_size in (256, 32, 1)),
    Workload("block", "B/16", "bf16", 128, mode="train"),
    *(Workload(level, "B/16", "bf16", 256) for level in LEVELS[1:]),
    *(Workload(level, "B/16", "bf16", 128, mode="train") for level in LEVELS[1:]),
    Workload("model", "B/16", "bf16", 64, mode="train"),
    *(Workload(level, "B/16", "bf16", batch_size) for batch_size in (32, 1) for level in LEVELS[1:]),
    *(Workload("block", name, "bf16", 256) for name in ("S/16", "L/16")),
    Workload("block", "B/16", "fp16", 256),
    *(Workload(level, name, "bf16", 256) for name in ("S/16", "L/16") for level in LEVELS[1:]),
    *(Workload("block", name, "bf16", batch_size) for name in ("S/16", "L/16") for batch_size in (32, 1)),
)


def tasks(settings: Settings) -> list[Task]:
    workloads = (
        Workload("token", "S/32", "fp32", 1),
        Workload("block", "S/32", "bf16", 1),
        Workload("block", "S/32", "fp32", 1, mode="train"),
    )
    return [_task(settings, workload) for workload in (workloads if settings.rehearse else WORKLOADS)]


def _task(settings: Settings, workload: Workload) -> Task:
    def run(values: dict[str, Any]) -> None:
        device = torch.device(settings.device, None if settings.rehearse else torch.cuda.current_device())
        mode = None if settings.rehearse else settings.compile_mode
        prepared = prepare_workload(workload, device, smoke=settings.rehearse, compile_mode=mode)
        providers = [each for each in prepared.providers if backend_and_memory(each.name)[0] not in settings.without]
        seconds = 0.01 if settings.rehearse else SECONDS
        group = run_group(
            prepared.case,
            prepared.inputs,
            providers,
            prepared.reference,
            seconds=seconds,
            progress=no_progress,
            parameters=prepared.parameters,
        )
        values["throughput"] = [asdict(row) for row in group.rows]
        values["rows"] = rows_of(group.rows)

    case = f"{workload.level} {workload.display_name} {workload.dtype} batch {workload.batch_size}"
    case += {"infer": "", "train": " training"}[workload.mode]
    return Task(case, run, workload.dtype, f"batch {workload.batch_size}")


def rows_of(throughput: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each backend with kernels, in training in its default memory mode; one more if another result is wrong.

    ``throughput`` is that of one workload.
    """
    compiled = next((row.detail for row in throughput if row.provider == "compile"), None)
    found: list[dict[str, Any]] = []
    for backend in BACKENDS:
        its = [row for row in throughput if row.provider.split()[0] == backend]
        if not its:  # left out
            continue
        found.append({"backend": backend, "config": f"compile: {compiled}", **_figures(its[0]), **_state(its)})
    others = [row for row in throughput if row.provider.split()[0] not in BACKENDS]
    if _state(others)["status"] == FAILED:
        found.append({"backend": "", **_state(others)})
    return found


def _figures(row: Row) -> dict[str, float | None]:
    return {
        "ms": row.ms,
        "call_ms": row.call_ms,
        "vs_eager": row.speedup_vs_eager,
        "vs_compile": row.speedup_vs_compile,
        "vs_bare": row.time_vs_bare,
    }


def _state(rows: Sequence[Row]) -> dict[str, str]:
    defects = [f"{row.provider}: {row.reason}" for row in rows if row.reason and is_defect(row.reason)]
    if defects:
        return {"status": FAILED, "reason": "; ".join(defects)}
    reasons = [row.reason for row in rows if row.reason]
    return {"status": SKIPPED, "reason": reasons[0]} if reasons else {"status": OK}
