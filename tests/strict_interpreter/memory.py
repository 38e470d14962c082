"""The memory of one launch: which elements each argument has, and which program touched them.

Pointers that a kernel gets are not real: argument number i has a zone of 16 TiB to itself, with the tensor's first
element in the middle. So the pointer says which argument it came from, however far it has moved, and an access is in
bounds when that argument's sizes and strides reach it, whatever else lies at the same distance in real memory. Just
before the access the address is translated. (After more than 8 TiB it counts for the argument whose zone it landed in.)

Who touched what is kept by real address, so that arguments which share storage share the record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import GridTooLarge, OutOfBounds, Race, StrictError

ZONE_BITS = 44
GRID_LIMITS = (2**31 - 1, 65535, 65535)
DENSE_LIMIT = 2**26
"""Up to so many elements a record is one array (committed lazily by the OS); above, pages are added when touched."""
PAGE_BITS = 12
SEVERAL = -1
"""Mark of an element that more than one program touched. 0 is none; program p is p + 1."""


@dataclass(eq=False)
class Argument:
    """A tensor argument: the elements that its sizes and strides reach, counted from `data_ptr()`."""

    name: str
    tensor: Any
    address: int
    itemsize: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    virtual: int = 0
    region: Region | None = None
    _dims: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.empty = 0 in self.size
        dims: list[tuple[int, int]] = []
        moving = [(st, n) for st, n in zip(self.stride, self.size, strict=True) if st != 0 and n > 1]
        for stride, n in sorted(moving):  # from the inside out, joining what is contiguous
            if dims and stride == dims[-1][0] * dims[-1][1]:
                dims[-1] = (dims[-1][0], dims[-1][1] * n)
            else:
                dims.append((stride, n))
        self._dims = dims[::-1]

    @property
    def extent(self) -> int:
        """Elements from the first to the last one that is reached, gaps included."""
        return 0 if self.empty else 1 + sum(stride * (n - 1) for stride, n in self._dims)

    def reaches(self, elements: np.ndarray) -> np.ndarray:
        """For each offset (int64, in elements), whether an index of the tensor leads there."""
        return np.zeros(elements.shape, bool) if self.empty else _reaches(elements, self._dims)

    def index(self, element: int) -> tuple[int, ...] | None:
        """An index that leads to this offset (None where overlapping strides hide it), for messages."""
        index, order = [0] * len(self.size), np.argsort([-s for s in self.stride], kind="stable")
        for d in order:
            if self.stride[d]:
                index[d] = min(element // self.stride[d], self.size[d] - 1)
                element -= index[d] * self.stride[d]
        return tuple(index) if element == 0 else None

    def __str__(self) -> str:
        return f"{self.name!r} ({self.tensor.dtype}, size {self.size}, stride {self.stride})"


def _reaches(elements: np.ndarray, dims: list[tuple[int, int]]) -> np.ndarray:
    if not dims:
        return elements == 0
    (stride, n), rest = dims[0], dims[1:]
    if stride == 1 and not rest:
        return (elements >= 0) & (elements < n)
    reached = np.zeros(elements.shape, bool)
    rest_extent = sum(s * (m - 1) for s, m in rest)
    quotient = elements // stride
    for fewer in range(rest_extent // stride + 1):  # once, unless the strides overlap
        i = quotient - fewer
        reached |= (i >= 0) & (i < n) & _reaches(elements - i * stride, rest)
    return reached


class Region:
    """Real memory under one argument, or several which overlap: who read, wrote and atomically updated each unit."""

    def __init__(self, start: int, stop: int, unit: int) -> None:
        self.start, self.unit = start, unit
        self.units = -(-(stop - start) // unit)
        self._marks: dict[str, np.ndarray] = {}
        self._pages: dict[int, int] | None = None if self.units <= DENSE_LIMIT else {}

    def touch(self, kind: str, addresses: np.ndarray, itemsize: int, program: int) -> tuple[int, str, int] | None:
        """Record a "load", "store" or "atomic" of `program` (from 1); if it races: (lane, with what kind, by whom)."""
        per_lane = itemsize // self.unit
        units = (addresses - self.start) // self.unit
        if per_lane > 1:
            units = (units[:, None] + np.arange(per_lane)).ravel()
        slots = units if self._pages is None else self._page_slots(units)
        others = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}[kind]
        for other in others:
            if other in self._marks:
                mark = self._get_marks(other)[slots]
                bad = (mark != 0) & (mark != program)
                if bad.any():
                    lane = int(np.argmax(bad))
                    return lane // per_lane, other, int(mark[lane])
        marks = self._get_marks(kind)
        if kind == "store":
            lanes = np.arange(slots.size, dtype=np.int32)
            marks[slots] = lanes
            overwritten = marks[slots] != lanes
            if overwritten.any():
                return int(np.argmax(overwritten)) // per_lane, "same store", program
            marks[slots] = program
        else:
            mark = marks[slots]
            marks[slots] = np.where((mark == 0) | (mark == program), program, SEVERAL)
        return None

    def bytes_touched(self, kind: str) -> int:
        """Unique bytes of this kind; an atomic update is a read and a write."""
        touched = [self._get_marks(k)[: self._known] != 0 for k in (kind, "atomic") if k in self._marks]
        return self.unit * int(np.count_nonzero(np.logical_or.reduce(touched))) if touched else 0

    @property
    def _known(self) -> int:
        return self.units if self._pages is None else len(self._pages) << PAGE_BITS

    def _get_marks(self, kind: str) -> np.ndarray:
        """The program (from 1) or SEVERAL that did this to each slot, or 0; room for every slot known by now."""
        needed = self._known
        marks = self._marks.get(kind)
        if marks is None or marks.size < needed:
            grown = np.zeros(needed if self._pages is None else 2 * needed, np.int32)
            if marks is not None:
                grown[: marks.size] = marks
            self._marks[kind] = marks = grown
        return marks

    def _page_slots(self, units: np.ndarray) -> np.ndarray:
        pages, inverse = np.unique(units >> PAGE_BITS, return_inverse=True)
        first = np.array([self._pages.setdefault(page, len(self._pages)) for page in pages.tolist()], np.int64)
        return (first[inverse] << PAGE_BITS) | (units & ((1 << PAGE_BITS) - 1))


class LaunchMemory:
    """Arguments, grid and running program of one launch; checks, records and translates each access."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.grid = (0, 0, 0)
        self.program = (0, 0, 0)
        self.dot_flops = 0
        self._arguments: list[Argument] = []
        self._by_id: dict[int, Argument] = {}
        self._regions: list[Region] = []

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid
        for axis, programs, limit in zip("xyz", grid, GRID_LIMITS, strict=True):
            if programs > limit:
                raise GridTooLarge(
                    f"kernel {self.kernel}: {programs} programs on grid axis {axis}, CUDA allows {limit}"
                )

    def add(self, name: str, tensor: Any, passed: Any) -> None:
        """Add an argument: `passed` is what the kernel gets, `tensor` the tensor behind it."""
        argument = Argument(
            name, tensor, tensor.data_ptr(), tensor.element_size(), tuple(tensor.size()), tuple(tensor.stride())
        )
        self._arguments.append(argument)
        self._by_id[id(passed)] = argument
        zone = len(self._arguments) << ZONE_BITS
        argument.virtual = zone + (1 << (ZONE_BITS - 1)) + argument.address % 4096  # alignment stays as it is

    def find_regions(self) -> None:
        """Group the arguments whose memory overlaps; call once, after the last `add`."""
        groups: list[tuple[int, list[Argument]]] = []  # (end address, members)
        for argument in sorted((a for a in self._arguments if not a.empty), key=lambda a: a.address):
            stop = argument.address + argument.extent * argument.itemsize
            if groups and argument.address < groups[-1][0]:
                groups[-1] = (max(stop, groups[-1][0]), [*groups[-1][1], argument])
            else:
                groups.append((stop, [argument]))
        for stop, members in groups:
            start = members[0].address
            region = Region(start, stop, math.gcd(*(x for a in members for x in (a.itemsize, a.address - start))))
            self._regions.append(region)
            for argument in members:
                argument.region = region

    def virtual_address(self, passed: Any) -> int:
        return self._by_id[id(passed)].virtual

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> np.ndarray:
        """Check and record an access of `itemsize` bytes by each unmasked lane; returns the real addresses."""
        active = pointers.ravel() if mask.all() else pointers[np.broadcast_to(mask, pointers.shape)]
        if active.size == 0:
            return pointers
        zones = active >> np.uint64(ZONE_BITS)
        if (zones == zones[0]).all():
            argument = self._argument(kind, active[0])
            self._access_argument(kind, argument, active, itemsize)
            return pointers + np.uint64((argument.address - argument.virtual) % 2**64)
        real = np.zeros_like(pointers)
        all_zones = pointers >> np.uint64(ZONE_BITS)
        for zone in np.unique(zones):
            members = active[zones == zone]
            argument = self._argument(kind, members[0])
            self._access_argument(kind, argument, members, itemsize)
            moved = pointers + np.uint64((argument.address - argument.virtual) % 2**64)
            real = np.where(all_zones == zone, moved, real)
        return real

    def bytes_touched(self, kind: str) -> int:
        return sum(region.bytes_touched(kind) for region in self._regions)

    def where(self) -> str:
        return f"kernel {self.kernel}, program {self.program} of grid {self.grid}"

    def _argument(self, kind: str, pointer: np.uint64) -> Argument:
        zone = int(pointer) >> ZONE_BITS
        if not 1 <= zone <= len(self._arguments):
            raise OutOfBounds(f"{self.where()}: {kind} at {int(pointer):#x}, which belongs to no tensor argument")
        return self._arguments[zone - 1]

    def _access_argument(self, kind: str, argument: Argument, pointers: np.ndarray, itemsize: int) -> None:
        offsets = (pointers - np.uint64(argument.virtual)).view(np.int64)
        size = argument.itemsize
        elements = offsets // size
        if (elements * size != offsets).any():
            raise OutOfBounds(
                f"{self.where()}: misaligned {kind} of argument {argument}: {offsets[0]} bytes from its start"
            )
        if itemsize != size:
            if itemsize < size:
                raise StrictError(
                    f"{self.where()}: {kind} of {itemsize} bytes through a cast pointer to argument {argument}"
                )
            elements = (elements[:, None] + np.arange(itemsize // size)).ravel()
        reached = argument.reaches(elements)
        if not reached.all():
            bad = elements[~reached]
            raise OutOfBounds(
                f"{self.where()}: {kind} of argument {argument}: {bad.size} of {elements.size} lanes leave it, "
                f"the first at element {bad[0]} from its start (storage order)"
            )
        nx, ny, _ = self.grid
        x, y, z = self.program
        me = 1 + x + nx * (y + ny * z)
        conflict = argument.region.touch(kind, offsets + argument.address, itemsize, me)
        if conflict is not None:
            lane, other, program = conflict
            self._raise_race(kind, argument, int(elements[lane * (itemsize // size)]), other, program)

    def _raise_race(self, kind: str, argument: Argument, element: int, other: str, program: int) -> None:
        here = f"{self.where()}: {kind} of argument {argument}, element {element} (index {argument.index(element)})"
        if other == "same store":
            raise Race(f"{here}: two lanes of one store write it")
        nx, ny, _ = self.grid
        p = program - 1
        who = "several programs" if program == SEVERAL else f"program {(p % nx, p // nx % ny, p // (nx * ny))}"
        did = {"load": "loaded", "store": "stored", "atomic": "atomically updated"}[other]
        raise Race(f"{here}: {who} {did} it in the same launch, and programs run in any order")
