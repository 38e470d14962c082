"""Rows, the file that holds them, and the table that closes the output."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED, CUT = "ok", "failed", "skipped", "cut"
MAX_REASONS = 25  # in the closing table: the end of the output is all that some machines give back


@dataclass
class Row:
    """One task. ``max_err`` is against float64; ratios are those of mixer_kernels.bench.report."""

    phase: str
    case: str
    dtype: str = ""
    shape: str = ""
    config: str = ""
    status: str = OK
    max_err: float | None = None
    err_vs_eager: float | None = None
    repeats_equal: int | None = None
    ms: float | None = None
    vs_eager: float | None = None
    vs_compile: float | None = None
    vs_bare: float | None = None
    seconds: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, phase: str, task: dict[str, Any], status: str, values: dict[str, Any]) -> Row:
        known = {field.name for field in fields(cls)}
        return cls(phase, status=status, **task, **{name: value for name, value in values.items() if name in known})

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
            "passed": False, **facts, "phases": [], "rows": [], "throughput": [],
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


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as a directory: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_COLUMNS = (
    "phase", "kernel/case", "dtype", "shape", "config", "status", "max err", "/ eager's", "equal", "ms",
    "vs eager", "vs compile", "/ bare",
)  # fmt: skip


def closing_table(results: Results) -> str:
    """One line for the tasks of a phase and dtype (the worst of them), one for each benchmark, one for each failure."""
    lines = [list(_COLUMNS)]
    for _, group in itertools.groupby(results.rows, key=lambda row: row.phase):
        members = list(group)
        timed = [row for row in members if row.ms is not None]
        for dtype in dict.fromkeys(row.dtype for row in members if row not in timed):
            lines.append(_summary([row for row in members if row.dtype == dtype and row not in timed]))
        lines += [_cells(row) for row in timed]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    numbers = _COLUMNS.index("max err")
    text = "\n".join(
        "  ".join(
            cell.rjust(width) if i >= numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    bad = results.with_status(FAILED, CUT)
    reasons = [f"{row.status.upper()} {row.phase}: {row.case}: {(row.reason or '')[:300]}" for row in bad]
    if len(reasons) > MAX_REASONS:
        reasons[MAX_REASONS:] = [f"and {len(reasons) - MAX_REASONS} more in the file"]
    skipped = dict.fromkeys(f"skipped {row.phase}: {row.reason}" for row in results.with_status(SKIPPED))
    return "\n".join([text, "", *itertools.islice(skipped, MAX_REASONS), *reasons])


def _summary(rows: list[Row]) -> list[str]:
    counts = [f"{sum(row.status == status for row in rows)} {status}" for status in (OK, FAILED, CUT, SKIPPED)]
    status = ", ".join(count for count in counts if not count.startswith("0 "))
    cases = rows[0].case if len(rows) == 1 else f"{len(rows)} cases"
    shapes, configs = {row.shape for row in rows}, {row.config for row in rows if row.config}

    def worst(name: str, pick: Any = max) -> Any:
        return pick((getattr(row, name) for row in rows if getattr(row, name) is not None), default=None)

    merged = Row(
        rows[0].phase,
        cases,
        rows[0].dtype,
        shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes",
        configs.pop() if len(configs) == 1 and len(rows) == 1 else f"{len(configs)} configs" if configs else "",
        status,
        max_err=worst("max_err"),
        err_vs_eager=worst("err_vs_eager"),
        repeats_equal=worst("repeats_equal", min),
    )
    return _cells(merged)


def _cells(row: Row) -> list[str]:
    formats = (
        (row.max_err, "{:.1e}"),
        (row.err_vs_eager, "{:.2f}"),
        (row.repeats_equal, "{}"),
        (row.ms, "{:.3f}"),
        (row.vs_eager, "{:.2f}x"),
        (row.vs_compile, "{:.2f}x"),
        (row.vs_bare, "{:.2f}"),
    )
    numbers = ["-" if value is None else form.format(value) for value, form in formats]
    return [row.phase, row.case, row.dtype, row.shape, row.config[:40], row.status, *numbers]


def record(path: Path, measured: Path, directory: Path) -> str:
    """Enter the GPU of the passed run in ``path`` into ``measured`` (mixer_kernels/measured.json).

    Its results are copied into ``directory`` unless they lie there already.

    Returns:
        what was done. Raises ValueError if the run did not pass, or was not a whole run on a GPU.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if not document.get("passed"):
        raise ValueError(f"{path} is not of a whole run that passed: nothing recorded")
    name = document["device"]["name"]
    target = directory / slug(name) / path.name
    if target.exists() and target.resolve() != path.resolve() and target.read_bytes() != path.read_bytes():
        raise ValueError(f"{target} is there already and is another run: rename {path} first")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    known = json.loads(measured.read_text(encoding="utf-8"))
    known["triton"] = sorted({*known.get("triton", []), name})
    measured.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return f"{name!r} is recorded in {measured}; results: {target}"


def say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
