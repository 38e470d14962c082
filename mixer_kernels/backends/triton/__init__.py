"""The ``triton`` backend: fused kernels for NVIDIA (sm_80 and later) and AMD GPUs, forward and backward.

A block's forward is six launches: its weights, row statistics, token mixing (two launches for more than 256 tokens),
row statistics, fc1, fc2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ...tuning.configs import MAX_FUSED_TOKENS, are_fused
from ..arguments import AffineLinear, GatedHalf, Half, Norm, Options, SpatialGate
from ..devices import device_of
from ..new_tensors import aligned_rows, new_like, new_statistics, new_z
from .activation import ACTIVATIONS
from .branch_gradient import branch_gradient
from .channel_backward import channel_products_backward
from .channel_backward import recomputed_hidden as channel_hidden
from .channel_mixing import channel_fc1, channel_fc2, channel_mixing_products
from .gated_mixer_layer import gated_mixer_layer
from .gated_mixing import gated_mixing, pack_gated_mixing
from .gated_mixing_backward import gated_mixing_gradients
from .hidden_units import hidden_gelu, hidden_gelu_backward
from .norm_backward import norm_backward
from .pack import Packing
from .partial_sums import sum_parts
from .prepack import ProductWeights, fc1_weights, product_weight, token_weights
from .row_statistics import _row_statistics_kernel, row_statistics
from .token_data_gradient import token_data_gradient
from .token_linear import spatial_gate, spatial_gate_backward, token_linear, token_linear_data_gradient
from .token_mixing import token_mixing_fused, token_tile
from .token_products import padded_sizes, token_mixing_products
from .token_products_backward import token_gradients_by_products
from .token_weight_gradients import token_weight_gradients, weight_gradient

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (3, 3)  # Triton 3.2 takes no function as a kernel's constant
_FEATURES = {
    "packs", "token_mixing", "channel_mixing", "mixer_block", "norm='affine'", "token_linear", "spatial_gating",
    "gated_channel_mixing", "gated_mixing", "gate='sigmoid'", "gated_mixer_layer", "token_weight_gradients",
    *(f"activation={name!r}" for name in ACTIVATIONS),
}  # fmt: skip


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run products in ``dtype`` on ``device``, or None."""
    remedy = "use backend='torch'"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"the Triton kernels need Triton 3.3 (PyTorch 2.7) or newer, got {triton.__version__}; {remedy}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"a Triton kernel needs a CUDA tensor, got one on {device.type}; {remedy}"
    if dtype not in SUPPORTED_DTYPES:
        return f"the Triton kernels take {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype}; {remedy}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the Triton kernels need compute capability 8.0, got {major}.{minor}; {remedy}"
    return None


def has(feature: str) -> bool:
    """Everything that is asked for by name."""
    return feature.removesuffix(" in training") in _FEATURES


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return not isinstance(_row_statistics_kernel, triton.JITFunction)


def token_mixing_forward(
    x: Tensor, half: Half, options: Options, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``u [B, S, C]``, contiguous, and mean and rstd ``[B * S]`` of ``x [B, S, C]``."""
    if x.numel() == 0:
        return new_like(x), *new_statistics(x)
    packing = packing or Packing(options.dtype)
    with device_of(x):
        mix = _token_half(packing, x, half, options)
        packing.run()
        mean, rstd = row_statistics(x, options.eps)
        return mix(Norm(mean, rstd, half.gamma, half.beta)), mean, rstd


def channel_mixing_forward(
    u: Tensor, half: Half, options: Options, keep_z: bool = False, packing: Packing | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``y [B, S, C]``, contiguous; mean and rstd ``[B * S]`` of ``u [B, S, C]``, None for the affine norm; and z if
    kept, ``[B * S, D_C]``, with SwiGLU ``[B * S, 2, D_C]``."""
    if u.numel() == 0:
        return new_like(u), *new_statistics(u), new_z(u, half.w_in.shape[0], options) if keep_z else None
    packing = packing or Packing(options.dtype)
    with device_of(u):
        first = fc1_weights(packing, half, u.dtype)
        second = ProductWeights(product_weight(packing, "w4", half.w_out), half.b_out)
        packing.run()
        mean, rstd = (None, None) if options.norm == "affine" else row_statistics(u, options.eps)
        norm = Norm(mean, rstd, half.gamma, half.beta)
        y, z = channel_mixing_products(u, norm, first, second, options, keep_z)
    return y, mean, rstd, z


def mixer_block_forward(
    x: Tensor, tokens: Half, channels: Half, options: Options, eps2: float, packing: Packing | None = None
) -> Tensor:
    """``y [B, S, C]``, contiguous, of the whole block, without dropout and stochastic depth: one launch packs."""
    if x.numel() == 0:
        return new_like(x)
    packing = packing or Packing(options.dtype)
    with device_of(x):
        mix = _token_half(packing, x, tokens, options)
        first = fc1_weights(packing, channels, x.dtype)
        second = ProductWeights(product_weight(packing, "w4", channels.w_out), channels.b_out)
        packing.run()
        u = mix(Norm(*row_statistics(x, options.eps), tokens.gamma, tokens.beta))
        norm = Norm(*row_statistics(u, eps2), channels.gamma, channels.beta)
        return channel_mixing_products(u, norm, first, second, options)[0]


def token_linear_forward(x: Tensor, linear: AffineLinear, options: Options, packing: Packing | None = None) -> Tensor:
    """``u [B, S, C]``, contiguous, from ``x [B, S, C]`` and ``w [S, S]``."""
    if x.numel() == 0:
        return new_like(x)
    packing = packing or Packing(options.dtype)
    with device_of(x):
        linear = linear._replace(w=product_weight(packing, "w", linear.w))
        packing.run()
        return token_linear(x, linear, options)


def spatial_gating_forward(h: Tensor, gate: SpatialGate, options: Options, packing: Packing | None = None) -> Tensor:
    """``s [B, S, C]``, contiguous, from ``h [B, S, 2 * C]`` and ``w [S, S]``."""
    s = torch.empty(*h.shape[:2], h.shape[2] // 2, dtype=h.dtype, device=h.device)
    if h.numel() > 0:
        packing = packing or Packing(options.dtype)
        with device_of(h):
            gate = gate._replace(w=product_weight(packing, "w_gate", gate.w))
            packing.run()
            _gate(h, gate, options, s)
    return s


def gated_channel_mixing_forward(
    x: Tensor,
    half: Half,
    gate: SpatialGate,
    options: Options,
    gate_eps: float,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``y [B, S, C]``, contiguous, mean and rstd ``[B * S]`` of ``x [B, S, C]``, and z ``[B * S, F]`` if kept."""
    if x.numel() == 0:
        return new_like(x), *new_statistics(x), new_z(x, half.w_in.shape[0], options) if keep_z else None
    images = x.shape[:2]
    packing = packing or Packing(options.dtype)
    with device_of(x):
        first = fc1_weights(packing, half, x.dtype)
        gate = gate._replace(w=product_weight(packing, "w_gate", gate.w))
        second = ProductWeights(product_weight(packing, "w2", half.w_out), half.b_out)
        packing.run()
        mean, rstd = row_statistics(x, options.eps)
        a, z = channel_fc1(x, Norm(mean, rstd, half.gamma, half.beta), first, options, keep_z)
        s = aligned_rows(images.numel(), half.w_out.shape[1], options.dtype, x.device)
        _gate(a.unflatten(0, images), gate, options._replace(eps=gate_eps), s.unflatten(0, images))
        return channel_fc2(x, s, second, options), mean, rstd, z


def gated_mixing_forward(
    x: Tensor, half: GatedHalf, options: Options, axis: int, gate_first: bool, packing: Packing | None = None
) -> Tensor:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, mixed along ``axis``."""
    if x.numel() == 0:
        return new_like(x)
    packing = packing or Packing(options.dtype)
    with device_of(x):
        weights = pack_gated_mixing(packing, x, half, options, axis)
        packing.run()
        return gated_mixing(x, half, weights, options, axis, gate_first)


def gated_mixer_layer_forward(
    x: Tensor,
    patches: GatedHalf,
    features: GatedHalf,
    options: Options,
    eps2: float,
    keep_u: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, channels, patches, features]``, and u, what the patches' mixer gives, if kept."""
    if x.numel() == 0:
        return new_like(x), new_like(x) if keep_u else None
    with device_of(x):
        return gated_mixer_layer(x, patches, features, options, eps2, keep_u, packing or Packing(options.dtype))


def token_backward_weights(x: Tensor, g: Tensor, norm: Norm, half: Half, options: Options) -> tuple[Tensor, Norm, Half]:
    """Each kernel has its weights packed by itself, from the half."""
    return half.w_in, norm, half


def channel_backward_weights(
    u: Tensor, z: Tensor | None, norm: Norm, half: Half, options: Options, want_n: bool
) -> tuple[Tensor, Norm, Half]:
    """The same of the channel half."""
    return half.w_in, norm, half


def token_products_backward(
    g: Tensor, x: Tensor, norm: Norm, half: Half, options: Options, want_a: bool, want_dz: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dn, a and dz by one kernel; SwiGLU's values, gates and gradients do not fit one, nor do many tokens: a and dz."""
    if x.shape[1] <= MAX_FUSED_TOKENS and not options.glu:
        return token_data_gradient(g, x, norm, half, options, want_a, want_dz)
    return None, *token_gradients_by_products(g, x, norm, half, options)


def _token_half(packing: Packing, x: Tensor, half: Half, options: Options) -> Callable[[Norm], Tensor]:
    """Ask for the weights of token mixing on ``x``; what is returned takes the norm and gives u."""
    hidden = half.w_out.shape[1]
    if are_fused(x.shape[1], options.dtype, glu=options.glu):
        tile = token_tile(x, options)
        weights = token_weights(packing, half, *tile.padded(hidden))
        return lambda norm: token_mixing_fused(x, norm, weights, tile, options)
    weights = token_weights(packing, half, *padded_sizes(x.shape[1], hidden, x.device, options))
    return lambda norm: token_mixing_products(x, norm, weights, hidden, options)


def _gate(h: Tensor, gate: SpatialGate, options: Options, out: Tensor) -> None:
    norm = Norm(*row_statistics(h.chunk(2, 2)[1], options.eps), gate.gamma, gate.beta)
    spatial_gate(h, norm, gate, out, options)
