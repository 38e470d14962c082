"""Backward of both halves: which kernels run, in which order, for the gradients that are wanted.

::

    token mixing      g (branch gradient), a and dz and dn, LayerNorm and n, dW1 and dW2
    channel mixing    g, z if it was not kept, dz and a, dW4, dn, LayerNorm and n, dW3

Plain products are PyTorch's. The token half passes a and dz on through scratch memory, 2 * B * D_S * C elements that
are gone when its backward ends; recomputing them for the weight gradients would take GELU and two products more. So
would n cost its product normalisation in the loop: LayerNorm's kernel, which has it, writes B * S * C elements more.
Sums over programs that kernels leave as ``Parts`` are added at last, those of all parameters by one launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Half, Norm, Options, Parts
from .devices import device_of, without_autocast
from .protocol import Backend

Gradients = tuple[Tensor | Parts | None, ...]


class Pass(NamedTuple):
    """What each backward function takes first; the parameters come behind it."""

    backend: Backend
    dy: Tensor  # contiguous
    kept: Sequence[Tensor | None]  # of the forward pass
    x: Tensor
    options: Options
    wanted: Sequence[bool]  # of x and all parameters


def differentiate(
    backward: Callable[..., Gradients], given: Pass, parameters: Sequence[Sequence[Tensor | None]], **further: Any
) -> Gradients:
    """Gradients of x and all ``parameters``, in their dtypes; None where they are not wanted."""
    x, wanted = given.x, given.wanted
    inputs = (x, *itertools.chain(*parameters))
    if x.numel() == 0:
        return tuple(torch.zeros_like(t) if want else None for t, want in zip(inputs, wanted, strict=True))
    with device_of(x), without_autocast(x):
        gradients = backward(given._replace(dy=given.dy.contiguous()), *parameters, **further)
        # What is no tensor is Parts: of the class that the backend knows, where the package was imported twice.
        made = enumerate(gradients)
        parts = {i: each for i, each in made if wanted[i] and not isinstance(each, Tensor | None)}
        sums = given.backend.sum_parts(list(parts.values()), [inputs[i].dtype for i in parts]) if parts else ()
        added = dict(zip(parts, sums, strict=True))
        return tuple(
            added[i] if i in added else _in_dtype_of(source, gradient) if want else None
            for i, (gradient, source, want) in enumerate(zip(gradients, inputs, wanted, strict=True))
        )


def _in_dtype_of(source: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.dtype is source.dtype else gradient.to(source.dtype)


def token_mixing_backward(given: Pass, half: Half) -> Gradients:
    """Of x and the half's parameters. Kept are mean and rstd."""
    backend, du, kept, x, options, wanted = given
    want_x, want_gamma, want_beta, want_w1, want_b1, want_w2, want_b2 = wanted
    by_n = backend.has("token_weight_gradients")
    want_n = by_n and want_w1
    want_dn = want_x or want_gamma or want_beta or want_n
    want_dz, want_a = want_w1 or want_b1, want_w2 or want_b2
    g = backend.branch_gradient(du, options)
    w1, norm, weights = backend.token_backward_weights(x, g, Norm(*kept, half.gamma, half.beta), half, options)
    dn, a, dz = backend.token_products_backward(g, x, norm, weights, options, want_a, want_dz)
    dx = n = dgamma = dbeta = dw1 = db1 = dw2 = db2 = None
    if want_dn:
        if dn is None:
            dn = w1.to(options.dtype).t() @ dz
        dx, n, dgamma, dbeta, _ = backend.norm_backward(x, dn, du, norm, options.dtype if want_n else None)
        del dn
    if by_n:
        operands = (dz if want_dz else None, n, a if want_a else None, g)
        return dx, dgamma, dbeta, *backend.token_weight_gradients(*operands, options)
    if want_dz:
        dw1, db1 = backend.weight_gradient(dz, x, norm, options)
    if want_a:
        dw2, db2 = backend.weight_gradient(a, g, None, options)
        dw2 = dw2.t()
    return dx, dgamma, dbeta, dw1, db1, dw2, db2


def channel_mixing_backward(given: Pass, half: Half, keep_z: bool = True) -> Gradients:
    """Of u and the half's parameters. Kept are mean, rstd and z, which is recomputed if it is None."""
    backend, dy, (mean, rstd, z), u, options, wanted = given
    want_u, want_gamma, want_beta, want_w3, want_b3, want_w4, want_b4 = wanted
    want_n = want_u or want_gamma or want_beta or want_w3
    g = backend.branch_gradient(dy, options)
    dw3 = db3 = dw4 = db4 = du = dgamma = dbeta = None
    if want_n or want_b3 or want_w4:
        norm = Norm(mean, rstd, half.gamma, half.beta)
        w3, norm, weights = backend.channel_backward_weights(u, z, norm, half, options, want_n)
        dz, a, db3 = backend.channel_products_backward(g, u, z, norm, weights, options, want_w4)
        if want_w4:
            dw4 = g.flatten(0, 1).t() @ a
            del a
    if want_n:
        dn = dz @ w3.to(options.dtype)
        n_dtype = options.dtype if want_w3 else None
        du, n, dgamma, dbeta, db4 = backend.norm_backward(u, dn, dy, norm, n_dtype)
        if want_w3:
            dw3 = dz.t() @ n.flatten(0, 1)
    if want_b4 and (db4 is None or options.noise):
        db4 = g.sum((0, 1), dtype=torch.float32)
    return du, dgamma, dbeta, dw3, db3, dw4, db4
