"""What closes the output: checks, speeds, what went wrong. Of some machines its end is all that comes back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .results import CUT, FAILED, OK, SKIPPED, Results, Row

MAX_REASONS = 25
MAX_REASON, MAX_NAME = 300, 40  # characters
LATENCY_BATCH = 32  # up to this batch size the time of a call is shown, launches included
PROVIDERS = ("eager", "compile", "torch", "triton", "cuda", "cuda:sm90", "bare")

_COLUMNS = (
    "phase", "backend", "case", "dtype", "shape", "config", "status", "max err", "/ eager's", "equal",
)  # fmt: skip


def closing_text(results: Results) -> str:
    """The table of the checks, that of the benchmarks, why tasks were skipped, cut or failed."""
    throughput = results.document["throughput"]
    small = [row for row in throughput if row["batch_size"] <= LATENCY_BATCH and row.get("mode") != "train"]
    parts = [
        _checks(results.rows),
        speed_table(throughput, "ms", "ms (training: memory=fast)"),
        speed_table(small, "call_ms", "ms of a call, launches included"),
        _reasons(results),
    ]
    return "\n\n".join(part for part in parts if part)


def speed_table(throughput: Sequence[dict[str, Any]], figure: str, title: str) -> str:
    """A line a benchmark, a column a provider; ``throughput``: rows of mixer_kernels.bench.report as dictionaries."""
    lines = [[title, *PROVIDERS]]
    for name, group in itertools.groupby(throughput, key=_benchmark):
        found = {row["provider"].removesuffix(" fast"): row.get(figure) for row in group}
        if any(value is not None for value in found.values()):
            values = (found.get(provider) for provider in PROVIDERS)
            lines.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    return _aligned(lines, first_number=1) if len(lines) > 1 else ""


def _benchmark(row: dict[str, Any]) -> str:
    training = " training" if row.get("mode") == "train" else ""
    return f"{row['level']} {row['name']} {row['dtype']} batch {row['batch_size']}{training}"


def _checks(rows: Sequence[Row]) -> str:
    """One line for the tasks of a phase, backend and dtype: the worst of them."""
    lines = [list(_COLUMNS)]
    for _, group in itertools.groupby(rows, key=lambda row: row.phase):
        members = list(group)
        for key in dict.fromkeys((row.backend, row.dtype) for row in members):
            lines.append(_summary([row for row in members if (row.backend, row.dtype) == key]))
    return _aligned(lines, first_number=_COLUMNS.index("max err"))


def _summary(rows: Sequence[Row]) -> list[str]:
    counts = [f"{sum(row.status == status for row in rows)} {status}" for status in (OK, FAILED, CUT, SKIPPED)]
    status = ", ".join(count for count in counts if not count.startswith("0 "))
    shapes, configs = {row.shape for row in rows}, {row.config for row in rows if row.config}
    case = rows[0].case if len(rows) == 1 else f"{len(rows)} cases"
    shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
    config = configs.pop() if len(configs) == 1 and len(rows) == 1 else f"{len(configs)} configs" if configs else ""
    numbers = [
        _worst(rows, "max_err", "{:.1e}"),
        _worst(rows, "err_vs_eager", "{:.2f}"),
        _worst(rows, "repeats_equal", "{}", min),
    ]
    return [rows[0].phase, rows[0].backend, case[:MAX_NAME], rows[0].dtype, shape, config[:MAX_NAME], status, *numbers]


def _worst(rows: Sequence[Row], name: str, form: str, pick: Any = max) -> str:
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return form.format(pick(values)) if values else "-"


def _reasons(results: Results) -> str:
    bad = results.with_status(FAILED, CUT)
    lines = [f"{row.status.upper()} {row.phase}: {row.case}: {(row.reason or '')[:MAX_REASON]}" for row in bad]
    if len(lines) > MAX_REASONS:
        lines[MAX_REASONS:] = [f"and {len(lines) - MAX_REASONS} more in the file"]
    skipped = dict.fromkeys(
        f"skipped {' '.join(filter(None, (row.phase, row.backend)))}: {(row.reason or '')[:MAX_REASON]}"
        for row in results.with_status(SKIPPED)
    )
    return "\n".join([*itertools.islice(skipped, MAX_REASONS), *lines])


def _aligned(lines: Sequence[Sequence[str]], first_number: int) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i >= first_number else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
