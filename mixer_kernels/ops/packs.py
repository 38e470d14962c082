"""Packs of blocks whose weights are promised to stay (``freeze_``), by names that start with that of their backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor


class NewPacks(dict[str, Tensor]):
    """Given for packs, it collects what the call packs."""


class KeptPacks(dict[str, Tensor]):
    """Those of a frozen block whose parameters are in this call all that they were when ``stamp`` was made: writes that
    PyTorch counts, addresses, dtypes, shapes and strides have been compared. None, with ``stamp`` None, of another."""

    def __init__(self, packs: Iterable[tuple[str, Tensor]], stamp: object) -> None:
        super().__init__(packs)
        self.stamp = stamp
        self.call: Callable[[Tensor], Tensor] | None = None
        """Put here by a call that is all plan: it does the same on every x that looks the same."""


def has_packs(packs: Mapping[str, Tensor] | None) -> bool:
    """Whether the call takes packs, or makes some to be kept."""
    return bool(packs) or isinstance(packs, NewPacks)


def packs_of(backend: str, packs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``backend``, by the names that it gave them."""
    prefix = f"{backend}/"
    return {name.removeprefix(prefix): pack for name, pack in packs.items() if name.startswith(prefix)}
