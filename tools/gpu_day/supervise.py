"""Runs tasks in processes of their own, and never waits for them longer than it said it would.

A worker says what it is at, and then what came out: lines of JSON both ways. What a task does to its process (a CUDA
fault, which spoils a process for good; a crash; a hang) is a row of the one who is to blame. The process is replaced; a
benchmark is run again without the one to blame, and who has cost two processes sits out from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .plan import FAILED, FAULT, HANG, Task
from .results import Results, say

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-c", "from gpu_day.worker import main; main()"]
START_SECONDS = 90.0  # for a process to import torch and make a context
KILL_SECONDS = 5.0  # a process that is inside the driver may not die at once
MAX_STARTS = 2  # that fail, of one pool


@dataclass
class Pool:
    """Tasks, and how many processes share them. ``ready`` says why they cannot run, once it is known."""

    tasks: deque[Task]
    processes: int = 1
    ready: Callable[[], Awaitable[str | None]] | None = None
    failed_starts: list[str] = field(default_factory=list)


class Died(Exception):
    """How a process ended, and its last words."""


@dataclass
class Supervisor:
    """``arguments``: what the worker is told. ``step_seconds``: how long it may be silent."""

    results: Results
    arguments: dict[str, Any]
    environment: dict[str, str]
    step_seconds: float

    async def run(self, phase: str, pools: Sequence[Pool], seconds: float, **arguments: Any) -> None:
        """Run the pools' tasks side by side for at most ``seconds``; what is not done then is not reached."""
        say(f"== {phase}, at most {seconds:.0f} s")
        lanes = [
            asyncio.ensure_future(self._lane(pool, {**self.arguments, **arguments}))
            for pool in pools
            for _ in range(min(pool.processes, len(pool.tasks)))
        ]
        try:
            if lanes:
                await asyncio.wait(lanes, timeout=max(seconds, 0.0))
        finally:
            for lane in lanes:
                lane.cancel()
            ends = await asyncio.gather(*lanes, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _lane(self, pool: Pool, arguments: dict[str, Any]) -> None:
        """One process after the other, until there is no task left."""
        why = await pool.ready() if pool.ready and pool.tasks else None
        worker = None
        try:
            while pool.tasks:
                task = pool.tasks.popleft()
                reason = why or (self.results.why_out(task.backend) if task.backend else None)
                if reason is None and len(pool.failed_starts) >= MAX_STARTS:
                    reason = f"no process could be started: {pool.failed_starts[-1]}"
                if reason is not None:
                    self.results.leave(task, reason)
                    continue
                if worker is None:
                    worker = await Process.start([*WORKER, json.dumps(arguments)], self.environment)
                    try:
                        self.results.learn((await worker.receive(START_SECONDS))["hello"])
                    except (Died, asyncio.TimeoutError) as error:
                        pool.failed_starts.append(str(error) or f"silent for {START_SECONDS:.0f} s")
                        pool.tasks.appendleft(task)
                        worker = await worker.kill()
                        continue
                again, healthy = await self._do(worker, task)
                if again is not None:
                    pool.tasks.appendleft(again)
                if not healthy:
                    worker = await worker.kill()
        finally:
            if worker is not None:
                await worker.kill()

    async def _do(self, worker: Process, task: Task) -> tuple[Task | None, bool]:
        """Returns the task again if there is more to do of it, and whether the process is fit for another."""
        step, suspects, limit = "beginning", [task.backend] if task.backend else [], self.step_seconds
        self.results.leave(task, "was running when its time was up")
        try:
            await worker.send({"run": asdict(task)})
            while True:
                message = await worker.receive(limit)
                if "at" in message:
                    step, limit = message["at"], max(self.step_seconds, message.get("seconds", 0.0))
                    suspects = message.get("suspects", suspects)
                elif "row" in message:
                    self.results.add(task, **message["row"])
                elif "fault" in message:
                    status, reason, suspects = FAULT, message["fault"], message["suspects"] or suspects
                    break
                elif "done" in message:
                    self.results.finish(task)
                    return None, True
        except asyncio.TimeoutError:
            status, reason = HANG, f"silent for {limit:.0f} s while {step}. {await worker.stack()}"
        except Died as death:
            status, reason = FAULT, f"while {step}: {death}"
        blamed = next((name for name in suspects if name not in task.without), "")
        self.results.add(task, blamed, status if blamed else FAILED, reason=reason)
        if task.phase == "speed" and blamed not in ("", "eager"):  # without eager there is nothing to compare with
            return replace(task, without=(*task.without, blamed)), False
        self.results.finish(task)
        return None, False


class Process:
    """A process in a session of its own, so that its children can be killed with it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Any) -> None:
        self._process, self._log = process, log

    @classmethod
    async def start(cls, command: Sequence[str], environment: dict[str, str], piped: bool = True) -> Process:
        """With pipes to talk through; or without, and all that it prints is its log."""
        log, pipe = tempfile.TemporaryFile(), asyncio.subprocess.PIPE  # noqa: SIM115  closed by kill
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe if piped else asyncio.subprocess.DEVNULL, stdout=pipe if piped else log, stderr=log,
            env=environment, cwd=ROOT, limit=2**22, start_new_session=True,
        )  # fmt: skip
        return cls(process, log)

    async def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # the answer that does not come says why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()

    async def receive(self, seconds: float) -> dict[str, Any]:
        line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        if line.endswith(b"\n"):
            return json.loads(line)
        status = await asyncio.wait_for(self._process.wait(), KILL_SECONDS)
        end = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise Died(f"its process died: {end}. {last_lines(self.log())}".strip())

    async def stack(self) -> str:
        """Where a silent process is, as faulthandler sees it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(0.5)
        return " < ".join(re.findall(r"^ *(File .+)$", self.log().replace(f"{ROOT}/", ""), re.MULTILINE)[:4])

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    async def end(self, seconds: float) -> int | None:
        """The exit status, None if it takes longer."""
        try:
            return await asyncio.wait_for(self._process.wait(), seconds)
        except asyncio.TimeoutError:
            return None

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.end(KILL_SECONDS)
        self._log.close()


def last_lines(log: str, count: int = 8) -> str:
    """For a reason, which is one line."""
    return " | ".join([line.strip() for line in log.splitlines() if line.strip()][-count:])
