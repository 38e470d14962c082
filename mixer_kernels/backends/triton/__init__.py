"""The ``triton`` backend: fused kernels for NVIDIA (sm_80 and later) and AMD GPUs, forward and backward.

A block's forward is six launches: its weights, row statistics, token mixing (two launches for more than 256 tokens),
row statistics, fc1, fc2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...tuning.configs import are_fused
from ..backward import Kernels
from ..devices import device_of
from ..noise import Noise
from ..relatives import RelativesKernels
from .backward import kernels_with, relatives_kernels_with
from .channel_mixing import aligned_rows, channel_fc1, channel_fc2, channel_mixing_products
from .gated_mixer_layer import gated_mixer_layer
from .gated_mixing import gated_mixing, pack_gated_mixing
from .pack import Packing
from .prepack import fc1_weights, product_weight, token_weights
from .row_statistics import _row_statistics_kernel, row_statistics
from .token_linear import spatial_gate, token_linear
from .token_mixing import token_mixing_fused, token_tile
from .token_products import padded_sizes, token_mixing_products

__all__ = [
    "Packing",
    "backward_kernels",
    "channel_mixing_forward",
    "gated_channel_mixing_forward",
    "gated_mixer_layer_forward",
    "gated_mixing_forward",
    "interpreted",
    "mixer_block_forward",
    "relatives_kernels",
    "spatial_gating_forward",
    "token_linear_forward",
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
    activation: str = "gelu",
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``u [B, S, C]``, contiguous, and mean and rstd ``[B * S]`` of ``x [B, S, C]``; products in ``dtype``."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_no_statistics(x)
    packing = packing or Packing(dtype)
    options = {"approximate": approximate, "precision": _precision(dtype), "activation": activation}
    options["noise"] = Noise(dropout_p, drop_path_p, seed)
    with device_of(x):
        mix = _token_half(packing, x, gamma, beta, w1, b1, w2, b2, options)
        packing.run()
        mean, rstd = row_statistics(x, eps)
        return mix(mean, rstd), mean, rstd


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
    activation: str = "gelu",
    norm: str = "layer",
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``y [B, S, C]``, contiguous; mean and rstd ``[B * S]`` of ``u [B, S, C]``, None for the affine norm; and z if
    kept, ``[B * S, D_C]``, with SwiGLU ``[B * S, 2, D_C]``."""
    if u.numel() == 0:
        shape = (0, 2, w4.shape[1]) if activation == "swiglu" else (0, w3.shape[0])
        z = u.new_empty(shape, dtype=dtype) if keep_z else None
        return torch.empty(u.shape, dtype=u.dtype, device=u.device), *_no_statistics(u), z
    packing = packing or Packing(dtype)
    with device_of(u):
        first = fc1_weights(packing, gamma, beta, w3, b3, u.dtype)
        w4 = product_weight(packing, "w4", w4)
        packing.run()
        mean, rstd = (None, None) if norm == "affine" else row_statistics(u, eps)
        y, z = channel_mixing_products(
            u, mean, rstd, first, w4, b4, approximate=approximate, precision=_precision(dtype),
            noise=Noise(dropout_p, drop_path_p, seed), keep_z=keep_z, activation=activation,
        )  # fmt: skip
    return y, mean, rstd, z


def mixer_block_forward(
    x: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    *,
    eps1: float,
    eps2: float,
    approximate: str,
    dtype: torch.dtype,
    activation: str = "gelu",
    packing: Packing | None = None,
) -> Tensor:
    """``y [B, S, C]``, contiguous, of the whole block, without dropout and stochastic depth: one launch packs."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    packing = packing or Packing(dtype)
    options = {"approximate": approximate, "precision": _precision(dtype), "activation": activation, "noise": Noise()}
    with device_of(x):
        mix = _token_half(packing, x, gamma1, beta1, w1, b1, w2, b2, options)
        first = fc1_weights(packing, gamma2, beta2, w3, b3, x.dtype)
        w4 = product_weight(packing, "w4", w4)
        packing.run()
        u = mix(*row_statistics(x, eps1))
        return channel_mixing_products(u, *row_statistics(u, eps2), first, w4, b4, keep_z=False, **options)[0]


def token_linear_forward(
    x: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    *,
    dtype: torch.dtype,
    drop_path_p: float = 0.0,
    seed: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """``u [B, S, C]``, contiguous, from ``x [B, S, C]`` and ``w [S, S]``; products in ``dtype``."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    packing = packing or Packing(dtype)
    with device_of(x):
        w = product_weight(packing, "w", w)
        packing.run()
        noise = Noise(0.0, drop_path_p, seed)
        return token_linear(x, alpha, beta, w, b, scale, precision=_precision(dtype), noise=noise)


def spatial_gating_forward(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``s [B, S, C]``, contiguous, from ``h [B, S, 2 * C]`` and ``w [S, S]``; products in ``dtype``."""
    s = torch.empty(*h.shape[:2], h.shape[2] // 2, dtype=h.dtype, device=h.device)
    if h.numel() > 0:
        packing = Packing(dtype)
        with device_of(h):
            w = product_weight(packing, "w_gate", w)
            packing.run()
            mean, rstd = row_statistics(h.chunk(2, 2)[1], eps)
            spatial_gate(h, mean, rstd, gamma, beta, w, b, s, precision=_precision(dtype))
    return s


def gated_channel_mixing_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    gate_gamma: Tensor | None,
    gate_beta: Tensor | None,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float,
    gate_eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    seed: Tensor | None = None,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``y [B, S, C]``, contiguous, mean and rstd ``[B * S]`` of ``x [B, S, C]``, and z ``[B * S, F]`` if kept."""
    if x.numel() == 0:
        z = x.new_empty((0, w1.shape[0]), dtype=dtype) if keep_z else None
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_no_statistics(x), z
    batch_size, tokens, _ = x.shape
    packing = packing or Packing(dtype)
    noise = Noise(dropout_p, drop_path_p, seed)
    shared = {"approximate": approximate, "precision": _precision(dtype), "noise": noise}
    with device_of(x):
        first = fc1_weights(packing, gamma, beta, w1, b1, x.dtype)
        half = w2.shape[1]
        w_gate, w2 = product_weight(packing, "w_gate", w_gate), product_weight(packing, "w2", w2)
        packing.run()
        mean, rstd = row_statistics(x, eps)
        a, z = channel_fc1(x, mean, rstd, first, keep_z=keep_z, **shared)
        h = a.unflatten(0, (batch_size, tokens))
        statistics = row_statistics(h.chunk(2, 2)[1], gate_eps)
        s = aligned_rows(batch_size * tokens, half, dtype, x.device)
        spatial_gate(
            h, *statistics, gate_gamma, gate_beta, w_gate, b_gate, s.unflatten(0, (batch_size, tokens)),
            precision=_precision(dtype),
        )  # fmt: skip
        return channel_fc2(x, s, w2, b2, **shared), mean, rstd, z


def gated_mixing_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    *,
    axis: int,
    gate_first: bool,
    eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, mixed along ``axis``; products in ``dtype``."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    packing, precision = packing or Packing(dtype), _precision(dtype)
    parameters = (gamma, beta, w1, b1, w2, b2, w_gate, b_gate)
    with device_of(x):
        weights = pack_gated_mixing(packing, x.shape, x.device, parameters, axis=axis, precision=precision)
        packing.run()
        return gated_mixing(
            x, gamma, beta, weights, axis=axis, gate_first=gate_first, eps=eps, approximate=approximate,
            precision=precision, noise=Noise(dropout_p, seed=seed),
        )  # fmt: skip


def gated_mixer_layer_forward(
    x: Tensor,
    of_patches: Sequence[Tensor | None],
    of_features: Sequence[Tensor | None],
    *,
    eps: tuple[float, float],
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep_u: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, and u, what the patches' mixer gives, if kept.

    The parameters of each mixer are the eight of ``gated_mixing_forward``; ``seed [2]``, one to a mixer.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape) if keep_u else None
    with device_of(x):
        return gated_mixer_layer(
            x, of_patches, of_features, eps=eps, approximate=approximate, packing=packing or Packing(dtype),
            precision=_precision(dtype), dropout_p=dropout_p, seed=seed, keep_u=keep_u,
        )  # fmt: skip


def backward_kernels(dtype: torch.dtype) -> Kernels:
    """The kernels of the backward pass, with products in ``dtype``."""
    return kernels_with(_precision(dtype))


def relatives_kernels(dtype: torch.dtype) -> RelativesKernels:
    """The kernels of the relatives' backward pass, with products in ``dtype``."""
    return relatives_kernels_with(_precision(dtype))


def _token_half(
    packing: Packing, x: Tensor, gamma: Tensor | None, beta: Tensor | None, w1, b1, w2, b2, options: dict[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Ask for the weights of token mixing on ``x``; what is returned takes mean and rstd and gives u."""
    precision, noise, activation = options["precision"], options["noise"], options["activation"]
    hidden = w2.shape[1]
    if are_fused(x.shape[1], packing.dtype, gated=activation == "swiglu"):
        tile = token_tile(x, packing.dtype, precision, noise, activation)
        weights = token_weights(packing, w1, b1, w2, b2, *tile.padded(hidden))
        return lambda mean, rstd: token_mixing_fused(x, mean, rstd, gamma, beta, weights, tile, **options)
    sizes = padded_sizes(x.shape[1], hidden, x.device, packing.dtype, precision, noise, activation)
    weights = token_weights(packing, w1, b1, w2, b2, *sizes)
    return lambda mean, rstd: token_mixing_products(x, mean, rstd, gamma, beta, weights, hidden, **options)


def _no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: float32 products follow ``torch.get_float32_matmul_precision()``."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
