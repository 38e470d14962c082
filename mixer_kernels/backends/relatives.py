"""Backward of MLP-Mixer's relatives: which kernels run, in which order, for the gradients that are wanted.

::

    ResMLP's token_linear    dx and the sums of its vectors in one kernel, dW
    gMLP                     g (branch gradient), z if it was not kept, a, [ds, dW2], gate, dW_gate, LayerNorm of the
                             gate, dz, [dn], LayerNorm and n, [dW1]
    PatchTSMixer             statistics, all between dy and dn, [dW1, dW2, dW_gate], LayerNorm; of a layer for both
                             mixers, behind u if it was not kept

What is in brackets are plain products: PyTorch's. Equations (26), (28), (29), (33) to (35) of docs/maths.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backward import Gradients, Kernels, cast_gradients, zero_gradients
from .devices import device_of, without_autocast
from .noise import Noise


class GatedMixingGradients(NamedTuple):
    """Of ``gated_mixing``: the gradient of n, operands of the weights' gradients by rows, those of the biases.

    The operands and ``b1, b2`` are None if no parameter of the MLP or the gate has a gradient; those of the gate if
    there is none.
    """

    n: Tensor  # in the shape of x
    v: Tensor | None  # [rows, K] fc1's input
    a: Tensor | None  # [rows, H] fc2's input
    z: Tensor | None  # [rows, H] the gradient of fc1's output
    out: Tensor | None  # [rows, K] the gradient of fc2's output
    gated: Tensor | None  # [rows, K] the gate's input
    logits: Tensor | None  # [rows, K] the gradient of the gate's logits
    b1: Tensor | None  # [H] float32
    b2: Tensor | None  # [K] float32
    b_gate: Tensor | None  # [K] float32


@dataclass(frozen=True)
class RelativesKernels:
    """A backend's share, beside ``mixer``, those of the Mixer."""

    mixer: Kernels
    row_statistics: Callable[..., tuple[Tensor, Tensor]]  # (x, eps) -> mean, rstd
    channel_hidden: Callable[..., Tensor]  # (x, mean, rstd, gamma, beta, w1, b1) -> z
    token_linear_data_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (du, x, w, factor) -> dx, sums
    spatial_gate_backward: Callable[..., tuple[Tensor, Tensor]]  # (ds, h, mean, rstd, gamma, beta, w, b, dh1) -> dv, s
    hidden_gelu: Callable[..., Tensor]  # (z, tokens) -> a
    hidden_gelu_backward: Callable[..., tuple[Tensor, Tensor]]  # (da, z, tokens) -> dz, db1
    gated_mixing_gradients: Callable[..., GatedMixingGradients]  # (dy, x, mean, rstd, parameters...)
    gated_mixing: Callable[..., Tensor]  # (x, parameters...) -> y


def token_linear_backward(
    kernels: RelativesKernels,
    du: Tensor,
    x: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    *,
    dtype: torch.dtype,
    drop_path_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of ``x, alpha, beta, w, b, scale`` from ``du``, that of u; None where ``wanted`` is false."""
    inputs = (x, alpha, beta, w, b, scale)
    if x.numel() == 0:
        return zero_gradients(inputs, wanted)
    want_x, want_alpha, want_beta, want_w, want_b, want_scale = wanted
    noise = Noise(0.0, drop_path_p, seed)
    alpha, beta, b, scale = (None if t is None else t.float() for t in (alpha, beta, b, scale))
    dx = dalpha = dbeta = dw = db = dscale = None
    with device_of(x), without_autocast(x):
        du = du.contiguous()
        if want_x or want_alpha or want_beta or want_scale:
            dx, of_vx, of_v = kernels.token_linear_data_gradient(
                du, x, w, _times(alpha, scale), dtype=dtype, noise=noise
            )
            dalpha, dbeta = _times(of_vx, scale), _times(of_v, scale)
            dscale = _times(of_vx, alpha) if beta is None else _times(of_vx, alpha) + beta * of_v
        if want_w or want_b or (want_scale and b is not None):
            g = kernels.mixer.branch_gradient(du, noise, dtype)
        if want_b or (want_scale and b is not None):
            over_images = g.sum(0, dtype=torch.float32)  # [S, C]
            db = over_images.sum(1) if scale is None else over_images @ scale
            if want_scale and b is not None:
                dscale = dscale + b @ over_images
        if want_w:
            # The products take scale * n: brought near 1, since LayerScale starts at 1e-6, below float16's numbers.
            unit = None if scale is None else scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            relative = None if scale is None else scale / unit
            affine = (_times(alpha, relative), None if beta is None else _times(beta, relative))
            dw = _times(kernels.mixer.weight_gradient(g, x, (None, None, *affine), noise=noise)[0], unit)
        return cast_gradients((dx, dalpha, dbeta, dw, db, dscale), inputs, wanted)


def spatial_gating_backward(
    kernels: RelativesKernels,
    ds: Tensor,
    h: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of ``h, gamma, beta, w, b`` from ``ds``, that of the gated h1; None where ``wanted`` is false."""
    inputs = (h, gamma, beta, w, b)
    if h.numel() == 0:
        return zero_gradients(inputs, wanted)
    with device_of(h), without_autocast(h):
        dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        gradients, _ = _gate_gradients(kernels, ds.contiguous(), dh, h, *inputs[1:], eps, dtype, wanted)
        return cast_gradients((dh, *gradients), inputs, wanted)


def gated_channel_mixing_backward(
    kernels: RelativesKernels,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor | None,
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
    gate_eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    drop_path_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of x and the ten parameters in order from ``dy``, that of y; None where ``wanted`` is false.

    ``z`` None: recompute it.
    """
    inputs = (x, gamma, beta, w1, b1, gate_gamma, gate_beta, w_gate, b_gate, w2, b2)
    if x.numel() == 0:
        return zero_gradients(inputs, wanted)
    want_first, want_gate, (want_w2, want_b2) = wanted[:5], wanted[5:9], wanted[9:]
    mixer, tokens = kernels.mixer, x.shape[1]
    dx = dgamma = dbeta = dw1 = db1 = dw2 = db2 = None
    gate_gradients = (None,) * 4
    with device_of(x), without_autocast(x):
        dy = dy.contiguous()
        noise = Noise(dropout_p, drop_path_p, seed)
        g = mixer.branch_gradient(dy, noise, dtype)
        if any(wanted[:10]):
            if z is None:
                z = kernels.channel_hidden(x, mean, rstd, gamma, beta, w1, b1, dtype=dtype)
            hidden = {"approximate": approximate, "noise": noise}
            h = kernels.hidden_gelu(z, tokens, **hidden).unflatten(0, (-1, tokens))
            dh = torch.empty_like(h)
            of_gate = (any(want_first), *want_gate)
            gate_gradients, s = _gate_gradients(
                kernels, g @ w2.to(dtype), dh, h, gate_gamma, gate_beta, w_gate, b_gate, gate_eps, dtype, of_gate
            )
            if want_w2:
                dw2 = g.flatten(0, 1).t() @ s.flatten(0, 1)
            del h, s
        if any(want_first):
            dz, db1 = kernels.hidden_gelu_backward(dh.flatten(0, 1), z, tokens, **hidden)
            del dh
            dn = dz @ w1.to(dtype)
            n_dtype = dtype if want_first[3] else None
            dx, n, dgamma, dbeta, db2 = mixer.norm_backward(x, dn, dy, mean, rstd, gamma, beta, n_dtype)
            if n is not None:
                dw1 = dz.t() @ n.flatten(0, 1)
        if want_b2 and (db2 is None or noise.on_branch):
            db2 = g.sum((0, 1), dtype=torch.float32)
        return cast_gradients((dx, dgamma, dbeta, dw1, db1, *gate_gradients, dw2, db2), inputs, wanted)


def gated_mixing_backward(
    kernels: RelativesKernels,
    dy: Tensor,
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
    gate_first: bool,
    eps: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of x and the eight parameters in order from ``dy``; everything is computed again from x."""
    inputs = (x, gamma, beta, w1, b1, w2, b2, w_gate, b_gate)
    if x.numel() == 0:
        return zero_gradients(inputs, wanted)
    with device_of(x), without_autocast(x):
        dy, rows = dy.contiguous(), x.flatten(0, 1)
        mean, rstd = kernels.row_statistics(rows, eps)
        of = kernels.gated_mixing_gradients(
            dy, rows.view(x.shape), mean, rstd, *inputs[1:], axis=axis, gate_first=gate_first,
            approximate=approximate, dtype=dtype, noise=Noise(dropout_p, seed=seed), of_weights=any(wanted[3:]),
        )  # fmt: skip
        dw1, dw2, dw_gate = (
            g.t() @ operand if want else None
            for want, g, operand in zip(wanted[3::2], (of.z, of.out, of.logits), (of.v, of.a, of.gated), strict=True)
        )
        dx = dgamma = dbeta = None
        if any(wanted[:3]):
            dx, _, dgamma, dbeta, _ = kernels.mixer.norm_backward(rows, of.n, dy, mean, rstd, gamma, beta, None)
            dx = dx.view(x.shape)
        gradients = (dx, dgamma, dbeta, dw1, of.b1, dw2, of.b2, dw_gate, of.b_gate)
        return cast_gradients(gradients, inputs, wanted)


def gated_mixer_layer_backward(
    kernels: RelativesKernels,
    dy: Tensor,
    x: Tensor,
    u: Tensor | None,
    *parameters: Tensor | None,
    eps1: float,
    eps2: float,
    approximate: str,
    dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of x and the parameters of both mixers, eight each, from ``dy``; ``u`` None: recompute it."""
    of_patches, of_features = parameters[:8], parameters[8:]
    if x.numel() == 0:
        return zero_gradients((x, *parameters), wanted)
    seeds = (None, None) if seed is None else seed.split(1)
    shared = {"gate_first": False, "approximate": approximate, "dtype": dtype}
    if u is None:
        with device_of(x), without_autocast(x):
            noise = Noise(dropout_p, seed=seeds[0])
            u = kernels.gated_mixing(x, *of_patches, axis=2, eps=eps1, noise=noise, **shared)
    shared["dropout_p"] = dropout_p
    want_first = any(wanted[:9])
    du, *gradients = gated_mixing_backward(
        kernels, dy, u, *of_features, axis=3, eps=eps2, seed=seeds[1], wanted=(want_first, *wanted[9:]), **shared
    )
    first = (None,) * 9
    if want_first:
        first = gated_mixing_backward(
            kernels, du, x, *of_patches, axis=2, eps=eps1, seed=seeds[0], wanted=wanted[:9], **shared
        )
    return *first, *gradients


def _gate_gradients(
    kernels: RelativesKernels, ds, dh, h, gamma, beta, w, b, eps, dtype, wanted
) -> tuple[Gradients, Tensor]:
    """Gradients of ``gamma, beta, w, b``, and s again; writes ``dh``, the gradient of h."""
    want_h, want_gamma, want_beta, want_w, want_b = wanted
    gate, dgate = h.chunk(2, 2)[1], dh.chunk(2, 2)[1]
    mean, rstd = kernels.row_statistics(gate, eps)
    ds = ds.to(dtype)
    dv, s = kernels.spatial_gate_backward(ds, h, mean, rstd, gamma, beta, w, b, dh.chunk(2, 2)[0])
    dgamma = dbeta = dw = db = None
    if want_w or want_b:
        dw, db = kernels.mixer.weight_gradient(dv, gate, (mean, rstd, gamma, beta), noise=Noise())
    if want_h or want_gamma or want_beta:
        dn = w.to(dtype).t() @ dv
        _, _, dgamma, dbeta, _ = kernels.mixer.norm_backward(gate, dn, None, mean, rstd, gamma, beta, None, dx=dgate)
    return (dgamma, dbeta, dw, db), s


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
