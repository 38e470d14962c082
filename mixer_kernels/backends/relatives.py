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

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import AffineLinear, FeatureMixer, GatedHalf, Half, Norm, Options, SpatialGate, TimeMixer
from .backward import Gradients, Pass
from .new_tensors import new_like
from .protocol import Backend


def token_linear_backward(given: Pass, linear: AffineLinear) -> Gradients:
    """Of ``x, alpha, beta, w, b, scale``."""
    backend, du, _, x, options, wanted = given
    want_x, want_alpha, want_beta, want_w, want_b, want_scale = wanted
    w = linear.w
    alpha, beta, b, scale = (
        None if t is None else t.float() for t in (linear.alpha, linear.beta, linear.b, linear.scale)
    )
    dx = dalpha = dbeta = dw = db = dscale = None
    if want_x or want_alpha or want_beta or want_scale:
        dx, of_vx, of_v = backend.token_linear_data_gradient(du, x, w, _times(alpha, scale), options)
        dalpha, dbeta = _times(of_vx, scale), _times(of_v, scale)
        dscale = _times(of_vx, alpha) if beta is None else _times(of_vx, alpha) + beta * of_v
    if want_w or want_b or (want_scale and b is not None):
        g = backend.branch_gradient(du, options)
    if want_b or (want_scale and b is not None):
        over_images = g.sum(0, dtype=torch.float32)  # [S, C]
        db = over_images.sum(1) if scale is None else over_images @ scale
        if want_scale and b is not None:
            dscale = dscale + b @ over_images
    if want_w:
        # The products take scale * n: brought near 1, since LayerScale starts at 1e-6, below float16's numbers.
        unit = None if scale is None else scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        relative = None if scale is None else scale / unit
        norm = Norm(None, None, _times(alpha, relative), None if beta is None else _times(beta, relative))
        dw = _times(backend.weight_gradient(g, x, norm, options)[0], unit)
    return dx, dalpha, dbeta, dw, db, dscale


def spatial_gating_backward(given: Pass, gate: SpatialGate) -> Gradients:
    """Of ``h, gamma, beta, w, b``."""
    backend, ds, _, h, options, wanted = given
    dh = new_like(h)
    gradients, _ = _gate_gradients(backend, ds, dh, h, gate, options, wanted)
    return dh, *gradients


def gated_channel_mixing_backward(
    given: Pass, half: Half, gate: SpatialGate, gate_eps: float, keep_z: bool = True
) -> Gradients:
    """Of x and both parts' parameters. Kept are mean, rstd and z, which is recomputed if it is None."""
    backend, dy, (mean, rstd, z), x, options, wanted = given
    want_x, want_gamma, want_beta, want_w1, want_b1, want_w2, want_b2 = wanted[:7]
    want_first, want_gate = want_x or want_gamma or want_beta or want_w1 or want_b1, wanted[7:]
    norm, tokens = Norm(mean, rstd, half.gamma, half.beta), x.shape[1]
    dx = dgamma = dbeta = dw1 = db1 = dw2 = db2 = None
    gate_gradients = (None,) * 4
    g = backend.branch_gradient(dy, options)
    if want_first or want_w2 or any(want_gate):
        if z is None:
            z = backend.channel_hidden(x, norm, half, options)
        h = backend.hidden_gelu(z, tokens, options).unflatten(0, (-1, tokens))
        dh = torch.empty_like(h)
        ds = g @ half.w_out.to(options.dtype)
        of_gate = options._replace(eps=gate_eps)
        gate_gradients, s = _gate_gradients(backend, ds, dh, h, gate, of_gate, (want_first, *want_gate))
        if want_w2:
            dw2 = g.flatten(0, 1).t() @ s.flatten(0, 1)
        del h, s
    if want_first:
        dz, db1 = backend.hidden_gelu_backward(dh.flatten(0, 1), z, tokens, options)
        del dh
        n_dtype = options.dtype if want_w1 else None
        dx, n, dgamma, dbeta, db2 = backend.norm_backward(x, dz @ half.w_in.to(options.dtype), dy, norm, n_dtype)
        if n is not None:
            dw1 = dz.t() @ n.flatten(0, 1)
    if want_b2 and (db2 is None or options.noise):
        db2 = g.sum((0, 1), dtype=torch.float32)
    return dx, dgamma, dbeta, dw1, db1, dw2, db2, *gate_gradients


def gated_mixing_backward(given: Pass, half: GatedHalf, axis: int, gate_first: bool) -> Gradients:
    """Of x and the eight parameters; everything is computed again from x."""
    backend, dy, _, x, options, wanted = given
    if backend.has("gated_mixing_backward"):  # as one call
        return backend.gated_mixing_backward(dy, x, half, options, wanted, axis, gate_first)
    rows = x.flatten(0, 1)
    statistics = (None, None) if options.norm == "affine" else backend.row_statistics(rows, options.eps)
    norm = Norm(*statistics, half.gamma, half.beta)
    of = backend.gated_mixing_gradients(
        dy, rows.view(x.shape), norm, half, options, axis, gate_first, of_weights=any(wanted[3:])
    )
    dw1, dw2, dw_gate = (
        g.t() @ operand if want else None
        for want, g, operand in zip(wanted[3::2], (of.z, of.out, of.logits), (of.v, of.a, of.gated), strict=True)
    )
    dx = dgamma = dbeta = None
    if any(wanted[:3]):
        dx, _, dgamma, dbeta, _ = backend.norm_backward(rows, of.n, dy, norm)
        dx = dx.view(x.shape)
    return dx, dgamma, dbeta, dw1, of.b1, dw2, of.b2, dw_gate, of.b_gate


def gated_mixer_layer_backward(
    given: Pass, patches: GatedHalf, features: GatedHalf, eps2: float, keep_u: bool = True
) -> Gradients:
    """Of x and the parameters of both mixers. Kept is u, which is recomputed if it is None."""
    backend, dy, (u,), x, options, wanted = given
    want_first = any(wanted[:9])
    if backend.has("gated_mixer_layer_backward"):
        return backend.gated_mixer_layer_backward(dy, u, x, patches, features, options, wanted, eps2)
    first, second = halves_of_layer(options, eps2)
    if u is None:
        u = backend.gated_mixing_forward(x, patches, first, axis=2, gate_first=False)
    of_second = Pass(backend, dy, (), u, second, (want_first, *wanted[9:]))
    du, *gradients = gated_mixing_backward(of_second, features, axis=3, gate_first=False)
    if not want_first:
        return *(None,) * 9, *gradients
    of_first = Pass(backend, du, (), x, first, wanted[:9])
    return *gated_mixing_backward(of_first, patches, axis=2, gate_first=False), *gradients


def time_mixing_backward(given: Pass, mixer: TimeMixer, norm_first: bool, keep_z: bool = True) -> Gradients:
    """Of ``x, gamma, beta, w, b``. Kept is z, which is recomputed if it is None."""
    backend, dy, (z,), x, options, wanted = given
    return backend.time_mixing_backward(dy, z, x, mixer, options, wanted, norm_first)


def feature_mixing_backward(given: Pass, mixer: FeatureMixer, norm_first: bool, keep_z: bool = True) -> Gradients:
    """Of x and the eight parameters. Kept are z and what a last norm takes, which are recomputed if they are None."""
    backend, dy, kept, x, options, wanted = given
    return backend.feature_mixing_backward(dy, tuple(kept), x, mixer, options, wanted, norm_first)


def tsmixer_layer_backward(
    given: Pass, time: TimeMixer, features: FeatureMixer, eps2: float, norm_first: bool, keep_z: bool = True
) -> Gradients:
    """Of x and the parameters of both mixers. Kept are u and what they keep, which is recomputed where it is None."""
    backend, dy, (u, z, *kept), x, options, wanted = given
    first, second = halves_of_layer(options, eps2)
    if u is None:
        u, _ = backend.time_mixing_forward(x, time, first, norm_first)
    wanted_of_features = (any(wanted[:5]), *wanted[5:])
    du, *gradients = backend.feature_mixing_backward(
        dy, tuple(kept), u, features, second, wanted_of_features, norm_first
    )
    if du is None:
        return *(None,) * 5, *gradients
    return *backend.time_mixing_backward(du, z, x, time, first, wanted[:5], norm_first), *gradients


def halves_of_layer(options: Options, eps2: float) -> tuple[Options, Options]:
    """The options of a layer's two mixers: each has its own eps, and its own seed."""
    seeds = (None, None) if options.seed is None else options.seed.split(1)
    return options._replace(seed=seeds[0]), options._replace(seed=seeds[1], eps=eps2)


def _gate_gradients(
    backend: Backend, ds: Tensor, dh: Tensor, h: Tensor, gate: SpatialGate, options: Options, wanted: Sequence[bool]
) -> tuple[Gradients, Tensor]:
    """Gradients of the gate's parameters, and s again; writes ``dh``, the gradient of h."""
    want_h, want_gamma, want_beta, want_w, want_b = wanted
    options = options.without_noise()
    (_, h2), (dh1, dh2) = h.chunk(2, 2), dh.chunk(2, 2)
    norm = Norm(*backend.row_statistics(h2, options.eps), gate.gamma, gate.beta)
    dv, s = backend.spatial_gate_backward(ds.to(options.dtype), h, norm, gate, dh1, options)
    dgamma = dbeta = dw = db = None
    if want_w or want_b:
        dw, db = backend.weight_gradient(dv, h2, norm, options)
    if want_h or want_gamma or want_beta:
        dn = gate.w.to(options.dtype).t() @ dv
        _, _, dgamma, dbeta, _ = backend.norm_backward(h2, dn, None, norm, dx=dh2)
    return (dgamma, dbeta, dw, db), s


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
