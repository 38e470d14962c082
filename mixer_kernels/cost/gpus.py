"""The GPUs for which a cost can be predicted: their ceilings and what the kernels are compiled for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..bench.roofline import PEAKS, Peak
from ..tuning.target import KNOWN_TARGETS, Target


@dataclass(frozen=True)
class Gpu:
    """``name`` as PyTorch calls it."""

    name: str
    target: Target

    @property
    def peak(self) -> Peak:
        return PEAKS[self.name]


def _gpu(name: str, target: str, multiprocessors: int) -> Gpu:
    return Gpu(name, dataclasses.replace(KNOWN_TARGETS[target], multiprocessors=multiprocessors))


# Multiprocessors: the data sheets and white papers that bench/roofline.py names.
GPUS = {
    "a100": _gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108),
    "a100-pcie": _gpu("NVIDIA A100 80GB PCIe", "sm_80", 108),
    "a10": _gpu("NVIDIA A10", "sm_86", 72),
    "a6000": _gpu("NVIDIA RTX A6000", "sm_86", 84),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", "sm_86", 82),
    "l4": _gpu("NVIDIA L4", "sm_89", 58),
    "l40s": _gpu("NVIDIA L40S", "sm_89", 142),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", "sm_89", 128),
    "h100": _gpu("NVIDIA H100 80GB HBM3", "sm_90", 132),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", "sm_90", 114),
    "h200": _gpu("NVIDIA H200", "sm_90", 132),
    "b200": _gpu("NVIDIA B200", "sm_100", 148),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", "sm_120", 170),
}


def gpu(name: str) -> Gpu:
    """The GPU called ``name``, in any case; ValueError with those that exist."""
    found = GPUS.get(name.lower())
    if found is None:
        raise ValueError(f"--gpu: got {name}, expected one of {', '.join(GPUS)}")
    return found
