"""``python tools/gpu_day.py``: the command line, and the phases in the order of their worth."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from . import plan, programs, tables
from .plan import BACKENDS, COMPILED, Task
from .record import RESULTS, record
from .results import Results, read, say
from .supervise import ROOT, Pool, Supervisor

NO_GPU = 2
DEVICE = "cuda"
WARM_UP_SECONDS, TRUTH_SECONDS, SPEED_SECONDS = 90.0, 90.0, 150.0
LATE_SECONDS = 60.0  # more for truth where the kernels have to be compiled first
BREADTH_SECONDS = 120.0  # kept for what comes behind speed, once speed has had its own
STEP_SECONDS = 15.0  # without a sign of life, and a task hangs
CLOSING_SECONDS = 8.0
PROCESSES = {"triton": 8, "cuda": 2, plan.HOPPER: 2}
AHEAD_PROCESSES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all was reached and right, 1 if not, 2 without a GPU."""
    arguments = _parse(argv)
    try:
        if arguments.record:
            say(record(arguments.record))
            return 0
        earlier = [line for path in arguments.resume for line in read(path)]
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"gpu_day: {error}", file=sys.stderr)
        return 1
    results = Results(arguments.output, earlier)
    results.take({
        "kind": "run", "command": sys.argv[1:], "time": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "planned": [task.key for tasks in plan.day().values() for task in tasks],
    })  # fmt: skip
    with contextlib.suppress(asyncio.CancelledError):  # told to stop: what there is, is printed
        asyncio.run(_Day(arguments, results).run())
    if results.machine.get("device", True) is None:
        print("gpu_day: PyTorch sees no GPU here. tests/gpu_day_rehearsal.py needs none.", file=sys.stderr)
        return NO_GPU
    return _close(results)


class _Day:
    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self._minutes, self._results, self._environment = arguments.minutes, results, _environment()
        settings = {"device": DEVICE, "compile_mode": arguments.compile_mode}
        self._supervisor = Supervisor(results, settings, self._environment, STEP_SECONDS)
        self._why_not_built: str | None = None

    @property
    def _left(self) -> float:
        return 60 * self._minutes - CLOSING_SECONDS - self._results.elapsed

    async def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, asyncio.current_task().cancel)
        capability = programs.capability()
        built = asyncio.ensure_future(programs.build(capability, self._environment))
        try:
            await self._supervisor.run("warm-up", [Pool(deque([Task("warm-up", "warm-up")]))], WARM_UP_SECONDS)
            if self._results.machine.get("device", True) is not None:
                await self._truth(capability, built)
                await self._speed()
                await self._breadth()
        finally:
            built.cancel()
            await asyncio.gather(built, return_exceptions=True)

    async def _truth(self, capability: str | None, built: asyncio.Future[str | None]) -> None:
        """With the build beside it, and torch.compile's functions for the benchmarks."""
        unfit = await programs.why_unfit(programs.BOUNDED, capability, self._environment)
        say(f"_C with bounded waits: {unfit or 'used for truth'}")
        pools = []
        for backend in BACKENDS:
            tasks = deque(task for task in self._open("truth") if task.backend == backend)
            ready = (lambda: asyncio.shield(built)) if backend in COMPILED else None
            pools.append(Pool(tasks, _at_once(PROCESSES[backend]), ready))
        ahead = deque(Task("ahead", task.name) for task in self._open("speed") if DEVICE == "cuda")
        pools.append(Pool(ahead, _at_once(AHEAD_PROCESSES)))
        seconds = min(self._left, TRUTH_SECONDS + (0.0 if built.done() else LATE_SECONDS))
        await self._supervisor.run("truth", pools, seconds, bounded="" if unfit else str(programs.BOUNDED))
        self._why_not_built = built.result() if built.done() else "the build had not ended when speed began"

    async def _speed(self) -> None:
        names = [f"{backend}{memory}" for backend in BACKENDS for memory in ("", " fast", " min")]
        absent = COMPILED if self._why_not_built else ()
        out = [name for name in (*names, "compile") if self._results.why_out(name) or name.split(" ")[0] in absent]
        tasks = deque(Task(task.phase, task.name, without=tuple(out)) for task in self._open("speed"))
        seconds = max(SPEED_SECONDS, self._left - BREADTH_SECONDS)
        await self._supervisor.run("speed", [Pool(tasks)], min(self._left, seconds))

    async def _breadth(self) -> None:
        for phase, at_once in (("ladder", 1), ("tests", _at_once(16) // 2 + 1)):
            say(f"== {phase}, at most {self._left:.0f} s")
            await programs.run_each(self._open(phase), self._results, self._left, self._environment, at_once)

    def _open(self, phase: str) -> list[Task]:
        """The tasks of a phase that are not done, and can be."""
        tasks = [task for task in plan.day().get(phase, []) if task.key not in self._results.done]
        absent = COMPILED if self._why_not_built else ()
        for task in tasks:
            if task.backend in absent:
                self._results.leave(task, self._why_not_built)
        return [task for task in tasks if task.backend not in absent]


def _at_once(most: int) -> int:
    return max(1, min(most, (os.cpu_count() or 1) // 2))


def _close(results: Results) -> int:
    missing, bad = results.missing, results.bad
    say(f"\n{tables.closing(results)}\n")
    what = f"{len(bad)} wrong, {len(missing)} not reached" if missing or bad else "all was reached and is right"
    say(f"{what}, in {results.elapsed:.0f} s; results: {results.path}")
    if missing:
        say(f"go on with: python tools/gpu_day.py --minutes 4 --resume {results.path}")
    say(f"record it, on any machine: python tools/gpu_day.py --record {results.path} ...")
    return 1 if missing or bad else 0


def _environment() -> dict[str, str]:
    """The workers import this checkout and the tests' helpers; nothing has to be installed."""
    cleared = ("PYTHONOPTIMIZE", "MIXER_KERNELS_BACKEND", "TRITON_INTERPRET")
    paths = [ROOT / "tools", ROOT / "tests", ROOT, os.environ.get("PYTHONPATH")]
    python_path = os.pathsep.join(str(path) for path in paths if path)
    return {name: value for name, value in os.environ.items() if name not in cleared} | {"PYTHONPATH": python_path}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    what = "On a machine with a GPU: do the kernels agree, and how fast are they. tools/gpu_day/README.md says more."
    parser = argparse.ArgumentParser(prog="gpu_day.py", description=what)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)g)")
    parser.add_argument("--resume", type=Path, nargs="+", default=[], metavar="FILE", help="do what these runs did not")
    path = Path(os.environ.get("OUT") or RESULTS) / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.jsonl"
    parser.add_argument("--output", type=Path, default=path, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--compile-mode", default="default", metavar="MODE", help="of torch.compile (default: default)")
    parser.add_argument(
        "--record", type=Path, nargs="+", metavar="FILE",
        help="enter what these runs on one GPU say in mixer_kernels/measured.json and the README; runs nothing",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be > 0, got {arguments.minutes:g}")
    return arguments
