"""Random calls and models against plain PyTorch, many more than the tests draw: ``make fuzz``.

    python tools/fuzz.py --cases 3000 --minutes 60

Prints the smallest case that fails, as an expression: put it into tests/test_properties.py's FOUND.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import strict_interpreter  # noqa: E402
import timm_stub  # noqa: E402

BATCH = 10  # cases of one strategy in a row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing after so long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first %(default)s (default: %(default)s)")
    parser.add_argument("--backend", nargs="+", default=["torch", "triton", "cpu"], help="default: torch triton cpu")
    given = parser.parse_args(arguments)
    strict_interpreter.install()
    timm_stub.define_torchvision_operators()
    torch.set_num_threads(1)
    started, done, seed, failures = time.monotonic(), 0, given.seed, []
    while done < given.cases and time.monotonic() - started < 60 * given.minutes:
        for backend in given.backend:
            for strategy, check in _kinds(backend):
                ran, failure = _run(strategy, check, min(BATCH, given.cases - done), seed)
                done += ran
                failures += [failure] if failure else []
        seed += 1
        minutes = (time.monotonic() - started) / 60
        print(f"{done}/{given.cases} cases, {len(failures)} failed, {minutes:.1f} min", flush=True)
    print(*failures, sep="\n\n")
    return 1 if failures else 0


def _kinds(backend: str) -> list[tuple[Callable, Callable]]:
    import fuzzing

    return [(fuzzing.calls(backend), fuzzing.check), (fuzzing.models(backend), fuzzing.check_model)]


def _run(strategy: Callable, check: Callable, cases: int, seed: int) -> tuple[int, str | None]:
    """How many ran, and the smallest that failed."""
    import hypothesis

    ran, last = 0, None

    def counted(case) -> None:
        nonlocal ran, last
        ran, last = ran + 1, case
        check(case)

    settings = hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(case=strategy)(counted)))()
    except Exception:  # of the smallest case, which ran last
        text = f"{last!r}\n{traceback.format_exc(limit=-3)}"
        print(text, flush=True)
        return min(ran, cases), text
    return ran, None


if __name__ == "__main__":
    sys.exit(main())
