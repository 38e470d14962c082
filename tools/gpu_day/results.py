"""Rows, the file that holds them, and who passed: what is recorded in mixer_kernels/measured.json."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, CUT = "ok", "failed", "skipped", "cut"
HOPPER = "cuda:sm90"
BACKENDS = (HOPPER, "cuda", "triton")  # with kernels


@dataclass
class Row:
    """One task. ``max_err`` is against float64; ratios are those of mixer_kernels.bench.report."""

    phase: str
    case: str
    dtype: str = ""
    shape: str = ""
    config: str = ""
    backend: str = ""  # whose kernels it is about
    status: str = OK
    max_err: float | None = None
    err_vs_eager: float | None = None
    repeats_equal: int | None = None
    ms: float | None = None
    call_ms: float | None = None
    vs_eager: float | None = None
    vs_compile: float | None = None
    vs_bare: float | None = None
    seconds: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, phase: str, task: dict[str, Any], status: str, values: dict[str, Any]) -> Row:
        known = {field.name for field in fields(cls)}
        return cls(**{"phase": phase, **task, "status": status, **{n: v for n, v in values.items() if n in known}})

    def line(self) -> str:
        """For the progress of the run."""
        text = f"{self.status:7} {self.case}"
        if self.max_err is not None:
            text += f"  max err {self.max_err:.2e}"
        if self.err_vs_eager is not None:
            text += f" ({self.err_vs_eager:.2f}x eager's)"
        if self.repeats_equal is not None:
            text += f"  {self.repeats_equal} equal"
        if self.ms is not None:
            text += f"  {self.ms:.3f} ms"
        return text + (f"  {self.reason}" if self.reason else "")


class Results:
    """The document, rewritten as a whole with every row: whenever the run is killed, what was measured is there."""

    def __init__(self, **facts: Any) -> None:
        self.rows: list[Row] = []
        self.document: dict[str, Any] = {
            "passed": False, "passed_backends": [], **facts, "phases": [], "rows": [], "throughput": [],
        }  # fmt: skip
        self.paths: list[Path] = []

    def write_into(self, directories: list[Path]) -> None:
        """From now on keep ``<date>.json`` in each directory; ``<date>-2.json`` if the first is there already."""
        date = datetime.date.today().isoformat()
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
            names = (f"{date}{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))
            self.paths.append(next(directory / name for name in names if not (directory / name).exists()))
        self.flush()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.document["rows"].append({name: value for name, value in asdict(row).items() if value not in (None, "")})
        self.flush()

    def flush(self) -> None:
        text = json.dumps(self.document, indent=1) + "\n"
        for path in self.paths:
            partial = path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)

    def with_status(self, *statuses: str) -> list[Row]:
        return [row for row in self.rows if row.status in statuses]


def passed_backends(rows: Sequence[Row], required: Collection[str], per_backend: Collection[str]) -> list[str]:
    """Of which backends all is right: their rows, and those that are of none.

    Nothing failed, nothing of the phases in ``required`` was cut, and something was checked in each of ``per_backend``.
    """

    def right(backend: str) -> bool:
        its = [row for row in rows if row.backend in (backend, "")]
        checked = {row.phase for row in its if row.backend and row.status == OK}
        wrong = [row for row in its if row.status == FAILED or (row.status == CUT and row.phase in required)]
        return not wrong and checked >= set(per_backend)

    return [backend for backend in BACKENDS if right(backend)]


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as a directory: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def record(path: Path, measured: Path, directory: Path) -> str:
    """Enter the GPU of ``path`` into ``measured`` (mixer_kernels/measured.json), for each backend that passed.

    Its results are copied into ``directory`` unless they lie there already.

    Returns:
        what was done. Raises ValueError if no backend passed, or it was not a whole run on a GPU.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    passed = document.get("passed_backends")
    if not passed:
        raise ValueError(f"{path} is not of a whole run that passed: nothing recorded")
    name = document["device"]["name"]
    target = directory / slug(name) / path.name
    if target.exists() and target.resolve() != path.resolve() and target.read_bytes() != path.read_bytes():
        raise ValueError(f"{target} is there already and is another run: rename {path} first")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    known = json.loads(measured.read_text(encoding="utf-8"))
    for backend in passed:
        if backend == HOPPER:  # of which "cuda" uses these sources from now on, and no others
            known[backend] = {**known.get(backend, {}), name: document["cuda_kernels"]["sm90"]["sources"]}
        else:
            known[backend] = sorted({*known.get(backend, []), name})
    measured.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return f"{name!r} is recorded in {measured} for {', '.join(passed)}; results: {target}"


def say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
