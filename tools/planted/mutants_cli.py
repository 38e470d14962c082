"""``python tools/mutants.py``: a sample of the mutants of the kernels, or all, beside what is on record of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .copies import BROKEN, CAUGHT, NOT_RUN, ROOT, SURVIVED, TIMED_OUT, Job, run
from .mutant_tests import AREAS, EQUIVALENT, checks_of
from .mutants import Mutant, mutants_of

RECORD = ROOT / "build/mutants.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/mutants.py", description=__doc__)
    parser.add_argument("--area", choices=AREAS, default=list(AREAS), nargs="+", help="default: all")
    parser.add_argument("-k", metavar="TEXT", default="", help="mutants with this in 'file:line:column: old -> new'")
    parser.add_argument("--sample", type=int, metavar="N", help="this many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="begin none after so long (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="at once (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="CPU seconds for a test (default: %(default)s)")
    parser.add_argument("--first", type=int, metavar="N", help="of a mutant's tests; no survivor of those is on record")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    given = parser.parse_args(arguments)
    mutants = [m for area in given.area for path in _sources(area) for m in mutants_of(path) if given.k in m.name]
    if given.sample is not None:
        mutants = random.Random(given.seed).sample(mutants, min(given.sample, len(mutants)))
    if given.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    known, until = _recorded(), time.monotonic() + 60 * given.minutes
    by_name = {mutant.name: mutant for mutant in mutants}
    left = [mutant for mutant in mutants if _key(mutant) not in known]
    done = 0

    def jobs() -> Iterator[Job]:
        for mutant in left:
            if time.monotonic() > until:
                return
            yield Job(mutant.name, mutant.file, mutant.text(), checks_of(mutant.file)[: given.first])

    for job, result in run(jobs(), given.jobs, given.limit):
        done += 1
        print(f"[{done}/{len(left)}] {result.outcome:9} {job.name} ({result.seconds:.0f} s)", flush=True)
        known[_key(by_name[job.name])] = result.outcome
        if result.outcome == SURVIVED and given.first is not None:
            continue
        RECORD.parent.mkdir(exist_ok=True)
        with RECORD.open("a") as record:
            record.write(json.dumps({"mutant": _key(by_name[job.name]), "outcome": result.outcome}) + "\n")
    return _told(mutants, known)


def _sources(area: str) -> list[Path]:
    return sorted(path for pattern in AREAS[area] for path in ROOT.glob(pattern))


def _key(mutant: Mutant) -> str:
    """With what the file is now."""
    return f"{mutant.name} of {hashlib.sha256((ROOT / mutant.file).read_bytes()).hexdigest()[:12]}"


def _recorded() -> dict[str, str]:
    if not RECORD.exists():
        return {}
    return {entry["mutant"]: entry["outcome"] for entry in map(json.loads, RECORD.read_text().splitlines())}


def _told(mutants: Sequence[Mutant], known: dict[str, str]) -> int:
    """Print what became of the mutants; the exit status."""
    counts: Counter[str] = Counter()
    for mutant in mutants:
        outcome = known.get(_key(mutant), "not tried")
        if outcome == TIMED_OUT:  # a loop without end is a difference
            outcome = CAUGHT
        if outcome == SURVIVED:
            shown = f"{mutant.where} | {mutant.old} -> {mutant.new}"
            why = next((why for file, words, why in EQUIVALENT if file in mutant.file and words in shown), None)
            outcome = outcome if why is None else "the same"
            print(f"{outcome}: {mutant.name}\n    {mutant.where}" + (f"\n    {why}" if why else ""))
        counts[outcome] += 1
    judged = counts[CAUGHT] + counts[SURVIVED]
    share = f"{counts[CAUGHT] / judged:.1%}" if judged else "none"
    print(
        f"{len(mutants)} mutants: {counts[CAUGHT]} caught, {counts[SURVIVED]} survived ({share} caught); "
        f"{counts['the same']} compute the same, {counts[BROKEN] + counts[NOT_RUN]} do not compile, "
        f"{counts['not tried']} not tried"
    )
    return 0 if judged and not counts[SURVIVED] else 1


if __name__ == "__main__":
    sys.exit(main())
