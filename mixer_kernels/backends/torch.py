"""The ``torch`` backend: the oracle and the fallback.

Plain PyTorch, equation by equation from docs/maths.md: any device, any floating dtype, differentiable by autograd,
traced through by ``torch.compile``. Dropout and stochastic depth draw what timm's modules draw, in their order, so that
a seed gives timm's masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import AffineLinear, FeatureMixer, GatedHalf, Half, Options, SpatialGate, TimeMixer


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """It always can run."""
    return None


def has(feature: str) -> bool:
    """It has everything."""
    return True


def token_mixing_forward(x: Tensor, half: Half, options: Options) -> Tensor:
    """``u [B, S, C]`` from ``x [B, S, C]``, ``w_in [D_S, S]``, ``w_out [S, D_S]``."""
    n = _layer_norm(x, half.gamma, half.beta, options.eps)  # (1) (2)
    return x + _drop_path(_mlp(n.transpose(1, 2), half, options).transpose(1, 2), options)  # (12)


def channel_mixing_forward(u: Tensor, half: Half, options: Options) -> Tensor:
    """``y [B, S, C]`` from ``u [B, S, C]``, ``w_in [D_C, C]``, ``w_out [C, D_C]``."""
    n = _normed(u, half, options)
    return u + _drop_path(_mlp(n, half, options), options)  # (12)


def token_linear_forward(x: Tensor, linear: AffineLinear, options: Options) -> Tensor:
    """``u [B, S, C]`` from ``x [B, S, C]``, ``w [S, S]``."""
    n = _affine(x, linear.alpha, linear.beta)  # (24)
    branch = _linear(n.transpose(1, 2), linear.w, linear.b, options).transpose(1, 2)  # (25)
    u = x + _drop_path(branch if linear.scale is None else linear.scale * branch, options)
    return u.to(x.dtype)  # where autocast's scale is float32 and x is not


def spatial_gating_forward(h: Tensor, gate: SpatialGate, options: Options) -> Tensor:
    """``s [B, S, C]`` from ``h [B, S, 2 * C]``, ``w [S, S]``."""
    h1, h2 = h.chunk(2, -1)
    n = _layer_norm(h2, gate.gamma, gate.beta, options.eps)  # (1) (2)
    return h1 * _linear(n.transpose(1, 2), gate.w, gate.b, options).transpose(1, 2)  # (27)


def gated_channel_mixing_forward(x: Tensor, half: Half, gate: SpatialGate, options: Options, gate_eps: float) -> Tensor:
    """``y [B, S, C]`` from ``x [B, S, C]``, ``w_in [F, C]``, the gate's ``w [S, S]``, ``w_out [C, F/2]``."""
    n = _layer_norm(x, half.gamma, half.beta, options.eps)  # (1) (2)
    a = _hidden(n, half, options)
    s = spatial_gating_forward(a, gate, options._replace(eps=gate_eps))
    return x + _drop_path(_output(s, half, options), options)  # (12)


def gated_mixing_forward(x: Tensor, half: GatedHalf, options: Options, axis: int, gate_first: bool) -> Tensor:
    """``y`` of ``x [B, channels, patches, features]``, mixed along ``axis``."""

    def gated(v: Tensor) -> Tensor:
        if half.w_gate is None:
            return v
        logits = _linear(v, half.w_gate, half.b_gate, options)
        return v * (F.softmax(logits, -1) if options.gate == "softmax" else F.sigmoid(logits))  # (31)

    v = _normed(x, half, options).movedim(axis, -1)
    v = gated(v.to(options.dtype)) if gate_first else v
    v = _mlp(v, half, options)  # (30)
    y = x + (v if gate_first else gated(v)).movedim(-1, axis)  # (32)
    return y.to(x.dtype)  # autocast's softmax is float32


def time_mixing_forward(x: Tensor, mixer: TimeMixer, options: Options, norm_first: bool) -> Tensor:
    """``y [B, S, C]`` from ``x [B, S, C]``, ``w [S, S]``."""
    n = _joint_norm(x, mixer, options) if norm_first else x
    z = _linear(n.transpose(1, 2), mixer.w, mixer.b, options)
    y = x + _dropout(_activate(z, options), options).transpose(1, 2)  # (37)
    return y if norm_first else _joint_norm(y, mixer, options)


def feature_mixing_forward(x: Tensor, mixer: FeatureMixer, options: Options, norm_first: bool) -> Tensor:
    """``y [B, S, O]`` from ``x [B, S, C]``, ``w_in [H, C]``, ``w_out [O, H]``, ``w_skip [O, C]`` or None."""
    n = _joint_norm(x, mixer, options) if norm_first else x
    skip = x if mixer.w_skip is None else _linear(x, mixer.w_skip, mixer.b_skip, options)
    y = skip + _mlp(n, mixer, options)  # (38)
    return (y if norm_first else _joint_norm(y, mixer, options)).to(x.dtype)


def _joint_norm(x: Tensor, mixer: TimeMixer | FeatureMixer, options: Options) -> Tensor:
    if options.norm == "affine":
        return _affine(x, mixer.gamma, mixer.beta)
    return _layer_norm(x, mixer.gamma, mixer.beta, options.eps, axes=2).to(x.dtype)  # (36)


def _mlp(n: Tensor, half: Half | GatedHalf | FeatureMixer, options: Options) -> Tensor:
    return _output(_hidden(n, half, options), half, options)


def _hidden(n: Tensor, half: Half | GatedHalf | FeatureMixer, options: Options) -> Tensor:
    z = _linear(n, half.w_in, half.b_in, options)  # (3) or (6)
    return _dropout(_activate(z, options), options)  # (4) or (22), (11)


def _output(a: Tensor, half: Half | GatedHalf | FeatureMixer, options: Options) -> Tensor:
    return _dropout(_linear(a, half.w_out, half.b_out, options), options)  # (5) or (7), (11)


def _activate(z: Tensor, options: Options) -> Tensor:
    if options.activation == "gelu":
        return F.gelu(z, approximate=options.approximate)
    if options.activation == "relu":
        return F.relu(z)
    if options.activation == "silu":
        return F.silu(z)
    value, gate = z.chunk(2, -1)
    return value * F.silu(gate)


def _linear(n: Tensor, w: Tensor, b: Tensor | None, options: Options) -> Tensor:
    dtype = options.dtype
    return F.linear(n.to(dtype), w.to(dtype), _to(b, dtype))


def _normed(x: Tensor, half: Half | GatedHalf, options: Options) -> Tensor:
    if options.norm == "affine":
        return _affine(x, half.gamma, half.beta)  # (24)
    return _layer_norm(x, half.gamma, half.beta, options.eps)  # (1) (2)


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is None:
        return x if beta is None else x + beta
    return x * gamma if beta is None else torch.addcmul(beta, gamma, x)


def _layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, axes: int = 1) -> Tensor:
    affine = gamma if gamma is not None else beta
    wide = x.dtype if affine is None else torch.promote_types(x.dtype, affine.dtype)
    return F.layer_norm(x.to(wide), x.shape[-axes:], _to(gamma, wide), _to(beta, wide), eps)


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _dropout(t: Tensor, options: Options) -> Tensor:
    return F.dropout(t, options.dropout_p) if options.dropout_p > 0 else t


def _drop_path(branch: Tensor, options: Options) -> Tensor:
    p = options.drop_path_p
    if p == 0:
        return branch
    kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - p)
    return branch * (kept / (1 - p) if p < 1 else kept)
