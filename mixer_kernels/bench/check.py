"""Who may have a speed: only a provider whose result holds the accuracy rule (``accuracy``) against eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, Reference, why_inaccurate


def why_wrong(result: Tensor, eager: Tensor, exact: Reference, images: list[int]) -> str | None:
    """Why ``result`` may not be timed against ``eager``, or None if it may.

    Args:
        result, eager: of the whole batch, in the dtype that is measured.
        exact: of the ``images`` (indices along the batch) only: images do not depend on each other.
    """
    if result.shape != eager.shape:
        return f"shape {tuple(result.shape)} where eager has {tuple(eager.shape)}"
    finite = torch.isfinite(result)
    if not finite.all():
        return f"{finite.numel() - int(finite.sum())} values are not finite"
    if exact.value.numel() == 0:
        return None
    return why_inaccurate(result[images], eager[images], exact)


def why_wrong_in_training(
    result: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Reference]
) -> str | None:
    """As ``why_wrong`` for outputs and gradients of the whole batch by name; a gradient's begins with "gradient"."""
    for name, expected in exact.items():
        factor = GRADIENT_FACTOR if name.startswith("gradient") else FORWARD_FACTOR
        reason = why_inaccurate(result[name], eager[name], expected, factor)
        if reason is not None:
            return f"{name}: {reason}"
    return None
