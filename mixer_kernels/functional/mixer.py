"""``token_mixing``, ``channel_mixing``, ``mixer_block``: check, choose a backend, call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ..backends import torch as torch_backend
from ..backends.arguments import Half, Options
from .checks import check, check_half, choose, needs_grad, seeded
from .direct import Packs, key_of, known_call, remember_call, run


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
        backend: "auto", "cuda", "cuda:sm90", "triton", "cpu" or "torch"; None for what ``use_backend`` or
            ``MIXER_KERNELS_BACKEND`` says. The cpu backend takes no gradients and no noise here.
        activation: "gelu", "relu", "silu" or "swiglu"; the cuda and cpu backends have GELU alone.
        packs: the packed weights of a block that ``freeze_`` froze.

    Returns:
        ``u [B, S, C]`` in ``x``'s dtype.
    """
    half = Half(gamma, beta, w1, b1, w2, b2)
    arguments = (eps, approximate, dropout_p, drop_path_p, activation)
    key = key_of("token_mixing", x, half, arguments, backend, packs)
    known = known_call(key)
    if known is not None:
        return known(x, half, packs)
    parameters = {"gamma": gamma, "beta": beta, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    options = Options(
        eps=eps, activation=activation, approximate=approximate, dropout_p=dropout_p, drop_path_p=drop_path_p
    )
    x, options = check(x, parameters, options)
    check_half(x, parameters, "tokens", activation)
    name = _choose(backend, x, options, "token_mixing", half)
    return _token_mixing(x, half, options, name, key, packs)


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
        norm: "layer", or "affine", which the cuda backend does not have. The cpu backend has no channel half.

    Returns:
        ``y [B, S, C]`` in ``u``'s dtype.
    """
    half = Half(gamma, beta, w3, b3, w4, b4)
    arguments = (eps, approximate, dropout_p, drop_path_p, memory, activation, norm)
    key = key_of("channel_mixing", u, half, arguments, backend, packs)
    known = known_call(key)
    if known is not None:
        return known(u, half, packs)
    parameters = {"gamma": gamma, "beta": beta, "w3": w3, "b3": b3, "w4": w4, "b4": b4}
    options = Options(
        eps=eps, activation=activation, approximate=approximate, norm=norm, dropout_p=dropout_p,
        drop_path_p=drop_path_p,
    )  # fmt: skip
    u, options = check(u, parameters, options, memory, name="u")
    check_half(u, parameters, "channels", activation, "u")
    return _channel_mixing(u, half, options, choose(backend, u, options, "channel_mixing"), memory, key, packs)


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
    """A whole Mixer block: ``channel_mixing(token_mixing(x, ...), ...)``, as one operator if no gradient is needed.

    ``memory=None`` promises that none is needed: autograd raises if it is asked for one.

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
    both = (gamma1, beta1, w1, b1, w2, b2, gamma2, beta2, w3, b3, w4, b4)
    arguments = (eps1, eps2, approximate, dropout_p, drop_path_p, memory, activation)
    key = key_of("mixer_block", x, both, arguments, backend, packs)
    known = known_call(key, packs)
    if known is not None:
        return known(x, both, packs)
    of_tokens = {"gamma1": gamma1, "beta1": beta1, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    of_channels = {"gamma2": gamma2, "beta2": beta2, "w3": w3, "b3": b3, "w4": w4, "b4": b4}
    options = Options(
        eps=eps1, activation=activation, approximate=approximate, dropout_p=dropout_p, drop_path_p=drop_path_p
    )
    x, options = check(x, of_tokens | of_channels, options, memory, eps2)
    check_half(x, of_tokens, "tokens", activation)
    check_half(x, of_channels, "channels", activation)
    name = _choose(backend, x, options, "mixer_block", both if memory is not None else ())
    if name != "torch" and not options.noise and (memory is None or not needs_grad(x, *both)):
        tokens, channels = Half(*both[:6]), Half(*both[6:])
        return run("mixer_block", key, name, x, (tokens, channels), options, packs, eps2=eps2)

    def halves(x: Tensor, both: Sequence[Tensor | None], packs: Packs) -> Tensor:
        u = _token_mixing(x, Half(*both[:6]), options, name)
        return _channel_mixing(u, Half(*both[6:]), options._replace(eps=eps2), name, memory)

    remember_call(key, halves)
    return halves(x, both, packs)


def _choose(
    backend: str | None, x: Tensor, options: Options, operator: str, parameters: Sequence[Tensor | None]
) -> str:
    """``parameters``: those of which gradients may be asked for."""
    trains = options.noise or needs_grad(x if parameters else None, *parameters)
    more = (f"{operator} in training",) if trains else ()
    return choose(backend, x, options, operator, *more, parameters=parameters)


def _token_mixing(
    x: Tensor, half: Half, options: Options, name: str, key: Hashable | None = None, packs: Packs = None
) -> Tensor:
    if name == "torch":
        return torch_backend.token_mixing_forward(x, half, options)
    return run("token_mixing", key, name, x, (half,), seeded(x, options), packs)


def _channel_mixing(
    u: Tensor,
    half: Half,
    options: Options,
    name: str,
    memory: str | None,
    key: Hashable | None = None,
    packs: Packs = None,
) -> Tensor:
    if name == "torch":
        return torch_backend.channel_mixing_forward(u, half, options)
    keep_z = memory == "fast" and needs_grad(u, *half)
    return run("channel_mixing", key, name, u, (half,), seeded(u, options), packs, keep_z=keep_z)
