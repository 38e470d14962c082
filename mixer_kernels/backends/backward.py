"""Backward of both halves: which kernels run, in which order, for the gradients that are wanted.

::

    token mixing      g (branch gradient), a and dz and dn, dW1 and dW2, LayerNorm
    channel mixing    g, z if it was not kept, dz and a, dn, LayerNorm and n, dW3 and dW4

Plain products are PyTorch's. The token half passes a and dz on through scratch memory, 2 * B * D_S * C elements that
are gone when its backward ends; recomputing them for the weight gradients would take GELU and two products more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .devices import device_of, without_autocast
from .noise import Noise

Gradients = tuple[Tensor | None, ...]


class NormGradients(NamedTuple):
    """What a LayerNorm backward kernel returns; sums in float32."""

    dx: Tensor  # [B, S, C]
    n: Tensor | None  # [B, S, C]
    dgamma: Tensor  # [C]
    dbeta: Tensor  # [C]
    dy_sum: Tensor  # [C]


def _no_packs(x: Tensor, other: Tensor | None, gamma: Tensor | None, beta: Tensor | None, w: Tensor, *_: Any):
    return w, {}


@dataclass(frozen=True)
class Kernels:
    """A backend's share. Tensors [B, D_S, C] may have padded rows; b2 is there for kernels that pack it too.

    With SwiGLU z and dz have the rows of w1 or w3, values and gates; only then is ``activation`` passed on. ``mean``
    and ``rstd`` None stand for an affine map in place of LayerNorm.
    """

    max_fused_tokens: int  # the most that token_data_gradient takes
    branch_gradient: Callable[..., Tensor]  # (dy, noise, dtype) -> g
    token_data_gradient: Callable[..., None]  # (x, g, mean, rstd, gamma, beta, w1, b1, w2, b2, dn, a, dz)
    token_products_backward: Callable[..., tuple[Tensor, Tensor]]  # (g, x, mean, rstd, six parameters) -> a, dz
    weight_gradient: Callable[..., tuple[Tensor, Tensor]]  # (left, right, norm) -> dW1 or dW2', db1 or db2
    channel_products_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor]]
    """``(g, u, mean, rstd, z or None, gamma, beta, w3, b3, w4) -> dz, a, db3``"""
    norm_backward: Callable[..., NormGradients]  # (x, dn, dy, mean, rstd, gamma, beta, n_dtype)
    # What the kernels above take in place of parameters, made all at once before the first of them and passed on to
    # each: (x, g, gamma, beta, w1, b1, w2, dtype) -> w1 for the plain product, their further arguments
    token_packs: Callable[..., tuple[Tensor, dict[str, Any]]] = _no_packs
    # (u, z, gamma, beta, w3, b3, w4, dtype, whether LayerNorm's backward will run) -> w3, their further arguments
    channel_packs: Callable[..., tuple[Tensor, dict[str, Any]]] = _no_packs


def token_mixing_backward(
    kernels: Kernels,
    du: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    drop_path_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
    activation: str = "gelu",
) -> Gradients:
    """Gradients of ``x, gamma, beta, w1, b1, w2, b2`` from ``du``, that of u; None where ``wanted`` is false."""
    inputs = (x, gamma, beta, w1, b1, w2, b2)
    if x.numel() == 0:
        return zero_gradients(inputs, wanted)
    with device_of(x), without_autocast(x):
        gradients = _token_gradients(
            kernels, du.contiguous(), mean, rstd, *inputs, approximate=approximate, dtype=dtype,
            noise=Noise(dropout_p, drop_path_p, seed), wanted=wanted, kind=_kind(activation),
        )  # fmt: skip
        return cast_gradients(gradients, inputs, wanted)


def channel_mixing_backward(
    kernels: Kernels,
    dy: Tensor,
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    z: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    *,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    drop_path_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
    activation: str = "gelu",
) -> Gradients:
    """Gradients of ``u, gamma, beta, w3, b3, w4, b4`` from ``dy``, that of y; None where ``wanted`` is false.

    ``z`` None: recompute it.
    """
    inputs = (u, gamma, beta, w3, b3, w4, b4)
    if u.numel() == 0:
        return zero_gradients(inputs, wanted)
    with device_of(u), without_autocast(u):
        gradients = _channel_gradients(
            kernels, dy.contiguous(), mean, rstd, z, *inputs, approximate=approximate, dtype=dtype,
            noise=Noise(dropout_p, drop_path_p, seed), wanted=wanted, kind=_kind(activation),
        )  # fmt: skip
        return cast_gradients(gradients, inputs, wanted)


def _token_gradients(
    kernels, du, mean, rstd, x, gamma, beta, w1, b1, w2, b2, *, approximate, dtype, noise, wanted, kind
) -> Gradients:
    want_x, want_gamma, want_beta, want_w1, want_b1, want_w2, want_b2 = wanted
    want_dn = want_x or want_gamma or want_beta
    want_dz, want_a = want_w1 or want_b1, want_w2 or want_b2
    g = kernels.branch_gradient(du, noise, dtype)
    dn = a = dz = None
    packs: dict[str, Any] = {}
    if want_dn or want_dz or want_a:
        w1, packs = kernels.token_packs(x, g, gamma, beta, w1, b1, w2, dtype)
        shared = {"approximate": approximate, "noise": noise, **kind, **packs}
        if x.shape[1] <= kernels.max_fused_tokens and not kind:  # SwiGLU's values, gates and gradients do not fit
            hidden = (x.shape[0], w1.shape[0], x.shape[2])
            dn = torch.empty(x.shape, dtype=dtype, device=x.device)
            a = torch.empty(hidden, dtype=dtype, device=x.device) if want_a else None
            dz = torch.empty(hidden, dtype=dtype, device=x.device) if want_dz else None
            kernels.token_data_gradient(
                x, g, mean, rstd, gamma, beta, w1, b1, w2, b2, dn, a, dz, dtype=dtype, **shared
            )  # fmt: skip
        else:
            a, dz = kernels.token_products_backward(g, x, mean, rstd, gamma, beta, w1, b1, w2, b2, **shared)
            dn = w1.to(dtype).t() @ dz
    dw1 = db1 = dw2 = db2 = None
    if want_dz:
        dw1, db1 = kernels.weight_gradient(dz, x, (mean, rstd, gamma, beta), noise=noise, **packs)
    if want_a:
        dw2, db2 = kernels.weight_gradient(a, g, None, noise=noise, **packs)
        dw2 = dw2.t()
    dx = dgamma = dbeta = None
    if want_dn:
        dx, _, dgamma, dbeta, _ = kernels.norm_backward(x, dn, du, mean, rstd, gamma, beta, None, **packs)
    return dx, dgamma, dbeta, dw1, db1, dw2, db2


def _channel_gradients(
    kernels, dy, mean, rstd, z, u, gamma, beta, w3, b3, w4, b4, *, approximate, dtype, noise, wanted, kind
) -> Gradients:
    want_u, want_gamma, want_beta, want_w3, want_b3, want_w4, want_b4 = wanted
    want_dn = want_u or want_gamma or want_beta
    g = kernels.branch_gradient(dy, noise, dtype)
    dw3 = db3 = dw4 = db4 = dz = None
    packs: dict[str, Any] = {}
    if want_dn or want_w3 or want_b3 or want_w4:
        w3, packs = kernels.channel_packs(u, z, gamma, beta, w3, b3, w4, dtype, want_dn or want_w3)
        dz, a, db3 = kernels.channel_products_backward(
            g, u, mean, rstd, z, gamma, beta, w3, b3, w4,
            want_a=want_w4, approximate=approximate, noise=noise, **kind, **packs,
        )  # fmt: skip
        if want_w4:
            dw4 = g.flatten(0, 1).t() @ a
            del a
    du = dgamma = dbeta = None
    if want_dn or want_w3:
        dn = dz @ w3.to(dtype)
        du, n, dgamma, dbeta, db4 = kernels.norm_backward(
            u, dn, dy, mean, rstd, gamma, beta, dtype if want_w3 else None, **packs
        )  # fmt: skip
        if want_w3:
            dw3 = dz.t() @ n.flatten(0, 1)
    if want_b4 and (db4 is None or noise.on_branch):
        db4 = g.sum((0, 1), dtype=torch.float32)
    return du, dgamma, dbeta, dw3, db3, dw4, db4


def _kind(activation: str) -> dict[str, str]:
    return {} if activation == "gelu" else {"activation": activation}


def zero_gradients(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> Gradients:
    """Of an empty batch."""
    return tuple(torch.zeros_like(t) if want else None for t, want in zip(inputs, wanted, strict=True))


def cast_gradients(gradients: Gradients, inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> Gradients:
    """Those that are wanted, in their input's dtype."""
    return tuple(
        gradient.to(source.dtype) if want else None
        for gradient, source, want in zip(gradients, inputs, wanted, strict=True)
    )
