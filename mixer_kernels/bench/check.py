"""Who may have a speed: only a provider whose result is as good as eager PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0  # times eager's own error against float64
GRADIENT_FACTOR = 3.0  # the same for gradients
# Of torch.compile's gradients: on a CPU its code adds the float32 terms of a bias gradient one by one, eager in blocks.
COMPILED_GRADIENT_FACTOR = 16.0
FLOOR = 0.5  # plus so many units in the last place of the largest value (max error) or of the RMS value (RMS error)


@dataclass(frozen=True)
class Errors:
    """Largest and RMS difference from a float64 reference."""

    max: float
    rms: float

    @classmethod
    def of(cls, result: Tensor, reference: Tensor) -> Errors:
        difference = (result.double() - reference).abs()
        return cls(difference.max().item(), difference.square().mean().sqrt().item())


def why_wrong(result: Tensor, eager: Tensor, reference: Tensor, images: list[int]) -> str | None:
    """Why ``result`` may not be timed against ``eager``, or None if it may.

    Args:
        result, eager: of the whole batch, in the dtype that is measured.
        reference: float64, of the ``images`` (indices along the batch) only: images do not depend on each other.
    """
    if result.shape != eager.shape:
        return f"shape {tuple(result.shape)} where eager has {tuple(eager.shape)}"
    if result.dtype is not eager.dtype:
        return f"{result.dtype} where eager has {eager.dtype}"
    finite = torch.isfinite(result)
    if not finite.all():
        return f"{finite.numel() - int(finite.sum())} values are not finite"
    if reference.numel() == 0:
        return None
    return _why_inaccurate(result[images], eager[images], reference, FACTOR)


def why_wrong_in_training(
    result: dict[str, Tensor],
    eager: dict[str, Tensor],
    reference: dict[str, Tensor],
    gradient_factor: float = GRADIENT_FACTOR,
) -> str | None:
    """As ``why_wrong`` for outputs and gradients of the whole batch by name; a gradient's begins with "gradient"."""
    for name, expected in reference.items():
        ours, theirs = result[name], eager[name]
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            return f"{name}: {ours.dtype} {tuple(ours.shape)} where eager has {theirs.dtype} {tuple(theirs.shape)}"
        if not torch.isfinite(ours).all():
            return f"{name}: {ours.numel() - int(torch.isfinite(ours).sum())} values are not finite"
        wrong = _why_inaccurate(ours, theirs, expected, gradient_factor if name.startswith("gradient") else FACTOR)
        if wrong is not None:
            return f"{name}: {wrong}"
    return None


def _why_inaccurate(result: Tensor, eager: Tensor, reference: Tensor, factor: float) -> str | None:
    ours, theirs = Errors.of(result, reference), Errors.of(eager, reference)
    ulp = torch.finfo(eager.dtype).eps
    allowed_max = factor * theirs.max + FLOOR * ulp * reference.abs().max().item()
    allowed_rms = factor * theirs.rms + FLOOR * ulp * reference.square().mean().sqrt().item()
    if ours.max > allowed_max:
        return f"max error {ours.max:.2e} against float64, eager has {theirs.max:.2e}"
    if ours.rms > allowed_rms:
        return f"RMS error {ours.rms:.2e} against float64, eager has {theirs.rms:.2e}"
    return None
