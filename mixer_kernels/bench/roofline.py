"""The ceilings of a GPU: peak of the matrix products by dtype, and memory bandwidth.

Vendor figures for dense products with float32 accumulation, at boost clock. No program reaches them: an H200 sustains
about 790 of its 989 TFLOP/s in an 8192 x 8192 x 8192 bfloat16 product. A device that is not listed, a MIG slice for
one, has no roofline: the table then shows "-" rather than a guess.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """``tflops`` by dtype name, in 1e12 FLOP/s; ``gb_per_s`` in 1e9 bytes/s; where the figures come from."""

    tflops: dict[str, float]
    gb_per_s: float
    source: str


def _peak(half: float, tf32: float, fp32: float, gb_per_s: float, source: str) -> Peak:
    return Peak({"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}, gb_per_s, source)


_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet; products without sparsity (half of the printed figure)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet; products without sparsity (half of the printed figure)"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_AD102 = "NVIDIA Ada GPU Architecture whitepaper"

# By the name that torch.cuda.get_device_name() gives, whole.
PEAKS: dict[str, Peak] = {
    "NVIDIA A100-SXM4-40GB": _peak(312, 156, 19.5, 1555, _A100),
    "NVIDIA A100-PCIE-40GB": _peak(312, 156, 19.5, 1555, _A100),
    "NVIDIA A100-SXM4-80GB": _peak(312, 156, 19.5, 2039, _A100),
    "NVIDIA A100 80GB PCIe": _peak(312, 156, 19.5, 1935, _A100),
    "NVIDIA H100 80GB HBM3": _peak(989, 494, 67, 3350, _H100),
    "NVIDIA H100 PCIe": _peak(756, 378, 51, 2000, _H100),
    "NVIDIA H100 NVL": _peak(835, 417, 60, 3900, _H100),
    "NVIDIA H200": _peak(989, 494, 67, 4800, _H200),
    "NVIDIA H200 NVL": _peak(835, 417, 60, 4800, _H200),
    "NVIDIA B200": _peak(2250, 1125, 75, 8000, "NVIDIA HGX B200 datasheet, per GPU; products without sparsity"),
    "NVIDIA A10": _peak(125, 62.5, 31.2, 600, "NVIDIA A10 datasheet"),
    "NVIDIA L4": _peak(121, 60, 30.3, 300, "NVIDIA L4 datasheet; products without sparsity"),
    "NVIDIA L40S": _peak(362, 183, 91.6, 864, "NVIDIA L40S datasheet"),
    "NVIDIA RTX A6000": _peak(154.8, 77.4, 38.7, 768, _GA102),
    "NVIDIA GeForce RTX 3090": _peak(71, 35.6, 35.6, 936, _GA102),
    "NVIDIA GeForce RTX 4090": _peak(165.2, 82.6, 82.6, 1008, _AD102),
    "NVIDIA GeForce RTX 5090": _peak(209.5, 104.8, 104.8, 1792, "NVIDIA RTX Blackwell GPU Architecture whitepaper"),
    "AMD Instinct MI300X": _peak(1307.4, 653.7, 163.4, 5300, "AMD Instinct MI300X data sheet"),
}


def floor_seconds(flops: int, least_bytes: int, dtype_name: str, device_name: str) -> float | None:
    """The least time the device could take: the longer of products at peak and bytes at peak. None if unknown."""
    peak = PEAKS.get(device_name)
    if peak is None or dtype_name not in peak.tflops:
        return None
    return max(flops / (peak.tflops[dtype_name] * 1e12), least_bytes / (peak.gb_per_s * 1e9))
