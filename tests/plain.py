"""The functions of ``mixer_kernels.functional`` in plain PyTorch: what their docstrings call them equivalent to."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


def token_mixing(x, gamma, beta, w1, b1, w2, b2, *, eps=1e-6, **how) -> Tensor:
    return x + _mlp(_normed(x, gamma, beta, eps).transpose(1, 2), w1, b1, w2, b2, **how).transpose(1, 2)


def channel_mixing(u, gamma, beta, w3, b3, w4, b4, *, eps=1e-6, norm="layer", **how) -> Tensor:
    return u + _mlp(_normed(u, gamma, beta, eps, norm), w3, b3, w4, b4, **how)


def mixer_block(x, *parameters, eps=1e-6, **how) -> Tensor:
    first, second = eps if isinstance(eps, tuple) else (eps, eps)
    u = token_mixing(x, *parameters[:6], eps=first, **how)
    return channel_mixing(u, *parameters[6:], eps=second, **how)


def token_linear(x, alpha, beta, w, b, scale) -> Tensor:
    branch = F.linear(_normed(x, alpha, beta, norm="affine").transpose(1, 2), w, b).transpose(1, 2)
    return x + (branch if scale is None else scale * branch)


def spatial_gating(h, gamma, beta, w, b, *, eps=1e-5) -> Tensor:
    h1, h2 = h.chunk(2, -1)
    return h1 * F.linear(_normed(h2, gamma, beta, eps).transpose(1, 2), w, b).transpose(1, 2)


def gated_channel_mixing(x, gamma, beta, w1, b1, *rest, eps=1e-6, gate_eps=1e-5, approximate="none") -> Tensor:
    *gate, w2, b2 = rest
    h = F.gelu(F.linear(_normed(x, gamma, beta, eps), w1, b1), approximate=approximate)
    return x + F.linear(spatial_gating(h, *gate, eps=gate_eps), w2, b2)


def gated_mixing(
    x, gamma, beta, w1, b1, w2, b2, w_gate, b_gate, *, axis, gate_first=False, gate="softmax", norm="layer", eps=1e-5,
    **how,
) -> Tensor:  # fmt: skip
    def gated(v: Tensor) -> Tensor:
        if w_gate is None:
            return v
        logits = F.linear(v, w_gate, b_gate)
        return v * (logits.softmax(-1) if gate == "softmax" else logits.sigmoid())

    v = _normed(x, gamma, beta, eps, norm).movedim(axis, -1)
    v = _mlp(gated(v), w1, b1, w2, b2, **how) if gate_first else gated(_mlp(v, w1, b1, w2, b2, **how))
    return x + v.movedim(-1, axis)


def gated_mixer_layer(x, *parameters, eps=1e-5, **how) -> Tensor:
    first, second = eps if isinstance(eps, tuple) else (eps, eps)
    u = gated_mixing(x, *parameters[:8], axis=-2, eps=first, **how)
    return gated_mixing(u, *parameters[8:], axis=-1, eps=second, **how)


def _normed(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 0.0, norm: str = "layer") -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    n = x if gamma is None else gamma * x
    return n if beta is None else n + beta


def _mlp(n: Tensor, w_in, b_in, w_out, b_out, approximate="none", activation="gelu") -> Tensor:
    z = F.linear(n, w_in, b_in)
    if activation == "swiglu":
        value, gate = z.chunk(2, -1)
        a = value * F.silu(gate)
    else:
        a = ACTIVATIONS.get(activation, partial(F.gelu, approximate=approximate))(z)
    return F.linear(a, w_out, b_out)
