"""What the kernels are compiled for: the architecture and its limits."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A GPU architecture: ``name`` ("sm_90", "gfx942"), bytes of shared memory a block may use, multiprocessors."""

    name: str
    shared_memory: int
    multiprocessors: int

    @property
    def is_nvidia(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def capability(self) -> int:
        """10 * major + minor of an NVIDIA compute capability; 0 for other vendors."""
        return int(self.name[3:]) if self.is_nvidia else 0


# Shared memory per block: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (the
# opt-in maximum); LDS of a gfx942 workgroup: AMD CDNA 3 ISA. Multiprocessors: A100, A40, RTX 4090, H100/H200, B200,
# RTX 5090, MI300X; used only where no device is there to be asked.
KNOWN_TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", 166_912, 108),
        Target("sm_86", 101_376, 84),
        Target("sm_89", 101_376, 128),
        Target("sm_90", 232_448, 132),
        Target("sm_100", 232_448, 148),
        Target("sm_120", 101_376, 170),
        Target("gfx942", 65_536, 304),
    )
}

# Set and put back by assume_target.
_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("mixer_kernels_target", default=None)


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
    """Choose kernels and tiles as if every tensor were on ``target``: for compiling and testing without that GPU."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


def target_of(device: torch.device) -> Target:
    """The target of tensors on ``device``; a CPU tensor (Triton's interpreter) counts as sm_80."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _device_target(device.index) if device.type == "cuda" else KNOWN_TARGETS["sm_80"]


@functools.cache  # a device stays what it is while the process lives
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return Target(name, 65_536, properties.multi_processor_count)
    name = f"sm_{10 * properties.major + properties.minor}"
    return Target(name, properties.shared_memory_per_block_optin, properties.multi_processor_count)
