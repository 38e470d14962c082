"""Tests: those of the CUDA backends, by pytest, on the compiled kernels."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from typing import Any

from .kernels import absent, why_not
from .programs import last_lines, run_program
from .results import HOPPER
from .tasks import Settings, Skip, Task

FILES = ("tests/test_cuda_backend.py", "tests/test_kernels.py", "tests/test_backward.py")
HOPPER_FILES = ("tests/test_cuda_sm90.py",)
# Those that a C++ compiler runs on the CPU's model of a GPU are for machines without one.
SELECTED = "cuda and not test_launchers and not test_planted"
# Warnings of this machine's versions of other packages are not what is tested.
COMMAND = [sys.executable, "-m", "pytest", "-q", "-k", SELECTED, "-W", "default", "-p", "no:cacheprovider"]
MAX_NAMES = 3  # of tests that failed, in a reason


def tasks(settings: Settings) -> list[Task]:
    return [_task(settings, HOPPER, HOPPER_FILES), _task(settings, "cuda", FILES)]


def _task(settings: Settings, backend: str, files: Sequence[str]) -> Task:
    reason = why_not(settings, backend) if settings.device == "cuda" else None
    if reason is not None:
        return absent(backend, reason)
    return Task("pytest -k cuda", lambda values: _run(settings, files, values), backend=backend)


def _run(settings: Settings, files: Sequence[str], values: dict[str, Any]) -> None:
    if settings.device != "cuda":
        raise Skip("needs a GPU: pytest runs them without one")
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    status, log = run_program([*COMMAND, *files], settings)
    counts, problem = verdict(status, log)
    values["config"] = counts
    assert problem is None, problem


def verdict(status: int, log: str) -> tuple[str, str | None]:
    """The counts of pytest's last line, and what is wrong, if anything."""
    lines = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s.*$", log, re.MULTILINE)
    counts = lines[-1] if lines else ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", log, re.MULTILINE)
    if status != 0:
        names = " | ".join(failed[:MAX_NAMES]) or last_lines(log)
        return counts, f"exit status {status}, {counts or 'no counts'}: {names}"
    if not re.search(r"\b[1-9]\d* passed", counts):
        return counts, f"no test passed: {counts or last_lines(log)}"
    return counts, None
