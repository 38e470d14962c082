"""MLP-Mixer's relatives for images: ResMLP's ``token_linear``, gMLP's ``gated_channel_mixing``.

gMixer is ``mixer_block(..., activation="swiglu")``; ResMLP's other half is ``channel_mixing(..., norm="affine")``.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import torch as torch_backend
from ..backends.arguments import AffineLinear, Half, Options, SpatialGate
from .checks import check, check_columns, check_norm, check_shape, choose, needs_grad, seeded
from .direct import key_of, known_call, run


def token_linear(
    x: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    *,
    drop_path_p: float = 0.0,
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The token half of a ResMLP block: ``x + scale * (W . (alpha * x + beta) + b)`` along tokens.

    Equations (24) and (25) of docs/maths.md (ResMLP, arXiv:2105.03404). Equivalent to::

        n = torch.addcmul(beta, alpha, x)
        u = x + scale * F.linear(n.transpose(1, 2), w, b).transpose(1, 2)

    Args:
        x: ``[B, S, C]``, any strides.
        alpha, beta: of the affine map, ``[C]`` or None for 1 and 0.
        w, b: ``[S, S]`` and ``[S]`` or None.
        scale: LayerScale, ``[C]`` or None for 1.
        drop_path_p, packs: as for ``token_mixing``.
        backend: "auto", "triton" or "torch"; the cuda backend does not have it.

    Returns:
        ``u [B, S, C]`` in ``x``'s dtype.
    """
    linear = AffineLinear(alpha, beta, w, b, scale)
    key = key_of("token_linear", x, linear, (drop_path_p,), backend, packs)
    known = known_call(key)
    if known is not None:
        return known(x, linear, packs)
    parameters = linear._asdict()
    x, options = check(x, parameters, Options(drop_path_p=drop_path_p))
    _check_square("w", w, x)
    check_shape("b", b, (x.shape[1],))
    for vector in ("alpha", "beta", "scale"):
        check_shape(vector, parameters[vector], (x.shape[2],))
    name = choose(backend, x, options, "token_linear")
    if name == "torch":
        return torch_backend.token_linear_forward(x, linear, options)
    return run("token_linear", key, name, x, (linear,), seeded(x, options), packs)


def spatial_gating(
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """gMLP's spatial gating unit: ``h1 * (W . LN(h2) + b)`` along tokens, with ``h1, h2 = h.chunk(2, -1)``.

    Equation (27) of docs/maths.md (gMLP, arXiv:2105.08050). Equivalent to::

        h1, h2 = h.chunk(2, -1)
        n = F.layer_norm(h2, (C,), gamma, beta, eps)
        s = h1 * F.linear(n.transpose(1, 2), w, b).transpose(1, 2)

    Args:
        h: ``[B, S, 2 * C]``, any strides.
        gamma, beta: LayerNorm's weight and bias, ``[C]`` or None.
        w, b: ``[S, S]`` and ``[S]`` or None.
        eps: added to the variance; > 0.
        backend: as for ``token_linear``.

    Returns:
        ``s [B, S, C]`` in ``h``'s dtype.
    """
    gate = SpatialGate(gamma, beta, w, b)
    key = key_of("spatial_gating", h, gate, (eps,), backend, None)
    known = known_call(key)
    if known is not None:
        return known(h, gate, None)
    h, options = check(h, gate._asdict(), Options(eps=eps), name="h")
    if h.shape[2] % 2 != 0:
        raise ValueError(f"h must have an even number of channels, factors and gates, got {h.shape[2]}")
    _check_gate(h, gate, ("gamma", "beta", "w", "b"), h.shape[2] // 2)
    name = choose(backend, h, options, "spatial_gating")
    if name == "torch":
        return torch_backend.spatial_gating_forward(h, gate, options)
    return run("spatial_gating", key, name, h, (gate,), options)


def gated_channel_mixing(
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
    eps: float = 1e-6,
    gate_eps: float = 1e-5,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """A whole gMLP block: a channel MLP with ``spatial_gating`` between its products.

    Equivalent to::

        n = F.layer_norm(x, (C,), gamma, beta, eps)
        h = F.gelu(F.linear(n, w1, b1), approximate=approximate)
        s = spatial_gating(h, gate_gamma, gate_beta, w_gate, b_gate, eps=gate_eps)
        y = x + F.linear(s, w2, b2)

    Args:
        x: ``[B, S, C]``, any strides.
        gamma, beta: LayerNorm's weight and bias, ``[C]`` or None.
        w1, b1: ``[F, C]`` and ``[F]`` or None; F is even.
        gate_gamma, gate_beta: those of the gate's LayerNorm, ``[F / 2]`` or None.
        w_gate, b_gate: ``[S, S]`` and ``[S]`` or None.
        w2, b2: ``[C, F / 2]`` and ``[C]`` or None.
        eps, gate_eps: added to the variances; > 0.
        approximate, dropout_p, drop_path_p, packs: as for ``token_mixing``.
        memory: "fast" or "min", what training keeps: x, its row statistics and, "fast", the hidden units z;
            None for nothing, where no gradient will be asked for.
        backend: as for ``token_linear``.

    Returns:
        ``y [B, S, C]`` in ``x``'s dtype.
    """
    half, gate = Half(gamma, beta, w1, b1, w2, b2), SpatialGate(gate_gamma, gate_beta, w_gate, b_gate)
    arguments = (eps, gate_eps, approximate, dropout_p, drop_path_p, memory)
    key = key_of("gated_channel_mixing", x, (*half, *gate), arguments, backend, packs)
    known = known_call(key)
    if known is not None:
        return known(x, (*half, *gate), packs)
    parameters = {
        "gamma": gamma, "beta": beta, "w1": w1, "b1": b1, "gate_gamma": gate_gamma, "gate_beta": gate_beta,
        "w_gate": w_gate, "b_gate": b_gate, "w2": w2, "b2": b2,
    }  # fmt: skip
    options = Options(eps=eps, approximate=approximate, dropout_p=dropout_p, drop_path_p=drop_path_p)
    x, options = check(x, parameters, options, memory, gate_eps)
    channels = x.shape[2]
    check_columns("w1", w1, ("F", "channels"), x, second=w2)
    hidden = w1.shape[0]
    if hidden % 2 != 0:
        raise ValueError(f"w1 must be (F, channels) with an even F, got shape {tuple(w1.shape)}")
    check_norm(x, parameters)
    check_shape("b1", b1, (hidden,))
    _check_gate(x, gate, ("gate_gamma", "gate_beta", "w_gate", "b_gate"), hidden // 2)
    check_shape("w2", w2, (channels, hidden // 2))
    check_shape("b2", b2, (channels,))
    name = choose(backend, x, options, "gated_channel_mixing")
    if name == "torch":
        return torch_backend.gated_channel_mixing_forward(x, half, gate, options, gate_eps)
    keep_z, options = memory == "fast" and needs_grad(x, *half, *gate), seeded(x, options)
    further = {"gate_eps": gate_eps, "keep_z": keep_z}
    return run("gated_channel_mixing", key, name, x, (half, gate), options, packs, **further)


def _check_gate(x: Tensor, gate: SpatialGate, names: tuple[str, ...], channels: int) -> None:
    check_shape(names[0], gate.gamma, (channels,))
    check_shape(names[1], gate.beta, (channels,))
    _check_square(names[2], gate.w, x)
    check_shape(names[3], gate.b, (x.shape[1],))


def _check_square(name: str, w: Tensor, x: Tensor) -> None:
    if w.dim() != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"{name} must be (tokens, tokens), got shape {tuple(w.shape)}")
    check_columns(name, w, ("tokens", "tokens"), x)
