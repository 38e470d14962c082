"""The results: lines of JSON, appended as they come, and what one or several such files say together."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .plan import BAD, MAX_STRIKES, STRIKES, Task

Row = dict[str, Any]  # task (its key), phase, name, provider, status, and what there is of: reason, figures


def say(text: str) -> None:
    print(text, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; the last may be half a line, where the machine was taken away."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            say(f"{path}: a line is cut off and left out: {text[:60]!r}")
    return lines


class Results:
    """What is known so far. With ``path`` each new line is appended to it."""

    def __init__(self, path: Path | None = None, earlier: Iterable[dict[str, Any]] = ()) -> None:
        self.machine: dict[str, Any] = {}
        self.planned: dict[str, None] = {}  # keys of tasks, in order
        self.rows: dict[tuple[str, str], Row] = {}  # by task and provider
        self.done: set[str] = set()
        self._why_missing: dict[str, str] = {}
        self._start = time.monotonic()
        self.path: Path | None = None
        for line in earlier:
            self.take(line)
        self.path = path

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def take(self, line: dict[str, Any]) -> None:
        """One line, of a file or new. What went wrong once stays wrong, whatever another run says."""
        kind = line["kind"]
        if kind == "run":
            self.planned |= dict.fromkeys(line["planned"])
        elif kind == "machine":
            if _has_kernels(line) or not _has_kernels(self.machine):
                self.machine = line
        elif kind == "row":
            place = line["task"], line["provider"]
            if self.rows.get(place, line)["status"] not in BAD or line["status"] in BAD:
                self.rows[place] = line
        elif kind == "done":
            self.done.add(line["task"])
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def learn(self, facts: dict[str, Any]) -> None:
        """What a process says about the machine."""
        if self.machine.get("device") and about(self.machine) != about(facts):
            say(f"what is resumed is left out: it is of {about(self.machine)}, this is {about(facts)}")
            self.machine = {}
            self.rows.clear(), self.done.clear()
        self.take({"kind": "machine", **facts})

    def add(self, task: Task, provider: str, status: str, **values: Any) -> None:
        row = {"task": task.key, "phase": task.phase, "name": task.name, "provider": provider, "status": status}
        row |= {name: value for name, value in values.items() if value is not None}
        if task.phase != "ahead":  # what it prepares is measured, or found wanting, later
            self.take({"kind": "row", **row})
        say(f"{self.elapsed:4.0f} s  {line_of(row)}")

    def finish(self, task: Task) -> None:
        self.take({"kind": "done", "task": task.key})

    def leave(self, task: Task, why: str) -> None:
        """It is not reached: no verdict on anything."""
        self._why_missing[task.key] = why

    def why_out(self, name: str) -> str | None:
        """Why the backend or provider ``name`` sits out, if it does."""
        backend = name.split(" ")[0]
        its = [row for row in self.rows.values() if row["provider"].split(" ")[0] == backend]
        strikes = [f"{row['status']} in {row['task']}" for row in its if row["status"] in STRIKES]
        return f"{backend} sits out: {'; '.join(strikes[:MAX_STRIKES])}" if len(strikes) >= MAX_STRIKES else None

    @property
    def bad(self) -> list[Row]:
        return [row for row in self.rows.values() if row["status"] in BAD]

    @property
    def missing(self) -> dict[str, str]:
        """Tasks that were not reached, and why."""
        return {key: self._why_missing.get(key, "time was up") for key in self.planned if key not in self.done}


def about(machine: dict[str, Any]) -> dict[str, str | None]:
    """What results have to have in common to stand in one table."""
    return {"sources": machine.get("sources"), "GPU": (machine["device"] or {}).get("name")}


def _has_kernels(machine: dict[str, Any]) -> bool:
    return "sm90" in machine.get("cuda_kernels", ())


_FIGURES = {
    "max_err": "  max error {:.1e}", "vs_eager": ", RMS {:.2f} x eager's",
    "ms": "  {:.4f} ms", "p20": " (p20 {:.4f}", "p80": ", p80 {:.4f})", "call_ms": ", call {:.3f}",
    "detail": "  {}", "reason": "  {}",
}  # fmt: skip


def line_of(row: Row) -> str:
    """One row for the progress of the run."""
    figures = "".join(form.format(row[name]) for name, form in _FIGURES.items() if row.get(name) not in (None, ""))
    return ", ".join([f"{row['status']:10} {row['name']} {row['provider']}{figures}", *row.get("ratios", ())])
