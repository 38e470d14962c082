"""A TSMixer layer as in darts and neuralforecast, ``tsmixer_layer``, and its mixers, ``time_mixing`` and
``feature_mixing``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import torch as torch_backend
from ..backends.arguments import FeatureMixer, Options, TimeMixer
from ..words import one_of
from .checks import check, check_columns, check_shape, choose, needs_grad, seeded
from .direct import key_of, known_call, run

ACTIVATIONS = ("gelu", "relu", "silu")


def time_mixing(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    *,
    norm_first: bool = False,
    norm: str = "layer",
    eps: float = 1e-5,
    activation: str = "relu",
    approximate: str = "none",
    dropout_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Time mixing of TSMixer: one linear layer along the tokens, the time steps of a series, and a norm over all of it.

    Equations (36) and (37) of docs/maths.md (TSMixer, arXiv:2303.06053). Equivalent to::

        y = x + F.relu(F.linear(x.mT, w, b)).mT
        y = F.layer_norm(y, (S, C), gamma, beta, eps)

    With ``norm_first`` the norm is of what the linear layer takes, as in ``nn.TransformerEncoderLayer``. With
    ``norm="affine"`` (BatchNorm in inference) it is ``torch.addcmul(beta, gamma, y)``, and ``eps`` is not used.

    Args:
        x: ``[B, S, C]``; any strides, read as it is where it is contiguous.
        gamma, beta: the norm's weight and bias, ``[S, C]`` or None.
        w, b: ``[S, S]`` and ``[S]`` or None.
        norm_first: the norm before the linear layer rather than behind the residual.
        norm: "layer", over tokens and channels at once, or "affine".
        eps: added to the variance; > 0.
        activation: "relu", "gelu" or "silu".
        approximate: "none" for the erf form of GELU, "tanh" for the tanh form.
        dropout_p: probability of dropping an element after the activation, in [0, 1].
        memory: what training keeps: "fast" ``x`` and z, before the activation; "min" ``x`` alone; None where no
            gradient will be asked for.
        backend: "auto", "cpu" or "torch"; triton and cuda do not have it.
        packs: as for ``token_mixing``.

    Returns:
        ``y [B, S, C]`` in ``x``'s dtype.
    """
    mixer = TimeMixer(gamma, beta, w, b)
    arguments = (norm_first, norm, eps, activation, approximate, dropout_p, memory)
    key = key_of("time_mixing", x, mixer, arguments, backend, packs)
    known = known_call(key, packs)
    if known is not None:
        return known(x, mixer, packs)
    options = _options(norm, eps, activation, approximate, dropout_p)
    x, options = check(x, mixer._asdict(), options, memory)
    _check_time(x, mixer)
    return _run("time_mixing", key, backend, x, mixer, options, packs, norm_first, memory)


def feature_mixing(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_skip: Tensor | None,
    b_skip: Tensor | None,
    *,
    norm_first: bool = False,
    norm: str = "layer",
    eps: float = 1e-5,
    activation: str = "relu",
    approximate: str = "none",
    dropout_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Feature mixing of TSMixer: an MLP along the channels, the residual projected where they become more or fewer.

    Equations (36) and (38) of docs/maths.md (TSMixer, arXiv:2303.06053). Equivalent to::

        y = F.linear(x, w_skip, b_skip) + F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
        y = F.layer_norm(y, (S, O), gamma, beta, eps)

    With ``norm_first`` the norm, over ``(S, C)``, is of what the MLP takes.

    Args:
        x: ``[B, S, C]``; any strides, read as it is where it is contiguous.
        gamma, beta: the norm's weight and bias, ``[S, O]``, with ``norm_first`` ``[S, C]``, or None.
        w1, b1: ``[H, C]`` and ``[H]`` or None.
        w2, b2: ``[O, H]`` and ``[O]`` or None.
        w_skip, b_skip: of the residual's projection, ``[O, C]`` and ``[O]`` or None; ``w_skip`` None for ``x`` itself,
            where O is C.
        dropout_p: probability of dropping an element after the activation and after the second product, in [0, 1].
        memory: what training keeps: "fast" ``x``, z and, where the norm is last, what it takes; "min" ``x`` alone;
            None where no gradient will be asked for.
        norm_first, norm, eps, activation, approximate, backend, packs: as for ``time_mixing``.

    Returns:
        ``y [B, S, O]`` in ``x``'s dtype.
    """
    mixer = FeatureMixer(gamma, beta, w1, b1, w2, b2, w_skip, b_skip)
    arguments = (norm_first, norm, eps, activation, approximate, dropout_p, memory)
    key = key_of("feature_mixing", x, mixer, arguments, backend, packs)
    known = known_call(key, packs)
    if known is not None:
        return known(x, mixer, packs)
    parameters = {
        "gamma": gamma, "beta": beta, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_skip": w_skip, "b_skip": b_skip
    }  # fmt: skip
    options = _options(norm, eps, activation, approximate, dropout_p)
    x, options = check(x, parameters, options, memory)
    _check_features(x, mixer, norm_first)
    return _run("feature_mixing", key, backend, x, mixer, options, packs, norm_first, memory)


def tsmixer_layer(
    x: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_skip: Tensor | None,
    b_skip: Tensor | None,
    *,
    norm_first: bool = False,
    norm: str = "layer",
    eps: float | tuple[float, float] = 1e-5,
    activation: str = "relu",
    approximate: str = "none",
    dropout_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """A TSMixer layer as one call: time mixing, then feature mixing.

    Equivalent to::

        u = time_mixing(x, gamma1, beta1, w, b)
        y = feature_mixing(u, gamma2, beta2, w1, b1, w2, b2, w_skip, b_skip)

    Args:
        x: ``[B, S, C]``; any strides, read as it is where it is contiguous.
        gamma1, beta1, w, b: as for ``time_mixing``.
        gamma2, beta2, w1, b1, w2, b2, w_skip, b_skip: as for ``feature_mixing``.
        eps: of both norms, or of the first and the second.
        memory: what training keeps: "fast" ``x``, u and what each mixer keeps; "min" ``x`` alone; None where no
            gradient will be asked for.
        norm_first, norm, activation, approximate, dropout_p, backend, packs: as for ``time_mixing``.

    Returns:
        ``y [B, S, O]`` in ``x``'s dtype.
    """
    time = TimeMixer(gamma1, beta1, w, b)
    features = FeatureMixer(gamma2, beta2, w1, b1, w2, b2, w_skip, b_skip)
    eps1, eps2 = eps if isinstance(eps, tuple) else (eps, eps)
    arguments = (norm_first, norm, eps1, eps2, activation, approximate, dropout_p, memory)
    key = key_of("tsmixer_layer", x, (*time, *features), arguments, backend, packs)
    known = known_call(key, packs)
    if known is not None:
        return known(x, (*time, *features), packs)
    parameters = {
        "gamma1": gamma1, "beta1": beta1, "w": w, "b": b, "gamma2": gamma2, "beta2": beta2, "w1": w1, "b1": b1,
        "w2": w2, "b2": b2, "w_skip": w_skip, "b_skip": b_skip,
    }  # fmt: skip
    options = _options(norm, eps1, activation, approximate, dropout_p)
    x, options = check(x, parameters, options, memory, eps2)
    _check_time(x, time, "1")
    _check_features(x, features, norm_first, "2")
    name = choose(backend, x, _without_activation(options), "tsmixer_layer", parameters=(*time, *features))
    if name == "torch":
        u = torch_backend.time_mixing_forward(x, time, options, norm_first)
        return torch_backend.feature_mixing_forward(u, features, options._replace(eps=eps2), norm_first)
    further = {"eps2": eps2, "norm_first": norm_first}
    further["keep_z"] = memory == "fast" and needs_grad(x, *time, *features)
    return run("tsmixer_layer", key, name, x, (time, features), seeded(x, options, number=2), packs, **further)


def _options(norm: str, eps: float, activation: str, approximate: str, dropout_p: float) -> Options:
    one_of("activation", activation, ACTIVATIONS)
    return Options(eps=eps, activation=activation, approximate=approximate, norm=norm, dropout_p=dropout_p)


def _without_activation(options: Options) -> Options:
    """For ``choose``: who has these operators has all of their activations."""
    return options._replace(activation="gelu")


def _check_time(x: Tensor, mixer: TimeMixer, of_norm: str = "") -> None:
    check_columns("w", mixer.w, ("tokens", "tokens"), x)
    check_shape("w", mixer.w, (x.shape[1], x.shape[1]))
    check_shape("b", mixer.b, (x.shape[1],))
    _check_norm(mixer, x.shape[1:], of_norm)


def _check_features(x: Tensor, mixer: FeatureMixer, norm_first: bool, of_norm: str = "") -> None:
    _, _, w1, b1, w2, b2, w_skip, b_skip = mixer
    check_columns("w1", w1, ("H", "channels"), x, second=w2)
    hidden, channels = w1.shape
    if w2.dim() != 2 or w2.shape[1] != hidden:
        raise ValueError(f"w2 must be (O, {hidden}), got shape {tuple(w2.shape)}")
    result = w2.shape[0]
    if w_skip is None and result != channels:
        raise ValueError(f"w2 gives {result} channels, x has {channels}: the residual needs a w_skip")
    check_shape("b1", b1, (hidden,))
    check_shape("b2", b2, (result,))
    check_shape("w_skip", w_skip, (result, channels))
    check_shape("b_skip", b_skip, (result,))
    if w_skip is None and b_skip is not None:
        raise ValueError("b_skip is given without w_skip")
    _check_norm(mixer, (x.shape[1], channels if norm_first else result), of_norm)


def _check_norm(mixer: TimeMixer | FeatureMixer, shape: tuple[int, ...], number: str) -> None:
    check_shape(f"gamma{number}", mixer.gamma, tuple(shape))
    check_shape(f"beta{number}", mixer.beta, tuple(shape))


def _run(
    function: str,
    key: Any,
    backend: str | None,
    x: Tensor,
    mixer: TimeMixer | FeatureMixer,
    options: Options,
    packs: dict[str, Tensor] | None,
    norm_first: bool,
    memory: str | None,
) -> Tensor:
    name = choose(backend, x, _without_activation(options), function, parameters=mixer)
    if name == "torch":
        return getattr(torch_backend, f"{function}_forward")(x, mixer, options, norm_first)
    further = {"norm_first": norm_first, "keep_z": memory == "fast" and needs_grad(x, *mixer)}
    return run(function, key, name, x, (mixer,), seeded(x, options), packs, **further)
