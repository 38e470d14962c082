"""Mixers of time series: a layer of PatchTSMixer, ``gated_mixer_layer``, and one of its mixers, ``gated_mixing``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import torch as torch_backend
from ..backends.arguments import GatedHalf, Options
from ..tuning.configs import MAX_GATED_EXTENT
from .checks import check, check_is_tensor, check_norm, check_shape, choose, needs_grad, seeded
from .direct import key_of, known_call, run


def gated_mixing(
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
    gate_first: bool = False,
    gate: str = "softmax",
    norm: str = "layer",
    eps: float = 1e-5,
    approximate: str = "none",
    dropout_p: float = 0.0,
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """One mixer of a PatchTSMixer layer: an MLP with a gate, along any axis of ``x``; for short axes.

    Equations (30) to (32) of docs/maths.md (PatchTSMixer, arXiv:2306.09364). Equivalent to::

        v = F.layer_norm(x, (features,), gamma, beta, eps).movedim(axis, -1)
        v = F.linear(F.gelu(F.linear(v, w1, b1), approximate=approximate), w2, b2)
        v = v * F.softmax(F.linear(v, w_gate, b_gate), -1)
        y = x + v.movedim(-1, axis)

    With ``gate="sigmoid"`` (TinyTimeMixer) the third line has ``F.sigmoid(F.linear(v, w_gate, b_gate))``. With
    ``gate_first`` the third line is the second. With ``norm="affine"`` (BatchNorm in inference, equation (24)) the
    first has ``torch.addcmul(beta, gamma, x)``, and ``eps`` is not used. Hugging Face's layer mixes ``axis=-3``
    (channels of the series, the gate first), ``axis=-2`` (patches) and ``axis=-1`` (features), in that order.

    Args:
        x: ``[..., features]`` with the mixed axis among its last three; any strides. K is that axis's size.
        gamma, beta: LayerNorm's weight and bias, ``[features]`` or None.
        w1, b1: ``[H, K]`` and ``[H]`` or None.
        w2, b2: ``[K, H]`` and ``[K]`` or None.
        w_gate, b_gate: ``[K, K]`` and ``[K]``, or None: ``w_gate`` None for no gate.
        axis: -1, -2 or -3.
        gate_first: the gate before the MLP rather than behind it.
        gate: "softmax" or "sigmoid".
        norm: "layer" or "affine".
        eps: added to the variance; > 0.
        approximate: "none" for the erf form of GELU, "tanh" for the tanh form.
        dropout_p: probability of dropping an element after GELU and after the second product, in [0, 1].
        backend: "auto", "cpu", "triton" or "torch"; the cuda backend does not have it; triton takes a K up to 256.
        packs: as for ``token_mixing``.

    Returns:
        ``y`` in ``x``'s shape and dtype.
    """
    if axis not in (-1, -2, -3):
        raise ValueError(f"axis must be -1, -2 or -3, got {axis}")
    check_is_tensor("x", x)
    if x.layout is torch.strided and x.dim() < max(2, -axis):
        raise ValueError(f"x must have {max(2, -axis)} axes or more to mix axis {axis}, got shape {tuple(x.shape)}")
    shape = x.shape
    x, half = _of_four_axes(x), GatedHalf(gamma, beta, w1, b1, w2, b2, w_gate, b_gate)
    key = key_of("gated_mixing", x, half, (axis, gate_first, gate, norm, eps, approximate, dropout_p), backend, packs)
    known = known_call(key, packs)
    if known is not None:
        return _in_shape(known(x, half, packs), shape)
    parameters = {
        "gamma": gamma, "beta": beta, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_gate": w_gate, "b_gate": b_gate
    }  # fmt: skip
    options = Options(eps=eps, approximate=approximate, norm=norm, gate=gate, dropout_p=dropout_p)
    x, options = check(x, parameters, options, dim=4)
    _check_mixer(x, parameters, axis)
    name = choose(backend, x, options, "gated_mixing", *_too_long(x.shape[axis]), parameters=half)
    if name == "torch":
        y = torch_backend.gated_mixing_forward(x, half, options, axis + 4, gate_first)
    else:
        options = seeded(x, options)
        y = run("gated_mixing", key, name, x, (half,), options, packs, axis=axis + 4, gate_first=gate_first)
    return _in_shape(y, shape)


def gated_mixer_layer(
    x: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate1: Tensor | None,
    b_gate1: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    w_gate2: Tensor | None,
    b_gate2: Tensor | None,
    *,
    gate: str = "softmax",
    norm: str = "layer",
    eps: float | tuple[float, float] = 1e-5,
    approximate: str = "none",
    dropout_p: float = 0.0,
    memory: str | None = "fast",
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """A PatchTSMixer layer: patches mixed, then features; one kernel where the layer is small.

    Equations (30) to (32) of docs/maths.md, twice (PatchTSMixer, arXiv:2306.09364). Equivalent to::

        u = gated_mixing(x, gamma1, beta1, w1, b1, w2, b2, w_gate1, b_gate1, axis=-2, gate=gate, norm=norm)
        y = gated_mixing(u, gamma2, beta2, w3, b3, w4, b4, w_gate2, b_gate2, axis=-1, gate=gate, norm=norm)

    The triton backend does it by one kernel where the layer is small: P at most 64, P times F at most 4096, or 2048 in
    float32, each rounded up to a power of two of at least 16, and F at most 128 with dropout. Else by two.

    Args:
        x: ``[..., P, F]``, patches by features, any strides.
        gamma1, beta1, w1, b1, w2, b2, w_gate1, b_gate1: as for ``gated_mixing`` of the patches, where K is P.
        gamma2, beta2, w3, b3, w4, b4, w_gate2, b_gate2: as for ``gated_mixing`` of the features, where K is F.
        eps: of both LayerNorms, or of the first and the second.
        approximate, norm, gate, dropout_p, packs: as for ``gated_mixing``.
        memory: what training keeps: "fast" ``x`` and u, "min" ``x`` alone; None where no gradient will be asked for.
        backend: "auto", "cpu", "triton" or "torch"; the cuda backend does not have it; triton takes a P and an F up
            to 256.

    Returns:
        ``y`` in ``x``'s shape and dtype.
    """
    check_is_tensor("x", x)
    if x.layout is torch.strided and x.dim() < 2:
        raise ValueError(f"x must have 2 axes or more, patches and features, got shape {tuple(x.shape)}")
    shape = x.shape
    x = _of_four_axes(x)
    eps1, eps2 = eps if isinstance(eps, tuple) else (eps, eps)
    both = (
        gamma1, beta1, w1, b1, w2, b2, w_gate1, b_gate1, gamma2, beta2, w3, b3, w4, b4, w_gate2, b_gate2,
    )  # fmt: skip
    key = key_of("gated_mixer_layer", x, both, (gate, norm, eps1, eps2, approximate, dropout_p, memory), backend, packs)
    known = known_call(key, packs)
    if known is not None:
        return _in_shape(known(x, both, packs), shape)
    of_patches = {
        "gamma1": gamma1, "beta1": beta1, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_gate1": w_gate1,
        "b_gate1": b_gate1,
    }  # fmt: skip
    of_features = {
        "gamma2": gamma2, "beta2": beta2, "w3": w3, "b3": b3, "w4": w4, "b4": b4, "w_gate2": w_gate2,
        "b_gate2": b_gate2,
    }  # fmt: skip
    options = Options(eps=eps1, approximate=approximate, norm=norm, gate=gate, dropout_p=dropout_p)
    x, options = check(x, of_patches | of_features, options, memory, eps2, dim=4)
    _check_mixer(x, of_patches, axis=-2)
    _check_mixer(x, of_features, axis=-1)
    name = choose(backend, x, options, "gated_mixer_layer", *_too_long(max(x.shape[2:])), parameters=both)
    patches, features = GatedHalf(*both[:8]), GatedHalf(*both[8:])
    if name == "torch":
        u = torch_backend.gated_mixing_forward(x, patches, options, axis=2, gate_first=False)
        y = torch_backend.gated_mixing_forward(u, features, options._replace(eps=eps2), axis=3, gate_first=False)
    else:
        keep_u, options = memory == "fast" and needs_grad(x, *both), seeded(x, options, number=2)
        y = run("gated_mixer_layer", key, name, x, (patches, features), options, packs, eps2=eps2, keep_u=keep_u)
    return _in_shape(y, shape)


def _of_four_axes(x: Tensor) -> Tensor:
    """``x`` as ``[batch, channels, patches, features]``."""
    if x.layout is not torch.strided or x.is_nested:
        return x  # check says that it is not dense
    axes = x.dim()
    return x if axes == 4 else x.flatten(0, -4) if axes > 4 else x[(None,) * (4 - axes)]


def _in_shape(y: Tensor, shape: torch.Size) -> Tensor:
    return y if y.shape == shape else y.view(shape)


def _check_mixer(x: Tensor, parameters: dict[str, Tensor | None], axis: int) -> None:
    """Shapes of the parameters of what mixes ``axis``, in the order of the signatures above."""
    extent, weight = x.shape[axis], list(parameters.values())[2]
    _, _, w1, b1, w2, b2, w_gate, b_gate = parameters
    if weight.dim() != 2:
        raise ValueError(f"{w1} must be (H, K), got shape {tuple(weight.shape)}")
    hidden = weight.shape[0]
    if weight.shape[1] != extent:
        raise ValueError(
            f"{w1} has shape {tuple(weight.shape)}: built for {weight.shape[1]} along axis {axis}, x has {extent}"
        )
    check_norm(x, parameters)
    for name, expected in (
        (b1, (hidden,)), (w2, (extent, hidden)), (b2, (extent,)), (w_gate, (extent, extent)), (b_gate, (extent,)),
    ):  # fmt: skip
        check_shape(name, parameters[name], expected)
    if parameters[w_gate] is None and parameters[b_gate] is not None:
        raise ValueError(f"{b_gate} is given without {w_gate}")


def _too_long(extent: int) -> tuple[str, ...]:
    """What kernels would have to have beside the operator, to mix an axis of ``extent``."""
    return (f"an axis of {extent}, only up to {MAX_GATED_EXTENT}",) if extent > MAX_GATED_EXTENT else ()
