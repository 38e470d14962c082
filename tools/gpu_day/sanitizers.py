"""Sanitizers: NVIDIA's compute-sanitizer over tiny calls of the CUDA backends (sanitized.py), each tool by itself.

Everything on the GPU is watched, PyTorch's kernels and cuBLAS as well; what is reported about those is counted apart.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .kernels import absent, why_not
from .programs import last_lines, run_program
from .results import HOPPER
from .sanitized import DONE
from .tasks import Settings, Skip, Task

PROGRAM = "compute-sanitizer"
COMPILED = (HOPPER, "cuda")  # the backends that are compiled by nvcc
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Padding: allocations lie apart, so that what is beside a tensor is never another one. API errors: PyTorch asks for
# some and handles them.
OPTIONS = {"memcheck": ("--padding", "256", "--report-api-errors", "no")}
OURS = "mixer_kernels::"  # the namespace of the kernels
NO_REPORT = r"COMPUTE-SANITIZER|[A-Z]+ SUMMARY|Process ID|Target application"
MAX_REPORTS = 3  # in a reason
# Each tensor an allocation of its own, whose end is known, and whose memory nobody wrote before.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def tasks(settings: Settings) -> list[Task]:
    if settings.device != "cuda":
        return [Task(tool, _needs_gpu, backend=backend) for backend in COMPILED for tool in TOOLS]
    executable = find()
    missing = None if executable else f"there is no {PROGRAM} on the PATH or in the CUDA toolkit"
    found: list[Task] = []
    for backend in COMPILED:
        reason = why_not(settings, backend) or missing
        if reason is not None:
            found.append(absent(backend, reason))
            continue
        found += [Task(tool, partial(_check, settings, executable, backend, tool), backend=backend) for tool in TOOLS]
        if backend == "cuda":
            found.append(Task("self-test: memcheck", partial(_self_test, settings, executable), backend=backend))
    return found


def _needs_gpu(values: dict[str, Any]) -> None:
    raise Skip("needs a GPU")


def _check(settings: Settings, executable: str, backend: str, tool: str, values: dict[str, Any]) -> None:
    status, log = run_program(command(executable, tool, backend), settings, {**os.environ, **ENVIRONMENT})
    report = parse(log)
    values["config"] = f"{report.calls} calls"
    if report.others:
        values["config"] += f", {report.others} reports on others' kernels"
    if report.unsupported:
        raise Skip(f"{PROGRAM} does not run here: {report.unsupported}")
    problem = report.problem(status)
    assert problem is None, f"{problem}. {last_lines(log)}"


def _self_test(settings: Settings, executable: str, values: dict[str, Any]) -> None:
    status, log = run_program(command(executable, "memcheck", "--beyond"), settings, {**os.environ, **ENVIRONMENT})
    report = parse(log)
    if report.unsupported:
        raise Skip(f"{PROGRAM} does not run here: {report.unsupported}")
    assert report.ours, f"an access behind a tensor went unnoticed (exit status {status}). {last_lines(log)}"


def find() -> str | None:
    """On the PATH, or where the CUDA toolkit puts it."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which(PROGRAM) or shutil.which(PROGRAM, path=os.pathsep.join(folders))


def command(executable: str, tool: str, *arguments: str) -> Sequence[str]:
    options = ["--tool", tool, "--show-backtrace", "no", "--print-limit", "100", *OPTIONS.get(tool, ())]
    return [executable, *options, sys.executable, "-m", "gpu_day.sanitized", *arguments]


@dataclass
class Report:
    """What one run said. ``ours``: the reports on this package's kernels, each in a line."""

    summary: int | None = None  # errors or hazards, as the tool counts them; None if it did not come to an end
    ours: list[str] = field(default_factory=list)
    others: int = 0
    calls: int | None = None  # None if the program did not come to an end
    unsupported: str = ""

    def problem(self, status: int) -> str | None:
        """What is wrong, if anything; ``status`` is the exit status."""
        if self.ours:
            return f"{len(self.ours)} reports: {' | '.join(self.ours[:MAX_REPORTS])}"
        if self.calls is None:
            return f"the program came to no end (exit status {status})"
        if self.summary is None:
            return f"no summary (exit status {status})"
        if self.summary and not self.others:
            return f"{self.summary} errors in a report that this program cannot read"
        return None


def parse(log: str) -> Report:
    """A report starts in the column behind "========= ", and goes on in lines that are indented."""
    report = Report()
    done = re.search(rf"^{DONE} (\d+)", log, re.MULTILINE)
    report.calls = int(done[1]) if done else None
    records: list[list[str]] = []
    for line in log.splitlines():
        match = re.match(r"=========( *)(.*)", line)
        if not match or not match[2]:
            continue
        text = match[2].strip()
        summary = re.match(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
        if summary:
            report.summary = int(summary[1])
        elif "not supported" in text.lower() or text.startswith("Internal Sanitizer Error"):
            report.unsupported = text
        elif len(match[1]) > 1:
            if records:
                records[-1].append(text)
        elif not re.match(NO_REPORT, text):
            records.append([text])
    for record in records:
        place = next((line for line in record if OURS in line and not line.startswith("Host Frame")), None)
        if place is None:
            report.others += 1
        else:
            report.ours.append(record[0] if place == record[0] else f"{record[0]} {place}")
    return report
