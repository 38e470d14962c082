"""The ``torch`` backend: the oracle and the fallback.

Plain PyTorch, equation by equation from docs/maths.md: any device, any floating dtype, differentiable by autograd,
traced through by ``torch.compile``. The functions take what every backend's functions take. Dropout and stochastic
depth draw what timm's modules draw, in their order, so that a seed gives timm's masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run, or None. It always can."""
    return None


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
    activation: str = "gelu",
) -> Tensor:
    """``u [B, S, C]`` from ``x [B, S, C]``, ``w1 [D_S, S]``, ``w2 [S, D_S]``; products in ``dtype``."""
    n = _layer_norm(x, gamma, beta, eps)  # (1) (2)
    z = F.linear(n.to(dtype).transpose(1, 2), w1.to(dtype), _to(b1, dtype))  # (3), [B, C, D_S]
    a = _dropout(_activate(z, activation, approximate), dropout_p)  # (4) or (22), (11)
    branch = _dropout(F.linear(a, w2.to(dtype), _to(b2, dtype)), dropout_p)  # (5) (11)
    return x + _drop_path(branch.transpose(1, 2), drop_path_p)  # (12)


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
    activation: str = "gelu",
    norm: str = "layer",
) -> Tensor:
    """``y [B, S, C]`` from ``u [B, S, C]``, ``w3 [D_C, C]``, ``w4 [C, D_C]``; products in ``dtype``."""
    n = _affine(u, gamma, beta) if norm == "affine" else _layer_norm(u, gamma, beta, eps)  # (24) or (1) (2)
    z = F.linear(n.to(dtype), w3.to(dtype), _to(b3, dtype))  # (6), [B, S, D_C]
    a = _dropout(_activate(z, activation, approximate), dropout_p)  # (4) or (22), (11)
    branch = _dropout(F.linear(a, w4.to(dtype), _to(b4, dtype)), dropout_p)  # (7) (11)
    return u + _drop_path(branch, drop_path_p)  # (12)


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
) -> Tensor:
    """``u [B, S, C]`` from ``x [B, S, C]``, ``w [S, S]``; products in ``dtype``."""
    n = _affine(x, alpha, beta)  # (24)
    branch = F.linear(n.to(dtype).transpose(1, 2), w.to(dtype), _to(b, dtype)).transpose(1, 2)  # (25)
    u = x + _drop_path(branch if scale is None else scale * branch, drop_path_p)
    return u.to(x.dtype)  # where autocast's scale is float32 and x is not


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
    """``s [B, S, C]`` from ``h [B, S, 2 * C]``, ``w [S, S]``; products in ``dtype``."""
    factor, gate = h.chunk(2, -1)
    n = _layer_norm(gate, gamma, beta, eps).to(dtype)  # (1) (2)
    return factor * F.linear(n.transpose(1, 2), w.to(dtype), _to(b, dtype)).transpose(1, 2)  # (27)


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
) -> Tensor:
    """``y [B, S, C]`` from ``x [B, S, C]``, ``w1 [F, C]``, ``w_gate [S, S]``, ``w2 [C, F/2]``, in ``dtype``."""
    n = _layer_norm(x, gamma, beta, eps)  # (1) (2)
    z = F.linear(n.to(dtype), w1.to(dtype), _to(b1, dtype))  # (6)
    a = _dropout(F.gelu(z, approximate=approximate), dropout_p)  # (4) (11)
    s = spatial_gating_forward(a, gate_gamma, gate_beta, w_gate, b_gate, eps=gate_eps, dtype=dtype)
    branch = _dropout(F.linear(s.to(dtype), w2.to(dtype), _to(b2, dtype)), dropout_p)  # (7) (11)
    return x + _drop_path(branch, drop_path_p)  # (12)


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
) -> Tensor:
    """``y`` of ``x [B, channels, patches, features]``, mixed along ``axis``; products in ``dtype``."""

    def gated(v: Tensor) -> Tensor:
        if w_gate is None:
            return v
        return v * F.softmax(F.linear(v.to(dtype), w_gate.to(dtype), _to(b_gate, dtype)), -1)  # (31)

    v = _layer_norm(x, gamma, beta, eps).movedim(axis, -1)  # (1) (2)
    v = gated(v.to(dtype)) if gate_first else v
    z = F.linear(v.to(dtype), w1.to(dtype), _to(b1, dtype))
    a = _dropout(F.gelu(z, approximate=approximate), dropout_p)  # (11)
    v = _dropout(F.linear(a, w2.to(dtype), _to(b2, dtype)), dropout_p)  # (30) (11)
    y = x + (v if gate_first else gated(v)).movedim(-1, axis)  # (32)
    return y.to(x.dtype)  # autocast's softmax is float32


def _activate(z: Tensor, activation: str, approximate: str) -> Tensor:
    if activation == "swiglu":
        value, gate = z.chunk(2, -1)
        return value * F.silu(gate)
    return F.gelu(z, approximate=approximate)


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is None:
        return x if beta is None else x + beta
    return x * gamma if beta is None else torch.addcmul(beta, gamma, x)


def _layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    affine = gamma if gamma is not None else beta
    wide = x.dtype if affine is None else torch.promote_types(x.dtype, affine.dtype)
    return F.layer_norm(x.to(wide), x.shape[-1:], _to(gamma, wide), _to(beta, wide), eps)


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _dropout(t: Tensor, p: float) -> Tensor:
    return F.dropout(t, p) if p > 0 else t


def _drop_path(branch: Tensor, p: float) -> Tensor:
    if p == 0:
        return branch
    kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - p)
    return branch * (kept / (1 - p) if p < 1 else kept)
