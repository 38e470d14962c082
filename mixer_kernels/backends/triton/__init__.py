"""The ``triton`` backend: fused kernels for NVIDIA (sm_80 and later) and AMD GPUs, forward and backward.

A block's forward is five launches: row statistics, token mixing (two launches for more than 256 tokens), row
statistics, fc1, fc2.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...tuning.configs import MAX_FUSED_TOKENS
from ..backward import Kernels
from ..devices import device_of
from ..noise import Noise
from .backward import kernels_with
from .channel_mixing import channel_mixing_products
from .row_statistics import _row_statistics_kernel, row_statistics
from .token_mixing import token_mixing_fused
from .token_products import token_mixing_products

__all__ = [
    "backward_kernels",
    "channel_mixing_forward",
    "interpreted",
    "token_mixing_forward",
    "why_not",
]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run products in ``dtype`` on ``device``, or None."""
    remedy = "use backend='torch'"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"a Triton kernel needs a CUDA tensor, got one on {device.type}; {remedy}"
    if dtype not in SUPPORTED_DTYPES:
        return f"the Triton kernels take {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype}; {remedy}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the Triton kernels need compute capability 8.0, got {major}.{minor}; {remedy}"
    return None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return not isinstance(_row_statistics_kernel, triton.JITFunction)


def token_mixing_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``u [B, S, C]``, contiguous, and mean and rstd ``[B * S]`` of ``x [B, S, C]``; products in ``dtype``."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_no_statistics(x)
    mix = token_mixing_fused if x.shape[1] <= MAX_FUSED_TOKENS else token_mixing_products
    with device_of(x):
        mean, rstd = row_statistics(x, eps)
        u = mix(
            x, mean, rstd, gamma, beta, w1, b1, w2, b2,
            approximate=approximate, dtype=dtype, precision=_precision(dtype),
            noise=Noise(dropout_p, drop_path_p, seed),
        )  # fmt: skip
    return u, mean, rstd


def channel_mixing_forward(
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    *,
    eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    seed: Tensor | None = None,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``y [B, S, C]``, contiguous, mean and rstd ``[B * S]`` of ``u [B, S, C]``, and z ``[B * S, D_C]`` if kept."""
    if u.numel() == 0:
        z = u.new_empty((0, w3.shape[0]), dtype=dtype) if keep_z else None
        return torch.empty(u.shape, dtype=u.dtype, device=u.device), *_no_statistics(u), z
    with device_of(u):
        mean, rstd = row_statistics(u, eps)
        y, z = channel_mixing_products(
            u, mean, rstd, gamma, beta, w3, b3, w4, b4,
            approximate=approximate, dtype=dtype, precision=_precision(dtype),
            noise=Noise(dropout_p, drop_path_p, seed), keep_z=keep_z,
        )  # fmt: skip
    return y, mean, rstd, z


def backward_kernels(dtype: torch.dtype) -> Kernels:
    """The kernels of the backward pass, with products in ``dtype``."""
    return kernels_with(_precision(dtype))


def _no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: float32 products follow ``torch.get_float32_matmul_precision()``."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
