"""Benchmarks: mixer_kernels.bench on the paper's shapes, the most wanted first, for as long as there is time.

All providers of a workload are measured in one run. ``torch.compile`` runs in the mode of ``--compile-mode``: a search
among all kernels ("max-autotune-no-cudagraphs", that of ``make bench``) takes minutes that this program does not have.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from mixer_kernels.bench.progress import no_progress
from mixer_kernels.bench.run import is_defect, run_group
from mixer_kernels.bench.workloads import Workload, prepare_workload

from .tasks import Settings, Skip, Task

SECONDS = 0.3  # to time each provider
WORKLOADS = (
    *(Workload(level, "B/16", "bf16", 256) for level in ("block", "token", "channel")),
    *(Workload(level, "B/16", "bf16", 128, mode="train") for level in ("block", "token", "channel")),
    *(Workload("block", "B/16", "bf16", batch_size) for batch_size in (32, 1)),
    Workload("model", "B/16", "bf16", 64, mode="train"),
    *(Workload("block", name, "bf16", 256) for name in ("S/16", "L/16")),
    *(Workload(level, "B/16", "bf16", batch_size) for batch_size in (32, 1) for level in ("token", "channel")),
    Workload("block", "B/16", "fp16", 256),
    *(Workload(level, name, "bf16", 256) for name in ("S/16", "L/16") for level in ("token", "channel")),
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
        seconds = 0.01 if settings.rehearse else SECONDS
        group = run_group(
            prepared.case,
            prepared.inputs,
            prepared.providers,
            prepared.reference,
            seconds=seconds,
            progress=no_progress,
            parameters=prepared.parameters,
        )
        rows = {row.provider: row for row in group.rows}
        values["throughput"] = [asdict(row) for row in group.rows]
        defects = [f"{row.provider}: {row.reason}" for row in group.rows if row.reason and is_defect(row.reason)]
        ours = rows.get("triton") or rows["triton fast"]
        values |= {"ms": ours.ms, "vs_eager": ours.speedup_vs_eager, "vs_compile": ours.speedup_vs_compile}
        values |= {"vs_bare": ours.time_vs_bare, "config": f"compile: {rows['compile'].detail}"}
        assert not defects, "; ".join(defects)
        if ours.reason:
            raise Skip(f"triton {ours.reason}")

    case = f"{workload.level} {workload.display_name} {workload.dtype} batch {workload.batch_size}"
    case += {"infer": "", "train": " training"}[workload.mode]
    return Task(case, run, workload.dtype, f"batch {workload.batch_size}")
