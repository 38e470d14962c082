"""``python tools/gpu_day.py``: the command line, and one phase after the other."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .phases import HOPPER_PHASE, NAMES, PER_BACKEND, PHASES, REQUIRED, Phase
from .results import CUT, FAILED, Results, Row, passed_backends, record, say, slug
from .supervise import WorkerDied, run_phase
from .tables import closing_text
from .tasks import Settings
from .worker import command

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "mixer_kernels" / "measured.json"
RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 530  # seconds: under nine minutes
GIB_PER_JOB = 4  # of GPU memory: half a GiB is the context of a process, the rest is for float64
PLANTS = ("error", "redzone", "crash", "hang")
NO_GPU = 2
EPILOG = """\
The CUDA kernels are built with nvcc, a C++ compiler that it takes, and setuptools, cmake, ninja and pybind11. Without
nvcc or one of the others the build is skipped and says what is missing, and so do the phases that want the kernels.
On a machine without a network bring the Python packages along. Where there is a network, for that machine's Python:
  pip download --dest wheels --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 cmake ninja pybind11 setuptools
and where there is none:
  pip install --no-index --find-links wheels --target site cmake ninja pybind11 setuptools
  PYTHONPATH=$PWD/site PATH=$PWD/site/bin:$PATH python tools/gpu_day.py
The phase tests wants pytest 8.1 or newer, sanitizers wants compute-sanitizer, which is part of the CUDA toolkit."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all was right, 1 if something failed or a check was not reached, 2 without a GPU."""
    arguments = _parse(argv)
    if arguments.record:
        try:
            say(record(arguments.record, MEASURED, RESULTS))
        except (OSError, ValueError, KeyError) as error:
            print(f"gpu_day: {error}", file=sys.stderr)
            return 1
        return 0
    start = time.monotonic()
    results = Results(command=sys.argv[1:], rehearsal=arguments.rehearse, budget=arguments.budget)
    run = _Run(arguments, results, start)
    run.phase(PHASES[0])
    device = results.document.get("device")
    if device is None and not results.with_status(FAILED):
        print(
            "gpu_day: PyTorch sees no GPU here, and this program checks and measures kernels on one.\n"
            "On a CPU, --rehearse runs the same logic on tiny sizes: Triton's kernels interpreted, csrc/ by g++.",
            file=sys.stderr,
        )
        return NO_GPU
    results.write_into(_directories(arguments, device))
    if device is not None:
        for phase in PHASES[1:]:
            if phase.name in arguments.phases:
                run.phase(phase)
    return _close(results, arguments, start)


class _Run:
    """Runs phases one after the other and notes their rows."""

    def __init__(self, arguments: argparse.Namespace, results: Results, start: float) -> None:
        self._arguments = arguments
        self._results = results
        self._start = start

    def phase(self, phase: Phase) -> None:
        """Run one phase; whatever becomes of it is in the results."""
        seconds = self._seconds(phase)
        start, before = time.monotonic(), len(self._results.rows)
        say(f"== {phase.name}, at most {seconds:.0f} s")

        def report(task: dict[str, Any], status: str, values: dict[str, Any]) -> None:
            self._results.document.update(values.pop("facts", {}))
            self._results.document["throughput"] += values.pop("throughput", [])
            values["config"] = values.get("config") or task["config"]
            for each in values.pop("rows", None) or [{}]:  # a benchmark's: one a backend
                row = Row.of(phase.name, task, each.get("status", status), {**values, **each})
                self._results.add(row)
                say(f"{time.monotonic() - self._start:5.0f} s {phase.name:11} {row.line()}")

        arguments = self._arguments
        settings = Settings(
            phase.name, arguments.rehearse, arguments.compile_mode, tuple(arguments.plant), self._without(),
            time.time() + seconds,
        )  # fmt: skip
        try:
            complete = run_phase(
                command(settings),
                jobs=self._jobs(phase),
                seconds=seconds,
                task_seconds=min(phase.task_seconds, seconds),
                report=report,
                environment=_environment(arguments),
            )
        except WorkerDied as death:
            complete = False
            report({"case": "the whole phase", "config": ""}, FAILED, {"reason": str(death)})
        rows = self._results.rows[before:]
        elapsed = time.monotonic() - start
        failed, cut = (sum(row.status == status for row in rows) for status in (FAILED, CUT))
        end = f"{len(rows)} tasks, {failed} failed" + (f", {cut} cut" if cut else "")
        say(f"== {phase.name}: {end}, {elapsed:.0f} s")
        entry = {"name": phase.name, "seconds": round(elapsed, 1), "allotted": round(seconds, 1), "complete": complete}
        self._results.document["phases"].append(entry)
        self._results.flush()

    def _without(self) -> tuple[str, ...]:
        """Backends that later phases leave out: a kernel that hangs would take their time."""
        wrong = {row.backend for row in self._results.rows if row.phase == HOPPER_PHASE and row.status in (FAILED, CUT)}
        return tuple(sorted(wrong - {""}))

    def _seconds(self, phase: Phase) -> float:
        """The phase's part of the time that is left."""
        later = PHASES[NAMES.index(phase.name) + 1 :]
        shares = phase.share + sum(each.share for each in later if each.name in self._arguments.phases)
        left = self._arguments.budget - (time.monotonic() - self._start)
        return max(1.0, left * phase.share / shares)

    def _jobs(self, phase: Phase) -> int:
        if self._arguments.rehearse or phase.jobs == 1:
            return min(self._arguments.jobs or 1, phase.jobs)
        memory = self._results.document["device"]["memory_gib"]
        return max(1, min(self._arguments.jobs or os.cpu_count() or 1, phase.jobs, int(memory // GIB_PER_JOB)))


def _close(results: Results, arguments: argparse.Namespace, start: float) -> int:
    failed = results.with_status(FAILED)
    unreached = [row for row in results.with_status(CUT) if row.phase in REQUIRED]
    right = not failed and not unreached
    document = results.document
    if not arguments.rehearse and not arguments.plant and set(arguments.phases) >= set(NAMES[1:]):
        document["passed_backends"] = passed_backends(results.rows, REQUIRED, PER_BACKEND)
    document["passed"] = right and bool(document["passed_backends"])
    document["seconds"] = round(time.monotonic() - start, 1)
    results.flush()
    say("")
    say(closing_text(results))
    verdict = "passed" if right else f"FAILED: {len(failed)} failed, {len(unreached)} not reached"
    say(f"\n{verdict}: {len(results.rows)} tasks in {document['seconds']:.0f} s")
    for path in results.paths:
        say(f"results: {path}")
    if document["passed_backends"]:
        passed = " and ".join(document["passed_backends"])
        say(f"record {passed}, on any machine: python tools/gpu_day.py --record {results.paths[0].name}")
    return 0 if right else 1


def _directories(arguments: argparse.Namespace, device: dict[str, Any] | None) -> list[Path]:
    """Where the results go: under --output by the GPU's name, and flat into ``$OUT`` where that is set."""
    directories = []
    if arguments.output is not None or not arguments.rehearse:
        directories.append((arguments.output or RESULTS) / slug(device["name"] if device else "unknown"))
    if os.environ.get("OUT"):
        directories.append(Path(os.environ["OUT"]))
    return directories


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The workers import this checkout and the tests' helpers; nothing has to be installed."""
    environment = dict(os.environ)
    paths = [ROOT / "tools", ROOT / "tests", ROOT, environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    environment.pop("PYTHONOPTIMIZE", None)  # the accuracy rule is made of assertions
    for name in ("MIXER_KERNELS_BACKEND", "TRITON_INTERPRET"):
        environment.pop(name, None)
    if arguments.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_day.py",
        description="Build the CUDA kernels, check every kernel on this machine's GPU, then measure, in under nine "
        "minutes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--phases", type=_phases, default=NAMES, metavar="A,B", help=f"some of {','.join(NAMES[1:])} (default: all)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET}")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="results go to DIR/<gpu>/<date>.json (default: benchmarks/results)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that check correctness side by side")
    parser.add_argument(
        "--compile-mode",
        default="default",
        metavar="MODE",
        help="of torch.compile in the benchmarks (default: default)",
    )
    parser.add_argument("--rehearse", action="store_true", help="run the same logic without a GPU, on tiny sizes")
    parser.add_argument(
        "--plant",
        nargs="+",
        default=[],
        metavar="KIND:TEXT",
        help=f"let cases whose name contains TEXT go wrong, KIND one of {', '.join(PLANTS)}: the run must then fail",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="enter a run's GPU in mixer_kernels/measured.json, for each backend that passed; runs nothing",
    )
    arguments = parser.parse_args(argv)
    if arguments.budget <= 0:
        parser.error(f"--budget must be > 0 seconds, got {arguments.budget:g}")
    unknown = [plant for plant in arguments.plant if plant.partition(":")[0] not in PLANTS or ":" not in plant]
    if unknown:
        parser.error(f"--plant: got {unknown[0]!r}, expected KIND:TEXT with KIND one of {', '.join(PLANTS)}")
    return arguments


def _phases(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {','.join(NAMES[1:])}")
    return names
