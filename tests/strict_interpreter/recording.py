"""What `record()` collects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Each byte counts once, however many loads, programs or aliasing arguments touch it.

    `bytes_read` includes what the kernel wrote itself before; an atomic update reads and writes. `dot_flops` is
    2*M*N*K summed over the executed `tl.dot`s, padding included. A launch over an empty grid is listed, though a GPU
    skips it.
    """

    kernel: str
    grid: tuple[int, int, int]
    bytes_read: int
    bytes_written: int
    dot_flops: int


_listeners: list[list[Launch]] = []


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect every launch that ends inside the block, in order; blocks may nest."""
    launches: list[Launch] = []
    _listeners.append(launches)
    try:
        yield launches
    finally:
        _listeners[:] = [other for other in _listeners if other is not launches]


def recording() -> bool:
    return bool(_listeners)


def publish(launch: Launch) -> None:
    for launches in _listeners:
        launches.append(launch)
