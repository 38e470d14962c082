"""Other programs, run until the phase ends: a compiler, a sanitizer, pytest."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .tasks import Cut, Settings

ROOT = Path(__file__).parents[2]
MARGIN = 4.0  # seconds before the phase's end, for this process to say what became of the program
LAST_LINES = 6  # of a log, in a reason


def run_program(
    command: Sequence[str], settings: Settings, environment: Mapping[str, str] = os.environ
) -> tuple[int, str]:
    """Exit status, and stdout and stderr together; in the root of the checkout. Raises Cut when its time is up.

    What it starts dies with this worker, of whose process group all are.
    """
    seconds = max(1.0, settings.seconds_left - MARGIN)
    with tempfile.TemporaryFile() as log:  # no pipe: children that outlive the program would hold its end
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=dict(environment),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(min(seconds, 10**6))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace")
    if status is None:
        raise Cut(f"no end within {seconds:.0f} s; its last lines: {last_lines(text)}")
    return status, text


def last_lines(log: str, count: int = LAST_LINES) -> str:
    """For a reason, which is one line."""
    return " | ".join([line.strip() for line in log.splitlines() if line.strip()][-count:])
