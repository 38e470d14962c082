"""The rows of a throughput report, and the three shapes it takes: table, JSON, and a plot (see plot)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import info
from ..shapes import SPECS
from .cases import Case
from .roofline import floor_seconds
from .timing import Samples

CANNOT_RUN = "cannot run"  # how the reasons of a machine that lacks something begin
LEVEL_TITLES = {"token": "token mixing", "channel": "channel mixing", "block": "block", "model": "whole model"}
TRAINING_TITLES = {level: f"{title}, forward + backward" for level, title in LEVEL_TITLES.items()}
TRAINING_TITLES["model"] = "whole model, training step (forward, loss, backward, AdamW)"
LEGEND = (
    "ms: median, on a GPU device time; call ms: what a caller sees, launches included. img/s: of time series, series.\n"
    "TFLOP/s: useful FLOPs of the products. GB/s: least bytes. roofline: least possible time / time.\n"
    "vs eager, vs compile: their time / time, more is better. / bare: time / time of the bare matrix products, less is "
    "better.\nRatios are within one run.\n"
    "MiB: on a GPU, allocated at most during a call on top of what was before; on a CPU, what autograd saves to train."
)


@dataclass(frozen=True)
class Row:
    """One provider of one case. Figures are None where there is none; ``reason`` then says why, if it has no time."""

    level: str
    name: str
    S: int
    C: int
    D_S: int
    D_C: int
    dtype: str
    batch_size: int
    provider: str
    mode: str = "infer"
    ms: float | None = None
    call_ms: float | None = None
    images_per_s: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    roofline_share: float | None = None
    speedup_vs_eager: float | None = None
    speedup_vs_compile: float | None = None
    time_vs_bare: float | None = None
    memory_mib: float | None = None  # see memory
    rounds: int = 0
    reason: str | None = None
    detail: str | None = None

    @property
    def group(self) -> tuple:
        return (self.level, self.name, self.S, self.C, self.D_S, self.D_C, self.dtype, self.batch_size, self.mode)


def group_rows(
    case: Case,
    device: torch.device,
    providers: Sequence[str],
    samples: dict[str, Samples],
    failures: dict[str, str],
    details: dict[str, str],
    memory: dict[str, int | None] | None = None,
) -> list[Row]:
    """The rows of one case, whose providers were measured in one run: only then may they be divided by each other."""
    dtype, least = case.dtype_name(device), case.bytes
    floor = None if least is None else floor_seconds(case.flops, least, dtype, info.device_name(device))
    used = memory or {}
    median = {name: each.median for name, each in samples.items()}

    def ratio(numerator: float | None, denominator: float | None) -> float | None:
        return None if numerator is None or denominator is None else numerator / denominator

    rows = []
    for provider in providers:
        row = {"level": case.level, "name": case.name, **asdict(case.shape), "dtype": dtype}
        row |= {"batch_size": case.batch_size, "provider": provider, "mode": case.mode, "detail": details.get(provider)}
        if provider not in samples:
            rows.append(Row(**row, reason=failures[provider]))
            continue
        seconds, call = median[provider], samples[provider].call_median
        rows.append(
            Row(
                **row,
                ms=seconds * 1e3,
                call_ms=None if call is None else call * 1e3,
                images_per_s=case.batch_size / seconds,
                tflops=case.flops / seconds / 1e12,
                gb_per_s=None if least is None else least / seconds / 1e9,
                roofline_share=ratio(floor, seconds),
                speedup_vs_eager=ratio(median.get("eager"), seconds),
                speedup_vs_compile=ratio(median.get("compile"), seconds),
                time_vs_bare=ratio(seconds, median.get("bare")),
                memory_mib=None if used.get(provider) is None else used[provider] / 2**20,
                rounds=len(samples[provider].seconds),
            )
        )
    return rows


@dataclass(frozen=True)
class Report:
    """Rows, and where they were measured. ``str()`` is the table."""

    rows: list[Row]
    device: dict[str, Any]
    versions: dict[str, str | None] = field(default_factory=lambda: info.versions())

    @classmethod
    def of(cls, rows: list[Row], device: torch.device) -> Report:
        return cls(rows, info.device_info(device))

    def __str__(self) -> str:
        return table(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"device": self.device, "versions": self.versions, "throughput": [asdict(row) for row in self.rows]}

    def write_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def significant(value: float) -> str:
    """Three digits or more that mean something, on an H200 and on a laptop: 24,118, 512, 36.6, 3.82, 0.0172."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


# Heading, attribute, format.
_COLUMNS = (
    ("ms", "ms", "{:.3f}".format),
    ("call ms", "call_ms", "{:.3f}".format),
    ("img/s", "images_per_s", significant),
    ("MiB", "memory_mib", "{:,.1f}".format),
    ("TFLOP/s", "tflops", significant),
    ("GB/s", "gb_per_s", significant),
    ("roofline", "roofline_share", "{:.0%}".format),
    ("vs eager", "speedup_vs_eager", "{:.2f}x".format),
    ("vs compile", "speedup_vs_compile", "{:.2f}x".format),
    ("/ bare", "time_vs_bare", "{:.2f}".format),
)


def table(rows: Sequence[Row], legend: bool = True) -> str:
    """Groups under a line that names them, one line a provider; what could not run, and why, at the end."""
    if not rows:
        return "nothing was measured"
    return "\n".join([group_lines(rows), closing_lines(rows, legend)]).rstrip("\n")


def group_lines(rows: Sequence[Row]) -> str:
    """Those groups; a provider that ran without a time shows the reason."""
    cells = [[_cell(row, attribute, form) for _, attribute, form in _COLUMNS] for row in rows]
    name_width = max(len(row.provider) for row in rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    widths = [max(width, len(heading)) for width, (heading, _, _) in zip(widths, _COLUMNS, strict=True)]
    headings = [heading.rjust(width) for width, (heading, _, _) in zip(widths, _COLUMNS, strict=True)]
    lines = ["  ".join([" " * (name_width + 2), *headings])]
    for _, group in itertools.groupby(zip(rows, cells, strict=True), key=lambda pair: pair[0].group):
        members = list(group)
        lines += ["", _title(members[0][0])]
        for row, line in members:
            if not _could_not_run(row):
                numbers = [row.reason] if row.reason else [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
                lines.append("  ".join([f"  {row.provider:<{name_width}}", *numbers]))
    return "\n".join(lines)


def closing_lines(rows: Sequence[Row], legend: bool = True) -> str:
    """What could not run, a line for each reason, and what the columns are."""
    providers: dict[str, dict[str, None]] = {}
    for row in filter(_could_not_run, rows):
        providers.setdefault(row.reason, {})[row.provider] = None
    lines = ["", *(f"  {', '.join(names)}: {reason}" for reason, names in providers.items())] if providers else []
    return "\n".join([*lines, *(["", LEGEND] if legend else [])])


def _could_not_run(row: Row) -> bool:
    return row.reason is not None and row.reason.startswith(CANNOT_RUN)


def pixels(row: Row) -> str:
    """The size of a whole model's images."""
    return f"{SPECS[row.name].patch_size * math.isqrt(row.S)} px" if row.name in SPECS else f"{row.S} tokens"


def model_name(row: Row) -> str:
    """What a whole model is called; one whose blocks have many shapes has no S."""
    return f"{row.name} at {pixels(row)}" if row.S else row.name


def _title(row: Row) -> str:
    sizes = f" (S {row.S}, C {row.C}, D_S {row.D_S}, D_C {row.D_C})" if row.S else ""
    title = (TRAINING_TITLES if row.mode == "train" else LEVEL_TITLES)[row.level]
    name = model_name(row) if row.level == "model" else row.name
    return f"{title}, {name}{sizes}, {row.dtype}, batch {row.batch_size}"


def _cell(row: Row, attribute: str, form: Callable[[float], str]) -> str:
    value = getattr(row, attribute)
    return "-" if value is None else form(value)
