"""The ``triton`` backend: fused forward kernels for NVIDIA (sm_80 and later) and AMD GPUs.

A block is five launches: row statistics, token mixing (three launches for more than 256 tokens), row statistics,
fc1, fc2.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ...tuning.configs import MAX_FUSED_TOKENS
from .channel_mixing import channel_mixing_products
from .prepack import forget_packs
from .row_statistics import _row_statistics_kernel, row_statistics
from .token_mixing import token_mixing_fused
from .token_products import token_mixing_products

__all__ = ["channel_mixing_forward", "forget_packs", "interpreted", "token_mixing_forward", "why_not"]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype, stream_dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why this backend cannot run products in ``dtype`` on a residual stream in ``stream_dtype``, or None."""
    remedy = "use backend='torch'"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"a Triton kernel needs a CUDA tensor, got one on {device.type}; {remedy}"
    if dtype not in SUPPORTED_DTYPES:
        return f"the Triton kernels take {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype}; {remedy}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the Triton kernels need compute capability 8.0, got {major}.{minor}; {remedy}"
    if needs_grad:
        return f"the Triton kernels have no backward pass yet and a gradient is needed; {remedy} or torch.no_grad()"
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
) -> Tensor:
    """``u [B, S, C]``, contiguous, from ``x [B, S, C]``, ``w1 [D_S, S]``, ``w2 [S, D_S]``; products in ``dtype``."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mix = token_mixing_fused if x.shape[1] <= MAX_FUSED_TOKENS else token_mixing_products
    with _device_of(x):
        mean, rstd = row_statistics(x, eps)
        return mix(
            x, mean, rstd, gamma, beta, w1, b1, w2, b2,
            approximate=approximate, dtype=dtype, precision=_precision(dtype),
        )  # fmt: skip


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
) -> Tensor:
    """``y [B, S, C]``, contiguous, from ``u [B, S, C]``, ``w3 [D_C, C]``, ``w4 [C, D_C]``; products in ``dtype``."""
    if u.numel() == 0:
        return torch.empty(u.shape, dtype=u.dtype, device=u.device)
    with _device_of(u):
        mean, rstd = row_statistics(u, eps)
        return channel_mixing_products(
            u, mean, rstd, gamma, beta, w3, b3, w4, b4,
            approximate=approximate, dtype=dtype, precision=_precision(dtype),
        )  # fmt: skip


def _device_of(x: Tensor):
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: float32 products follow ``torch.get_float32_matmul_precision()``."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
