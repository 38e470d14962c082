"""Other programs: the build of the CUDA kernels, the project's tests, the ladder of csrc/sm90."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .plan import BACKENDS, CANNOT, FAILED, OK, Task
from .record import sources
from .results import Results, say
from .supervise import ROOT, Process, last_lines

BUILD_SECONDS = 240.0
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
MODULE = ROOT / "mixer_kernels" / f"_C{SUFFIX}"
BOUNDED = ROOT / "build" / "bounded" / "mixer_kernels" / f"_C{SUFFIX}"  # barriers that say where they wait for ever
ASK = """import json, sys; sys.path.insert(0, sys.argv[1]); import _C
print(json.dumps([_C.sources, list(_C.architectures), _C.bounded_waits]))"""
DIES_WITH_US = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
Environment = dict[str, str]


async def run_program(command: list[str], seconds: float, environment: Environment) -> tuple[int | None, str]:
    """Exit status, None where it took longer; and all that it printed. In the root of the checkout."""
    process = await Process.start([sys.executable, "-c", DIES_WITH_US, *command], environment, piped=False)
    try:
        return await process.end(seconds), process.log()
    finally:
        await process.kill()


def capability() -> str | None:
    """Of the first GPU, as nvidia-smi says it: without PyTorch, which may be slow to come."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def architecture_of(capability: str) -> str:
    """As MIXER_KERNELS_CUDA_ARCHS names it; 9.0 with its own instructions."""
    return capability.replace(".", "") + ("a" if capability == "9.0" else "")


async def why_unfit(path: Path, capability: str | None, environment: Environment) -> str | None:
    """Why the module at ``path`` is not what these sources give for this GPU; None if it is."""
    if not path.exists() or capability is None:
        return "it is not there" if capability else "nvidia-smi names no GPU"
    status, log = await run_program([sys.executable, "-c", ASK, str(path.parent)], 30, environment)
    if status != 0:
        return f"it does not load: {last_lines(log, 1)}"
    built_from, architectures, bounded = json.loads(log.splitlines()[-1])
    if built_from != sources():
        return f"it is of other sources: {built_from}, not {sources()}"
    if architecture_of(capability) not in architectures:
        return f"it is for {', '.join(architectures)}, this GPU is {architecture_of(capability)}"
    return None if bounded == (path == BOUNDED) else "its barriers are of the other kind"


async def build(capability: str | None, environment: Environment) -> str | None:
    """Have a module that fits: the carried one, or one compiled now. Returns why there is none."""
    name, start = MODULE.relative_to(ROOT), time.monotonic()
    why = await why_unfit(MODULE, capability, environment)
    if why is None:
        say(f"_C: {name} is of these sources and for this GPU")
        return None
    if capability is None:
        return why
    architecture = architecture_of(capability)
    say(f"_C: {name} is not used: {why}; compiling for {architecture}")
    environment = {**environment, "MIXER_KERNELS_BUILD_CUDA": "1", "MIXER_KERNELS_BUILD_CPU": "0"}
    environment["MIXER_KERNELS_CUDA_ARCHS"] = architecture
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    why = why_failed(*await run_program(command, BUILD_SECONDS, environment))
    say(f"_C: {why or f'built in {time.monotonic() - start:.0f} s'}")
    return why


def why_failed(status: int | None, log: str) -> str | None:
    """Of a build, by the first errors of its compilers."""
    if status == 0:
        return None
    errors = [line.strip() for line in log.splitlines() if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    what = f"took over {BUILD_SECONDS:.0f} s" if status is None else f"failed with exit status {status}"
    return f"the build {what}: {' | '.join(errors[:3]) or last_lines(log)}"


async def run_each(tasks: list[Task], results: Results, seconds: float, environment: Environment, at_once: int) -> None:
    """A test file or another program for each task, ``at_once`` at a time; what is cut is not reached."""
    ends, gate = time.monotonic() + seconds, asyncio.Semaphore(at_once)
    xdist = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    pytest = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *xdist]

    async def one(task: Task) -> None:
        async with gate:
            left = ends - time.monotonic()
            if left < 5:
                return
            results.leave(task, "was running when its time was up")
            command = [sys.executable, *(pytest if task.phase == "tests" else []), task.name]
            status, log = await run_program(command, left, environment)
            if status is None:
                return
            row = {"provider": task.backend, "status": OK, "detail": f"\n{log}"}  # of a program: all that it printed
            results.add(task, **(tested(status, log, task.backend) if task.phase == "tests" or status else row))
            results.finish(task)

    await asyncio.gather(*map(one, tasks))


def tested(status: int, log: str, backend: str = "") -> dict[str, Any]:
    """What pytest said; of the backend that all failed tests name, if they do."""
    counts = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s.*$", log, re.MULTILINE)
    detail = counts[-1] if counts else ""
    if status == 0 and re.search(r"\b[1-9]\d* passed", detail):
        return {"provider": backend, "status": OK, "detail": detail}
    names = re.findall(r"^(?:FAILED|ERROR) (.+)$", log, re.MULTILINE)
    if status in (0, 5) and detail and not names:
        return {"provider": backend, "status": CANNOT, "reason": f"no test passed: {detail}"}
    backends = [backend, *(each for each in BACKENDS if names and all(each in name for name in names))]
    reason = f"exit status {status}, {detail or 'no counts'}: {' | '.join(names[:4]) or last_lines(log)}"
    return {"provider": backends[-1], "status": FAILED, "reason": reason}
