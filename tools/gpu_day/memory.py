"""Memory that shows what a kernel did to it: fresh tensors hold NaN and lie between red zones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from strict_interpreter import poisoned_memory
from torch import Tensor

RED_ZONE = 4096  # bytes on each side: a multiple of 16, so that what lies between is aligned as without it
MARK = 0xA5


class Watch:
    """The tensors that ``torch.empty`` returned while memory was watched."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, torch.Size]] = []

    def empty(self, size: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = torch.full((size.numel() * dtype.itemsize + 2 * RED_ZONE,), MARK, dtype=torch.uint8, device=device)
        self._buffers.append((buffer, size))
        return buffer[RED_ZONE:-RED_ZONE].view(dtype).fill_(torch.nan).view(size)

    def check(self, output: Tensor) -> None:
        """Raise AssertionError if a kernel wrote beside a tensor, or left some of ``output`` unwritten by it."""
        addresses = {buffer.untyped_storage().data_ptr() for buffer, _ in self._buffers}
        assert output.untyped_storage().data_ptr() in addresses, "the output does not lie between red zones"
        self.check_zones()

    def check_zones(self) -> None:
        """Raise AssertionError if a kernel wrote beside a tensor."""
        for buffer, size in self._buffers:
            for where, zone in (("before", buffer[:RED_ZONE]), ("behind", buffer[-RED_ZONE:])):
                assert bool((zone == MARK).all()), f"a kernel wrote {where} a tensor of shape {tuple(size)}"


@contextlib.contextmanager
def watched_memory() -> Iterator[Watch]:
    """Inside, ``torch.empty`` gives floating-point tensors full of NaN between red zones; fresh memory is NaN too.

    For one thread: it replaces ``torch.empty`` for the whole process.
    """
    watch, plain = Watch(), torch.empty

    def empty(*size, dtype: torch.dtype | None = None, device: torch.device | None = None, **options) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        if options or not dtype.is_floating_point:
            return plain(*size, dtype=dtype, device=device, **options)
        return watch.empty(torch.Size(size if all(isinstance(n, int) for n in size) else size[0]), dtype, device)

    with poisoned_memory(), mock.patch.object(torch, "empty", empty):
        yield watch
