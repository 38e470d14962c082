"""Copies of the tree in which one file at a time is changed, and tests that run on them.

The tests run in forks of one process that has imported the libraries: importing them takes longer than most of the
tests. That process imports nothing of the tree itself.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CAUGHT, SURVIVED, TIMED_OUT, BROKEN, NOT_RUN = "caught", "survived", "timed out", "broken", "not run"
_LEFT_OUT = (".*", "build", "dist", "runs", "results", "__pycache__", "*.egg-info")
# Code that does not compile proves nothing about the tests.
_IS_BROKEN = re.compile(r"\b(SyntaxError|IndentationError|NameError|ImportError|CompileError)\b|: error: ")


class Check(NamedTuple):
    """Tests that have to see a change: a file of ``tests`` without its ending, and pytest's ``-k``."""

    tests: str
    chosen: str

    def __str__(self) -> str:
        return f"tests/{self.tests}.py -k {self.chosen!r}"


class Job(NamedTuple):
    """One change, and the tests that run on it, one after the other until one sees it."""

    name: str
    file: str  # from the root of the tree; "" for none
    text: str  # of the file
    checks: tuple[Check, ...]


class Result(NamedTuple):
    outcome: str
    check: Check  # the last that ran
    seconds: float
    output: str


def run(jobs: Iterable[Job], at_once: int = 1, limit: float = 120.0) -> Iterator[tuple[Job, Result]]:
    """Each job's result, as they end. A check is killed after ``limit`` seconds of a CPU, or if it waits as long as ten
    of them would take."""
    waiting = iter(jobs)
    with tempfile.TemporaryDirectory(prefix="planted") as folder:
        idle = [_Copy(Path(folder, str(i)), limit) for i in range(at_once)]
        _import_libraries()
        busy: list[_Copy] = []
        try:
            while True:
                while idle and (job := next(waiting, None)):
                    busy.append(idle.pop())
                    busy[-1].begin(job)
                if not busy:
                    return
                time.sleep(0.02)
                for copy in [*busy]:
                    result = copy.look()
                    if result is not None:
                        busy.remove(copy)
                        idle.append(copy)
                        yield copy.job, result
        finally:
            for copy in busy:
                copy.kill()


class _Copy:
    """A copy of the tree, and the job that is done in it."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.limit = limit
        self.tree, self.scratch, self.log = folder / "tree", folder / "scratch", folder / "log"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        # What is compiled of unchanged sources lies in the tree that was copied, by a hash of the sources.
        (ROOT / "build").mkdir(exist_ok=True)
        (self.tree / "build").symlink_to(ROOT / "build")
        with redirect_stdout(sys.stderr):  # by content, since two changes may be within one tick of the clock
            by_content = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(str(self.tree / "mixer_kernels"), quiet=1, invalidation_mode=by_content)

    def begin(self, job: Job) -> None:
        self.job, self.started, self.left = job, time.monotonic(), list(job.checks)
        path = self.tree / job.file
        self.original = path.read_text() if job.file else None
        if job.file:
            path.write_text(job.text)
        self._start()

    def look(self) -> Result | None:
        """The job's result, if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        is_late = pid == 0 and time.monotonic() - self.check_started > 10 * self.limit
        if is_late:
            self.kill()
        elif pid == 0:
            return None
        output = self.log.read_text(errors="replace")
        is_late = is_late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
        outcome = TIMED_OUT if is_late else _outcome(status, output)
        if outcome == SURVIVED and self.left:
            self._start()
            return None
        if self.original is not None:
            (self.tree / self.job.file).write_text(self.original)
        return Result(outcome, self.check, time.monotonic() - self.started, output)

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _start(self) -> None:
        self.check, self.check_started = self.left.pop(0), time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run_tests()
        with _ignored(ProcessLookupError, PermissionError):
            os.setpgid(self.pid, self.pid)  # here too: the child may not have come to it when it is killed

    def _run_tests(self) -> None:
        status = 70
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(self.limit), int(self.limit) + 10))
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.tree)
            os.environ |= {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
            sys.dont_write_bytecode = True
            sys.path[0] = str(self.tree)
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={self.tree}", f"--basetemp={self.scratch}"]
            status = pytest.main([*options, f"tests/{self.check.tests}.py", "-k", self.check.chosen])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(status))


def _outcome(status: int, output: str) -> str:
    if os.WIFSIGNALED(status):
        return CAUGHT
    code = os.WEXITSTATUS(status)
    if code == 0:
        return SURVIVED if re.search(r"\d+ passed", output) else NOT_RUN
    if code == 5:
        return NOT_RUN
    return CAUGHT if code == 1 and not _IS_BROKEN.search(output) else BROKEN


def _import_libraries() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/strict_interpreter asks for
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import torch._dynamo  # noqa: F401

    with _ignored(ImportError):
        import triton.language  # noqa: F401


@contextmanager
def _ignored(*errors: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except errors:
        pass
