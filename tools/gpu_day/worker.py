"""``python -m gpu_day.worker SETTINGS``: one process of a phase, see supervise for who talks to it and how."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import zlib
from dataclasses import asdict
from typing import Any

from .results import CUT, FAILED, OK, SKIPPED
from .tasks import Cut, Settings, Skip, Task


def main() -> None:
    channel = _claim_stdout()
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.rehearse:
        from . import rehearsal

        rehearsal.install()  # before anything imports Triton
    import torch

    if not settings.rehearse:
        _check_gpu(settings)
    tasks: list[Task] = importlib.import_module(f"{__package__}.{settings.phase}").tasks(settings)
    _send(channel, {"tasks": [task.described() for task in tasks]})
    for line in sys.stdin:
        task = tasks[json.loads(line)["run"]]
        if settings.planted("crash", task.case):
            os.abort()
        torch.manual_seed(zlib.crc32(task.case.encode()))  # the same numbers, whichever worker runs it
        values: dict[str, Any] = {}
        status, spoiled = OK, False
        try:
            if settings.planted("hang", task.case):
                sys.stdin.read()
            task.run(values)
        except Skip as reason:
            status, values["reason"] = SKIPPED, str(reason)
        except Cut as reason:
            status, values["reason"] = CUT, str(reason)
        except Exception as error:  # a row says so and the run goes on
            traceback.print_exc()
            status, values["reason"] = FAILED, _describe(error)
        if settings.device == "cuda" and torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # a fault on the device: this process can do no more
                status, spoiled = FAILED, True
                values["reason"] = f"{values.get('reason') or ''} {_describe(error)}".strip()
        _send(channel, {"status": status, "values": values, "spoiled": spoiled})


def command(settings: Settings) -> list[str]:
    """How the supervisor starts it."""
    return [sys.executable, "-m", f"{__package__}.worker", json.dumps(asdict(settings))]


def _claim_stdout() -> int:
    """The supervisor's pipe; what libraries print goes to stderr."""
    channel = os.dup(1)
    os.dup2(2, 1)
    return channel


def _send(channel: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


def _check_gpu(settings: Settings) -> None:
    import torch

    if settings.phase != "probe" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU")


def _describe(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
