"""What ``fuse_``, ``freeze_`` and what undoes them say about the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

FUSED, RESTORED, FROZEN, LEFT = "fused", "restored", "frozen", "left"


@dataclass(frozen=True)
class Entry:
    """One block of a model, and what became of it."""

    name: str
    """Its name in the model, as in ``model.get_submodule(name)``; "" for the model itself."""
    block: str
    """The class that it had before it was fused."""
    outcome: str
    """"fused", "frozen", "restored" or "left"."""
    detail: str
    """For a fused block, the function of ``mixer_kernels.functional`` that computes it; for a frozen one, the backend
    and what it keeps; for one that was left, the reason."""


@dataclass(frozen=True, repr=False)
class Report:
    """What ``fuse_``, ``unfuse_``, ``freeze_`` or ``unfreeze_`` did to the blocks of a model. ``print`` shows a table.

    ``len`` counts the blocks that were changed; a report without any is false. Iterating gives each ``Entry``.
    """

    entries: tuple[Entry, ...]

    @property
    def fused(self) -> tuple[Entry, ...]:
        """The blocks that the kernels now compute, including those of an earlier ``fuse_``."""
        return self._with(FUSED)

    @property
    def restored(self) -> tuple[Entry, ...]:
        """The blocks that ``unfuse_`` or ``unfreeze_`` restored."""
        return self._with(RESTORED)

    @property
    def frozen(self) -> tuple[Entry, ...]:
        """The blocks that keep their weights packed for the kernels."""
        return self._with(FROZEN)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The blocks that stay as they were."""
        return self._with(LEFT)

    def _with(self, outcome: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.outcome == outcome)

    def as_dicts(self) -> list[dict[str, str]]:
        """The entries as dictionaries of strings, for JSON."""
        return [asdict(entry) for entry in self.entries]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries) - len(self.left)

    def __repr__(self) -> str:
        counts = [f"{len(self._with(outcome))} {outcome}" for outcome in (FUSED, RESTORED, FROZEN, LEFT)]
        summary = ", ".join(count for count in counts if not count.startswith("0 "))
        if not summary:
            return "no blocks found: none that fuse_ knows, or none that was fused or frozen"
        return "\n".join((*_table(self.entries), summary))


def _table(entries: tuple[Entry, ...]) -> Iterator[str]:
    """A line for each group of entries that differ only in the numbers in their names."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for entry in entries:
        parts = entry.name.split(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in parts)
        groups.setdefault((pattern, entry.block, entry.outcome, entry.detail), []).append(parts)
    rows = [
        (
            ".".join(_range(values) for values in zip(*names, strict=True)) or "(the model)",
            f"{len(names)} x {block}",
            outcome,
            detail,
        )
        for (_, block, outcome, detail), names in groups.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _range(values: tuple[str, ...]) -> str:
    """One part of several names: "3", "[0-7]" or "[0,2,5]"."""
    if len(set(values)) == 1:
        return values[0]
    numbers = sorted(set(map(int, values)))
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"[{numbers[0]}-{numbers[-1]}]"
    return f"[{','.join(map(str, numbers))}]"
