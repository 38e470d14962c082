"""Tests: those of the CUDA backend, by pytest, on the compiled kernels."""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any

from .kernels import absent, why_not
from .programs import last_lines, run_program
from .tasks import Settings, Skip, Task

FILES = ("tests/test_cuda_backend.py", "tests/test_kernels.py", "tests/test_backward.py")
# Warnings of this machine's versions of other packages are not what is tested.
COMMAND = [
    sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-W", "default", "-p", "no:cacheprovider", *FILES,
]  # fmt: skip
MAX_NAMES = 3  # of tests that failed, in a reason


def tasks(settings: Settings) -> list[Task]:
    reason = why_not(settings, "cuda") if settings.device == "cuda" else None
    if reason is not None:
        return [absent("cuda", reason)]
    return [Task("pytest -k cuda", lambda values: _run(settings, values), backend="cuda")]


def _run(settings: Settings, values: dict[str, Any]) -> None:
    if settings.device != "cuda":
        raise Skip("needs a GPU: pytest runs them without one")
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    status, log = run_program(COMMAND, settings)
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
