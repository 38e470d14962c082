"""Recording: what several runs on one GPU say together, into mixer_kernels/measured.json and the README's table."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from .plan import BACKENDS, BAD, HOPPER, OK
from .results import Results, about, read
from .tables import markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- tools/gpu_day.py --record writes from here -->", "<!-- to here -->"


def sources(*more: Path) -> str:
    """A digest of the CUDA sources and ``more``. Without more it is what ``_C.sources`` says of a module that was built
    from this checkout: CMakeLists.txt computes the same."""
    folders = (ROOT / "csrc", ROOT / "csrc/device", ROOT / "csrc/sm90")
    cuda = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    named = sorted((path.relative_to(ROOT).as_posix(), path) for path in (*cuda, *more))
    lines = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for name, path in named]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def merged(paths: Sequence[Path]) -> Results:
    """Of runs of the same sources on the same kind of GPU; ValueError where they are not."""
    results, first = Results(), {}
    for path in paths:
        lines = read(path)
        machine = next((line for line in lines if line["kind"] == "machine" and line["device"]), None)
        if machine is None or not machine["device"]["device"].startswith("cuda"):
            raise ValueError(f"{path} is of no run on a GPU: nothing recorded")
        first = first or about(machine)
        if about(machine) != first:
            raise ValueError(f"{path} is of {about(machine)}, {paths[0]} of {first}: they give no table together")
        for line in lines:
            results.take(line)
    return results


def passed_backends(results: Results) -> list[str]:
    """Those whose truth is whole, that did nothing wrong anywhere, and that have a speed in inference and in training
    as far as the day has both.

    A speed has its results checked, and by the kernels that ship: truth may be of those with bounded waits, whose
    machine code is another. What went wrong in a test or a process that names no backend is held against all.
    """
    bad = {row["provider"].split(" ")[0] for row in results.rows.values() if row["status"] in BAD}
    if "" in bad:
        return []
    modes, found = {"training" in key for key in results.planned if key.startswith("speed: ")}, []
    for backend in BACKENDS:
        its = [row for row in results.rows.values() if row["provider"].split(" ")[0] == backend]
        right = {row["task"] for row in its if row["phase"] == "truth" and row["status"] == OK}
        wanted = {key for key in results.planned if key.startswith("truth: ") and key.endswith(f"[{backend}]")}
        timed = {"training" in row["name"] for row in its if row["phase"] == "speed" and "ms" in row}
        if backend not in bad and wanted and wanted <= right and timed == modes:
            found.append(backend)
    return found


def record(paths: Sequence[Path], root: Path = ROOT, directory: Path = RESULTS) -> str:
    """Enter the GPU into measured.json for each backend that passed, the speeds into the README; keep the files. Says
    what was done; ValueError if the files do not belong together, or nothing in them passed."""
    results = merged(paths)
    passed, name = passed_backends(results), results.machine["device"]["name"]
    if not passed:
        bad = [f"{row['status']} in {row['task']} {row['provider']}" for row in results.bad]
        raise ValueError(f"no backend passed on {name}: nothing recorded. {'; '.join([*bad, *results.missing][:5])}")
    measured, readme = root / "mixer_kernels" / "measured.json", root / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme} has no place for the table, between {BEGIN!r} and {END!r}")
    folder = directory / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    known = json.loads(measured.read_text(encoding="utf-8"))
    for backend in passed:
        if backend == HOPPER:  # of which "cuda" uses these sources from now on, and no others
            known[backend] = {**known.get(backend, {}), name: results.machine["cuda_kernels"]["sm90"]["sources"]}
        else:
            known[backend] = sorted({*known.get(backend, []), name})
    measured.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    readme.write_text(f"{before}{begin}\n\n{markdown(results)}\n\n{end}{after}", encoding="utf-8")
    return f"{name!r} is recorded in {measured} for {', '.join(passed)}; results: {folder}"
