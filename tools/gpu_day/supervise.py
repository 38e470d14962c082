"""Runs one phase in processes of its own, and never waits for them longer than its deadline.

A worker lists its tasks and then runs those that it is handed, one after the other; both ways go lines of JSON. What
a task does to its process (a CUDA fault, which spoils a process for good; a crash; a hang) costs that task: it is
recorded, the process is replaced, and the new one goes on with the next task.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .results import CUT, FAILED

LONGEST_LINE = 2**24
LAST_LINES = 6  # of a dead worker's stderr, in the reason of its row

Task = dict[str, Any]  # case, dtype, shape, config: the first fields of a Row
Report = Callable[[Task, str, dict[str, Any]], None]  # task, status, other fields of its Row


class WorkerDied(Exception):
    """What a worker's end has to say: signal or exit status, and the last lines of its stderr."""


@dataclass
class Phase:
    """The tasks of one phase and how far they are."""

    report: Report
    tasks: list[Task] | None = None
    pending: deque[int] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)

    def learn(self, tasks: list[Task]) -> None:
        if self.tasks is None:
            self.tasks = tasks
            self.pending.extend(range(len(tasks)))

    @property
    def has_work(self) -> bool:
        return self.tasks is None or bool(self.pending)


def run_phase(
    command: Sequence[str],
    *,
    jobs: int,
    seconds: float,
    task_seconds: float,
    report: Report,
    environment: dict[str, str] | None = None,
) -> bool:
    """Run all tasks of ``command``'s phase on ``jobs`` workers, for at most ``seconds``.

    Every task is reported exactly once: done, failed, or "cut" because the time was up. Raises WorkerDied if no worker
    could even list its tasks.

    Returns:
        whether every task came to an end before the deadline.
    """
    phase = Phase(report)
    deaths = asyncio.run(_run_phase(phase, command, jobs, seconds, task_seconds, environment))
    over = f"no process could be started: {deaths[0]}" if deaths else f"the phase's {seconds:.0f} s were over"
    if phase.tasks is None:
        raise WorkerDied(f"{over} before its tasks were listed")
    for index in sorted(phase.running):
        phase.report(phase.tasks[index], CUT, {"reason": f"was running when {over}"})
    for index in phase.pending:
        phase.report(phase.tasks[index], CUT, {"reason": f"not reached: {over}"})
    return not phase.running and not phase.pending


async def _run_phase(
    phase: Phase,
    command: Sequence[str],
    jobs: int,
    seconds: float,
    task_seconds: float,
    environment: dict[str, str] | None,
) -> list[WorkerDied]:
    """Returns why workers could not start, if the others have ended without them; raises what else went wrong."""
    workers = [asyncio.ensure_future(_work(phase, command, task_seconds, environment)) for _ in range(jobs)]
    try:
        ends = await asyncio.wait_for(asyncio.gather(*workers, return_exceptions=True), seconds)
    except asyncio.TimeoutError:
        return []
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, WorkerDied):
            raise end
    return [end for end in ends if isinstance(end, WorkerDied)]


async def _work(phase: Phase, command: Sequence[str], task_seconds: float, environment: dict[str, str] | None) -> None:
    """One worker process after the other, until there is no task left."""
    while phase.has_work:
        worker = await _Worker.start(command, environment)
        current = None
        try:
            phase.learn((await worker.receive())["tasks"])
            while phase.pending:
                current = phase.pending.popleft()
                phase.running.add(current)
                start = time.monotonic()
                await worker.send({"run": current})
                answer = await asyncio.wait_for(worker.receive(), task_seconds)
                answer.setdefault("values", {})["seconds"] = round(time.monotonic() - start, 2)
                _finish(phase, current, answer["status"], answer["values"])
                current = None
                if answer.get("spoiled"):
                    break
        except asyncio.TimeoutError:
            _finish(phase, current, FAILED, {"reason": f"hangs: killed after {task_seconds:.0f} s"})
        except WorkerDied as death:
            if current is None:
                raise
            _finish(phase, current, FAILED, {"reason": str(death)})
        finally:
            await worker.kill()


def _finish(phase: Phase, index: int, status: str, values: dict[str, Any]) -> None:
    phase.running.discard(index)
    phase.report(phase.tasks[index], status, values)


class _Worker:
    """A process in a session of its own, so that its children can be killed with it."""

    def __init__(self, process: asyncio.subprocess.Process, stderr: Any) -> None:
        self._process = process
        self._stderr = stderr

    @classmethod
    async def start(cls, command: Sequence[str], environment: dict[str, str] | None) -> _Worker:
        stderr = tempfile.TemporaryFile()  # closed by kill
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            env=environment,
            limit=LONGEST_LINE,
            start_new_session=True,
        )
        return cls(process, stderr)

    async def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # the answer that does not come says why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()

    async def receive(self) -> dict[str, Any]:
        line = await self._process.stdout.readline()
        if line.endswith(b"\n"):
            return json.loads(line)
        status = await self._process.wait()
        end = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise WorkerDied(f"its process died: {end}. {' | '.join(last)}".strip())

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._stderr.close()
