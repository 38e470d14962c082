"""BatchNorm in evaluation mode: an affine map, made of its running statistics in each call."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def affine_of(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What it does in inference, as a factor and an addend of its features."""
    weight, bias = norm.weight, norm.bias
    gamma = (norm.running_var + norm.eps).rsqrt()
    gamma = gamma if weight is None else weight * gamma
    beta = -norm.running_mean * gamma if bias is None else torch.addcmul(bias, norm.running_mean, gamma, value=-1)
    return gamma, beta


def why_not_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> str | None:
    """Why it is no affine map in the mode of right now, or None."""
    takes = norm.training or norm.running_mean is None or norm.running_var is None
    return "its BatchNorm takes its statistics from the batch" if takes else None


def why_not_affine(x: Tensor) -> str | None:
    """Why the kernels do not take it as one on ``x``, or None."""
    is_narrow = x.dtype not in (torch.float32, torch.float64)
    return f"BatchNorm as an affine map would round more than it does in {x.dtype}" if is_narrow else None
