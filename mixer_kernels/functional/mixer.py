"""``token_mixing``, ``channel_mixing``, ``mixer_block``: check, choose a backend, call."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..backends import torch as torch_backend
from .checks import check, check_channel_shapes, check_token_shapes, choose, needs_grad, seed_for, takes_packs


def token_mixing(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    backend: str | None = None,
    activation: str = "gelu",
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The token-mixing half of a Mixer block: ``x + W2 . GELU(W1 . LN(x) + b1) + b2`` along tokens.

    Equations (1) to (5) of docs/maths.md. Equivalent to::

        n = F.layer_norm(x, (C,), gamma, beta, eps)
        a = F.gelu(F.linear(n.transpose(1, 2), w1, b1), approximate=approximate)
        u = x + F.linear(a, w2, b2).transpose(1, 2)

    With ``activation="swiglu"`` (gMixer, equation (22)) ``w1`` has twice the rows, and the second line is::

        value, gate = F.linear(n.transpose(1, 2), w1, b1).chunk(2, -1)
        a = value * F.silu(gate)

    Args:
        x: ``[B, S, C]``, any strides.
        gamma, beta: LayerNorm's weight and bias, ``[C]`` or None.
        w1, b1: ``[D_S, S]`` and ``[D_S]`` or None; for SwiGLU ``[2 * D_S, S]`` and ``[2 * D_S]``.
        w2, b2: ``[S, D_S]`` and ``[S]`` or None.
        eps: added to the variance; > 0.
        approximate: "none" for the erf form of GELU (timm), "tanh" for the tanh form (Flax).
        dropout_p: probability of dropping an element after the activation and after the second product, in [0, 1].
        drop_path_p: probability of dropping the whole branch of an image; what is kept is scaled by 1 / (1 - p).
        backend: "auto", "cuda", "cuda:sm90", "triton" or "torch"; None for what ``use_backend`` or
            ``MIXER_KERNELS_BACKEND`` says.
        activation: "gelu", or "swiglu", which the cuda backend does not have.
        packs: the weights as kernels take them, of a block that ``freeze_`` froze.

    Returns:
        ``u [B, S, C]`` in ``x``'s dtype.
    """
    parameters = {"gamma": gamma, "beta": beta, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    x, dtype = check(x, parameters, (eps,), approximate, dropout_p, drop_path_p, activation=activation)
    check_token_shapes(x, parameters, activation)
    name = choose(backend, x, dtype, _relative(activation))
    noise = (dropout_p, drop_path_p)
    if takes_packs(packs, name, noise, x, gamma, beta, w1, b1, w2, b2):
        tensors = (gamma, beta, w1, b1, w2, b2)
        return ops.packed("token_mixing", x, tensors, packs, dtype, name, (eps,), approximate, activation)
    return _token_mixing(x, (gamma, beta, w1, b1, w2, b2), eps, approximate, dtype, noise, name, activation)


def channel_mixing(
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    activation: str = "gelu",
    norm: str = "layer",
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The channel-mixing half of a Mixer block: ``u + GELU(LN(u) . W3' + b3) . W4' + b4`` along channels.

    Equations (1), (2), (4), (6), (7) of docs/maths.md. Equivalent to::

        n = F.layer_norm(u, (C,), gamma, beta, eps)
        a = F.gelu(F.linear(n, w3, b3), approximate=approximate)
        y = u + F.linear(a, w4, b4)

    With ``norm="affine"`` (ResMLP, equation (24)) ``n = torch.addcmul(beta, gamma, u)``, and ``eps`` is not used.
    ResMLP's LayerScale multiplies ``w4`` (by rows) and ``b4`` beforehand.

    Args:
        u: ``[B, S, C]``, any strides.
        gamma, beta: LayerNorm's weight and bias, ``[C]`` or None.
        w3, b3: ``[D_C, C]`` and ``[D_C]`` or None; for SwiGLU ``[2 * D_C, C]`` and ``[2 * D_C]``.
        w4, b4: ``[C, D_C]`` and ``[C]`` or None.
        eps, approximate, dropout_p, drop_path_p, backend, activation, packs: as for ``token_mixing``.
        memory: "fast" or "min", what training keeps; None for nothing, where no gradient will be asked for.
        norm: "layer", or "affine", which the cuda backend does not have.

    Returns:
        ``y [B, S, C]`` in ``u``'s dtype.
    """
    parameters = {"gamma": gamma, "beta": beta, "w3": w3, "b3": b3, "w4": w4, "b4": b4}
    u, dtype = check(u, parameters, (eps,), approximate, dropout_p, drop_path_p, memory, activation, norm, "u")
    check_channel_shapes(u, parameters, activation)
    name = choose(backend, u, dtype, _relative(activation, norm))
    noise = (dropout_p, drop_path_p)
    parameters = (gamma, beta, w3, b3, w4, b4)
    if takes_packs(packs, name, noise, u, *parameters):
        return ops.packed("channel_mixing", u, parameters, packs, dtype, name, (eps,), approximate, activation, norm)
    return _channel_mixing(u, parameters, eps, approximate, dtype, noise, name, memory, activation, norm)


def mixer_block(
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
    eps: float | tuple[float, float] = 1e-6,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    activation: str = "gelu",
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """A whole Mixer block: ``channel_mixing(token_mixing(x, ...), ...)``; as one operator where no gradient is needed.

    With ``memory=None`` that is taken for granted: autograd then raises where it is asked for one.

    Args:
        x: ``[B, S, C]``, any strides.
        gamma1, beta1, w1, b1, w2, b2: as for ``token_mixing``.
        gamma2, beta2, w3, b3, w4, b4: as for ``channel_mixing``.
        eps: of both LayerNorms, or of the first and the second.
        approximate, dropout_p, drop_path_p, memory, backend, activation, packs: as for ``channel_mixing``.

    Returns:
        ``y [B, S, C]`` in ``x``'s dtype.
    """
    eps1, eps2 = eps if isinstance(eps, tuple) else (eps, eps)
    parameters = {
        "gamma1": gamma1, "beta1": beta1, "w1": w1, "b1": b1, "w2": w2, "b2": b2,
        "gamma2": gamma2, "beta2": beta2, "w3": w3, "b3": b3, "w4": w4, "b4": b4,
    }  # fmt: skip
    x, dtype = check(x, parameters, (eps1, eps2), approximate, dropout_p, drop_path_p, memory, activation)
    check_token_shapes(x, parameters, activation, half="1")
    check_channel_shapes(x, parameters, activation, half="2")
    name = choose(backend, x, dtype, _relative(activation))
    noise = (dropout_p, drop_path_p)
    tokens, channels = (gamma1, beta1, w1, b1, w2, b2), (gamma2, beta2, w3, b3, w4, b4)
    if takes_packs(packs, name, noise, x, *tokens, *channels):
        tensors = (*tokens, *channels)
        return ops.packed("mixer_block", x, tensors, packs, dtype, name, (eps1, eps2), approximate, activation)
    if name != "torch" and noise == (0, 0) and (memory is None or not needs_grad(x, *tokens, *channels)):
        return ops.mixer_block(x, *tokens, *channels, eps1, eps2, approximate, dtype, name, activation)
    u = _token_mixing(x, tokens, eps1, approximate, dtype, noise, name, activation)
    return _channel_mixing(u, channels, eps2, approximate, dtype, noise, name, memory, activation, "layer")


def _token_mixing(x, parameters, eps, approximate, dtype, noise, name, activation) -> Tensor:
    if name == "torch":
        return torch_backend.token_mixing_forward(
            x, *parameters, eps=eps, approximate=approximate, dtype=dtype, dropout_p=noise[0], drop_path_p=noise[1],
            activation=activation,
        )  # fmt: skip
    return ops.token_mixing(x, *parameters, eps, approximate, dtype, *noise, seed_for(x, noise), name, activation)[0]


def _channel_mixing(u, parameters, eps, approximate, dtype, noise, name, memory, activation, norm) -> Tensor:
    if name == "torch":
        return torch_backend.channel_mixing_forward(
            u, *parameters, eps=eps, approximate=approximate, dtype=dtype, dropout_p=noise[0], drop_path_p=noise[1],
            activation=activation, norm=norm,
        )  # fmt: skip
    keep_z = memory == "fast" and needs_grad(u, *parameters)
    return ops.channel_mixing(
        u, *parameters, eps, approximate, dtype, *noise, seed_for(u, noise), name, keep_z, activation, norm
    )[0]


def _relative(activation: str, norm: str = "layer") -> str | None:
    """What a backend for the Mixer alone does not have."""
    if norm != "layer":
        return f"norm={norm!r}"
    return None if activation == "gelu" else f"activation={activation!r}"
