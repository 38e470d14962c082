"""Benchmarks: mixer_kernels.bench on the paper's shapes, the most wanted first, for as long as there is time.

All providers of a workload are measured in one run. ``torch.compile`` runs in the mode of ``--compile-mode``: a search
among all kernels ("max-autotune-no-cudagraphs", that of ``make bench``) takes minutes that this program does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mixer_kernels.bench.progress import no_progress
from mixer_kernels.bench.providers import Provider
from mixer_kernels.bench.run import is_defect, run_group
from mixer_kernels.bench.workloads import Prepared, Workload, prepare_workload

from .tasks import Settings, Skip, Task

SECONDS = 0.3  # to time each provider
WORKLOADS = (
    *(Workload(level, "B/16", "bf16", 256) for level in ("block", "token", "channel")),
    *(Workload("block", "B/16", "bf16", batch_size) for batch_size in (32, 1)),
    *(Workload("block", name, "bf16", 256) for name in ("S/16", "L/16")),
    *(Workload(level, "B/16", "bf16", batch_size) for batch_size in (32, 1) for level in ("token", "channel")),
    Workload("block", "B/16", "fp16", 256),
    *(Workload(level, name, "bf16", 256) for name in ("S/16", "L/16") for level in ("token", "channel")),
    *(Workload("block", name, "bf16", batch_size) for name in ("S/16", "L/16") for batch_size in (32, 1)),
)


def tasks(settings: Settings) -> list[Task]:
    workloads = (Workload("token", "S/32", "fp32", 1), Workload("block", "S/32", "bf16", 1))
    return [_task(settings, workload) for workload in (workloads if settings.rehearse else WORKLOADS)]


def _task(settings: Settings, workload: Workload) -> Task:
    def run(values: dict[str, Any]) -> None:
        device = torch.device(settings.device, None if settings.rehearse else torch.cuda.current_device())
        prepared = prepare_workload(workload, device, smoke=settings.rehearse)
        providers = [
            _compile_provider(settings, prepared) if each.name == "compile" and not settings.rehearse else each
            for each in prepared.providers
        ]
        seconds = 0.01 if settings.rehearse else SECONDS
        group = run_group(
            prepared.case, prepared.inputs, providers, prepared.reference, seconds=seconds, progress=no_progress
        )
        rows = {row.provider: row for row in group.rows}
        values["throughput"] = [asdict(row) for row in group.rows]
        defects = [f"{row.provider}: {row.reason}" for row in group.rows if row.reason and is_defect(row.reason)]
        ours = rows["triton"]
        values |= {"ms": ours.ms, "vs_eager": ours.speedup_vs_eager, "vs_compile": ours.speedup_vs_compile}
        values |= {"vs_bare": ours.time_vs_bare, "config": f"compile: {rows['compile'].detail}"}
        assert not defects, "; ".join(defects)
        if ours.reason:
            raise Skip(f"triton {ours.reason}")

    case = f"{workload.level} {workload.display_name} {workload.dtype} batch {workload.batch_size}"
    return Task(case, run, workload.dtype, f"batch {workload.batch_size}")


def _compile_provider(settings: Settings, prepared: Prepared) -> Provider:
    """As mixer_kernels.bench.providers.compiled, in the mode that was asked for."""
    eager = prepared.providers[0]

    def build() -> tuple[Callable[[Tensor], Tensor], str]:
        torch.compiler.reset()
        mode = None if settings.compile_mode == "default" else settings.compile_mode
        function, _ = eager.build()
        return torch.compile(function, mode=mode, fullgraph=True, dynamic=False), f"mode={settings.compile_mode}"

    return Provider("compile", build)
