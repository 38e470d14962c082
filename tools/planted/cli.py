"""``python tools/planted.py``: the breakages, and what the tests say of each."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence

from . import of_cpu, of_cuda, of_python, of_sm90, of_triton
from .breakage import Breakage, job_of
from .copies import BROKEN, CAUGHT, SURVIVED, Job, Result, run

AREAS: dict[str, dict[str, Breakage]] = {
    "triton": of_triton.BREAKAGES,
    "cuda": of_cuda.BREAKAGES,
    "sm90": of_sm90.BREAKAGES,
    "cpu": of_cpu.BREAKAGES,
    "python": of_python.BREAKAGES,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/planted.py", description=__doc__)
    parser.add_argument("-k", metavar="TEXT", default=[""], nargs="+", help="those with one of these in 'area: name'")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of each area every Nth (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="at once (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="CPU seconds for a test (default: %(default)s)")
    parser.add_argument(
        "--untested", action="store_true", help="take for granted that the tests pass without a breakage"
    )
    given = parser.parse_args(arguments)
    chosen = {
        f"{area}: {name}": breakage
        for area, breakages in AREAS.items()
        for name, breakage in list(breakages.items())[:: given.every]
        if any(text in f"{area}: {name}" for text in given.k)
    }
    jobs = [job_of(name, breakage) for name, breakage in chosen.items()]
    checks = [] if given.untested else [*dict.fromkeys(breakage.check for breakage in chosen.values())]
    healthy = [Job(f"unbroken: {check}", "", "", (check,)) for check in checks]
    total, done, counts = len(jobs) + len(healthy), 0, Counter()
    for job, result in run([*healthy, *jobs], given.jobs, given.limit):
        done += 1
        breakage = chosen.get(job.name)
        outcome = result.outcome if breakage is None else _outcome(breakage, result)
        is_right = outcome == (SURVIVED if breakage is None else CAUGHT)
        counts[is_right, breakage is None] += 1
        said = "passes" if breakage is None and is_right else outcome
        print(f"[{done}/{total}] {said:9} {job.name} ({result.seconds:.1f} s)", flush=True)
        if not is_right:
            print(f"    {result.check}\n{_end(result.output)}", flush=True)
    print(f"{len(jobs)} breakages: {counts[True, False]} caught, {counts[False, False]} not", end="")
    print(f"; {counts[False, True]} tests fail without one" if counts[False, True] else "")
    return 0 if jobs and not counts[False, False] + counts[False, True] else 1


def _outcome(breakage: Breakage, result: Result) -> str:
    if result.outcome == CAUGHT and not re.search(breakage.says, result.output):
        return f"{BROKEN}: not what it says"
    return result.outcome


def _end(output: str) -> str:
    return "\n".join(f"    | {line}" for line in output.splitlines()[-25:])


if __name__ == "__main__":
    sys.exit(main())
