"""What closes the output: truth, speed, what went wrong, what is missing; and the README's table.

Of some machines the output's last 12,000 characters are all that comes back, so lines that say the same are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .plan import BACKENDS, BAD, CANNOT, OK, OPERATORS, SIZES
from .results import Results, Row

MAX_REASONS, MAX_REASON = 20, 240
PROVIDERS = ("eager", "compile", "torch", "triton", "cuda", "cuda:sm90", "bare")


def closing(results: Results) -> str:
    missing = (f"not reached: {line}" for line in _folded((why, key) for key, why in results.missing.items()))
    parts = _truth(results), _speed(results), _counts(results), _reasons(results), "\n".join(missing)
    return "\n\n".join(filter(None, parts))


def _truth(results: Results) -> str:
    """An operator a line, a backend a column: RMS error by eager's, small and at full size, or what is wrong."""
    rows = {(row["name"], row["provider"]): row for row in _of(results, "truth")}

    def cell(operator: str, backend: str) -> str:
        found = [rows.get((f"{operator}, {size}", backend)) for size in SIZES]
        return ", ".join(_cell(row, "vs_eager", ".2f") for row in found) if operator in OPERATORS[backend] else "-"

    lines = [[name, *(cell(name, backend) for backend in BACKENDS)] for name in OPERATORS["triton"]]
    return _aligned([[f"truth, RMS error / eager's: {', '.join(SIZES)}", *BACKENDS], *lines]) if rows else ""


def _speed(results: Results) -> str:
    rows = _of(results, "speed")
    lines = [
        [name, *(_cell(found.get(each), "ms", ".4f") for each in PROVIDERS)] for name, found in _by_provider(results)
    ]
    goals = [row for row in rows if "goal" in str(row.get("ratios"))]
    words = [f"{row['name']}, {row['provider']}: {', '.join(row['ratios'])}" for row in goals]
    return "\n".join([_aligned([["speed, ms (training: memory=fast)", *PROVIDERS], *lines]), *words]) if rows else ""


def _cell(row: Row | None, figure: str, form: str) -> str:
    if row is None:
        return "?"
    return f"{row[figure]:{form}}" if row["status"] == OK else "-" if row["status"] == CANNOT else row["status"].upper()


def _counts(results: Results) -> str:
    lines = []
    for phase in ("ladder", "tests"):
        found = [row["status"] for row in _of(results, phase)]
        counts = [f"{found.count(status)} {status}" for status in (OK, *BAD, CANNOT) if status in found]
        lines += [f"{phase}: {', '.join(counts)}"] if counts else []
    return "\n".join(lines)


def _reasons(results: Results) -> str:
    bad = [f"{row['status'].upper()} {row['task']} {row['provider']}: {row['reason']}" for row in results.bad]
    more = [f"and {len(bad) - MAX_REASONS} more in the file"] if len(bad) > MAX_REASONS else []
    lacking = [row for row in results.rows.values() if row["status"] == CANNOT]
    folded = _folded((f"{row['provider']}: {row['reason']}"[:MAX_REASON], row["name"]) for row in lacking)
    return "\n".join([*(f"cannot run: {x}" for x in folded), *(line[:MAX_REASON] for line in bad[:MAX_REASONS]), *more])


def _folded(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """(reason, of whom): a line for each reason."""
    found: dict[str, list[str]] = {}
    for reason, name in pairs:
        found.setdefault(reason, []).append(name)
    more = {reason: f" and {len(names) - 3} more" if names[3:] else "" for reason, names in found.items()}
    return [f"{'; '.join(names[:3])}{more[reason]}: {reason}" for reason, names in found.items()]


def markdown(results: Results) -> str:
    """The README's table."""
    versions = ", ".join(f"{name} {results.machine['versions'][name]}" for name in ("torch", "triton", "cuda"))
    head = f"Milliseconds of device time, median, bfloat16, on {results.machine['device']['name']} ({versions}):"
    rows = [["", *PROVIDERS], ["---"] * (len(PROVIDERS) + 1)]
    for name, found in _by_provider(results):
        rows.append([name, *(_cell(found.get(each), "ms", ".3f") for each in PROVIDERS)])
    return "\n".join([head, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _of(results: Results, phase: str) -> list[Row]:
    return [row for row in results.rows.values() if row["phase"] == phase]


def _by_provider(results: Results) -> Iterator[tuple[str, dict[str, Row]]]:
    """The rows of each benchmark by provider; in training those that keep most."""
    rows = _of(results, "speed")
    for name in dict.fromkeys(row["name"] for row in rows):
        yield name, {row["provider"].removesuffix(" fast"): row for row in rows if row["name"] == name}


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines)
