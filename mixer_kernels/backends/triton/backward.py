"""Backward of both halves: which kernels run, in which order, for the gradients that are wanted.

::

    token mixing      g (branch gradient), a and dz and dn, dW1 and dW2, LayerNorm
    channel mixing    g, z if it was not kept, dz and a, dn, LayerNorm and n, dW3 and dW4

Plain products are PyTorch's. The token half passes a and dz on through scratch memory, 2 * B * D_S * C elements that
are gone when its backward ends; recomputing them for the weight gradients would take GELU and two products more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...tuning.configs import MAX_FUSED_TOKENS
from .branch_gradient import branch_gradient
from .channel_backward import channel_gelu_backward
from .channel_mixing import channel_hidden
from .noise import Noise
from .norm_backward import norm_backward
from .prepack import product_weight
from .token_data_gradient import token_data_gradient
from .token_products import token_hidden
from .token_products_backward import token_gelu_backward
from .token_weight_gradients import weight_gradient

Gradients = tuple[Tensor | None, ...]


def token_mixing_gradients(
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
    precision: str,
    noise: Noise,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of ``x, gamma, beta, w1, b1, w2, b2``, None where ``wanted`` is false."""
    want_x, want_gamma, want_beta, want_w1, want_b1, want_w2, want_b2 = wanted
    want_dn = want_x or want_gamma or want_beta
    want_dz, want_a = want_w1 or want_b1, want_w2 or want_b2
    g = branch_gradient(du, noise, dtype)
    dn = a = dz = None
    if want_dn or want_dz or want_a:
        shared = {"approximate": approximate, "precision": precision, "noise": noise}
        if x.shape[1] <= MAX_FUSED_TOKENS:
            hidden = (x.shape[0], w1.shape[0], x.shape[2])
            dn = torch.empty(x.shape, dtype=dtype, device=x.device)
            a = torch.empty(hidden, dtype=dtype, device=x.device) if want_a else None
            dz = torch.empty(hidden, dtype=dtype, device=x.device) if want_dz else None
            token_data_gradient(x, g, mean, rstd, gamma, beta, w1, b1, w2, dn, a, dz, dtype=dtype, **shared)
        else:
            z = token_hidden(x, mean, rstd, gamma, beta, w1, b1, w2, dtype=dtype, precision=precision)
            a, dz = token_gelu_backward(g, w2, z, **shared)
            dn = w1.to(dtype).t() @ dz
    dw1 = db1 = dw2 = db2 = None
    if want_dz:
        dw1, db1 = weight_gradient(dz, x, (mean, rstd, gamma, beta), precision=precision, noise=noise)
    if want_a:
        dw2, db2 = weight_gradient(a, g, None, precision=precision, noise=noise)
        dw2 = dw2.t()
    dx = dgamma = dbeta = None
    if want_dn:
        dx, _, dgamma, dbeta, _ = norm_backward(x, dn, du, mean, rstd, gamma, beta, None)
    return _cast((dx, dgamma, dbeta, dw1, db1, dw2, db2), (x, gamma, beta, w1, b1, w2, b2), wanted)


def channel_mixing_gradients(
    dy: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
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
    precision: str,
    noise: Noise,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of ``u, gamma, beta, w3, b3, w4, b4``, None where ``wanted`` is false. ``z`` None: recompute it."""
    want_u, want_gamma, want_beta, want_w3, want_b3, want_w4, want_b4 = wanted
    want_dn = want_u or want_gamma or want_beta
    g = branch_gradient(dy, noise, dtype)
    dw3 = db3 = dw4 = db4 = dz = None
    if want_dn or want_w3 or want_b3 or want_w4:
        if z is None:
            z = channel_hidden(u, mean, rstd, gamma, beta, w3, b3, dtype=dtype, precision=precision)
        dz, a, db3 = channel_gelu_backward(
            g, product_weight(w4, dtype), z,
            want_a=want_w4, approximate=approximate, precision=precision, noise=noise,
        )  # fmt: skip
        if want_w4:
            dw4 = g.flatten(0, 1).t() @ a
            del a
    du = dgamma = dbeta = None
    if want_dn or want_w3:
        dn = dz @ w3.to(dtype)
        du, n, dgamma, dbeta, db4 = norm_backward(u, dn, dy, mean, rstd, gamma, beta, dtype if want_w3 else None)
        if want_w3:
            dw3 = dz.t() @ n.flatten(0, 1)
    if want_b4 and (db4 is None or noise.on_branch):
        db4 = g.sum((0, 1), dtype=torch.float32)
    return _cast((du, dgamma, dbeta, dw3, db3, dw4, db4), (u, gamma, beta, w3, b3, w4, b4), wanted)


def _cast(gradients: Gradients, inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> Gradients:
    return tuple(
        gradient.to(source.dtype) if want else None
        for gradient, source, want in zip(gradients, inputs, wanted, strict=True)
    )
