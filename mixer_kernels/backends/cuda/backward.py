"""The CUDA kernels of the backward pass, as ``backends.backward`` takes them."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from ...tuning.configs import MAX_FUSED_TOKENS
from ...tuning.target import target_of
from ..backward import Kernels, NormGradients
from ..noise import Noise
from ..rounding import round_up
from .library import TYPES, layout, limits_of, loaded, noise_of, pointer, sm90_takes, stream_of
from .prepack import fc1_weights, float_vector, token_weights, transposed_weight


@cache
def backward_kernels(dtype: torch.dtype, sm90: bool | None = None) -> Kernels:
    """All of them: the same for every ``dtype`` of the products. ``sm90`` as for the forward pass."""
    return Kernels(
        MAX_FUSED_TOKENS,
        branch_gradient,
        partial(token_data_gradient, sm90=sm90),
        token_products_backward,
        weight_gradient,
        partial(channel_products_backward, sm90=sm90),
        norm_backward,
    )


def branch_gradient(dy: Tensor, noise: Noise, dtype: torch.dtype) -> Tensor:
    """The gradient of the branch ``[B, S, C]`` in ``dtype``; ``dy`` itself where it is just that."""
    if not noise.on_branch:
        return dy.to(dtype)
    g = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    loaded().branch_gradient(
        pointer(dy), TYPES[dy.dtype], dy.shape, noise_of(noise), pointer(g), TYPES[dtype], stream_of(dy)
    )
    return g


def token_data_gradient(
    x: Tensor,
    g: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dn: Tensor,
    a: Tensor | None,
    dz: Tensor | None,
    *,
    approximate: str,
    dtype: torch.dtype,
    noise: Noise,
    sm90: bool | None,
) -> None:
    """Write ``dn [B, S, C]``, and ``a`` and ``dz`` ``[B, D_S, C]`` where they are wanted; S up to 256."""
    sm90 = sm90_takes(x, dtype, sm90, tokens=True) and sm90_takes(g, dtype, sm90, tokens=True)
    weights = token_weights(gamma, beta, w1, b1, w2, b2, dtype, sm90)
    if sm90:
        run, (padded_tokens, wide_hidden) = loaded().sm90_token_data_gradient, weights.w1.shape
        matrices = {"w1t": pointer(weights.w1), "w2": pointer(weights.w2)}
    else:
        run, (wide_hidden, padded_tokens) = loaded().token_data_gradient, weights.w1.shape
        w2t = transposed_weight(w2, dtype, wide_hidden, padded_tokens)
        matrices = {"w1": pointer(weights.w1), "w2t": pointer(w2t)}
    run(
        x=layout(x),
        size=x.shape,
        norm=(pointer(mean), pointer(rstd), pointer(weights.gamma), pointer(weights.beta)),
        type=TYPES[dtype],
        S_pad=padded_tokens,
        D=wide_hidden,
        D_S=w1.shape[0],
        g=pointer(g),
        b1=pointer(weights.b1),
        **matrices,
        noise=noise_of(noise),
        tanh=approximate == "tanh",
        device=limits_of(x),
        dn=pointer(dn),
        a=pointer(a),
        dz=pointer(dz),
        stream=stream_of(x),
    )


def token_products_backward(
    g: Tensor,
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
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """``(a, dz)`` ``[B, D_S, C]``, rows padded to 16 bytes, from ``g [B, S, C]``; z is recomputed."""
    z = token_hidden(x, mean, rstd, gamma, beta, w1, b1, w2, b2, dtype=g.dtype)
    return token_gelu_backward(g, w2, z, approximate=approximate, noise=noise)


def token_hidden(
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
    dtype: torch.dtype,
) -> Tensor:
    """z ``[B, D_S, C]``, rows padded to 16 bytes, of more than 256 tokens."""
    weights = token_weights(gamma, beta, w1, b1, w2, b2, dtype, sm90=False)
    batch_size, _, channels = x.shape
    z = torch.empty(batch_size, w1.shape[0], round_up(channels, 8), dtype=dtype, device=x.device)
    loaded().token_hidden(
        x=layout(x),
        size=x.shape,
        norm=(pointer(mean), pointer(rstd), pointer(weights.gamma), pointer(weights.beta)),
        type=TYPES[dtype],
        D_S=w1.shape[0],
        w1=pointer(weights.w1),
        b1=pointer(weights.b1),
        z=pointer(z),
        stream=stream_of(x),
    )
    return z[..., :channels]


def token_gelu_backward(g: Tensor, w2: Tensor, z: Tensor, *, approximate: str, noise: Noise) -> tuple[Tensor, Tensor]:
    """``(a, dz)``, strided like ``z``, from ``g [B, S, C]``, ``w2 [S, D_S]`` and ``z``, which dz overwrites."""
    batch_size, hidden, channels = z.shape
    a = torch.empty(batch_size, hidden, z.stride(1), dtype=z.dtype, device=z.device)
    columns = round_up(w2.shape[0], loaded().K_MULTIPLE)
    w2t = transposed_weight(w2, g.dtype, hidden, columns)
    loaded().token_gelu_backward(
        size=g.shape,
        type=TYPES[g.dtype],
        D_S=hidden,
        g=pointer(g),
        w2t=pointer(w2t),
        z=pointer(z),
        noise=noise_of(noise),
        tanh=approximate == "tanh",
        a=pointer(a),
        dz=pointer(z),
        stream=stream_of(g),
    )
    return a[..., :channels], z


def weight_gradient(
    left: Tensor,
    right: Tensor,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
    *,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """A weight's and its bias's gradient, float32: ``(dW1 [D_S, S], db1 [D_S])`` from ``left`` dz, ``right`` x and
    ``norm`` (mean, rstd, gamma, beta); ``(dW2' [D_S, S], db2 [S])`` from ``left`` a, ``right`` g and no ``norm``."""
    hidden, tokens = left.shape[1], right.shape[1]
    splits = loaded().weight_gradient_splits(right.shape, hidden, target_of(left.device).multiprocessors)
    partial = torch.empty(splits, hidden, tokens, dtype=torch.float32, device=left.device)
    bias = torch.empty(splits, tokens if norm is None else hidden, dtype=torch.float32, device=left.device)
    if norm is not None:
        mean, rstd, gamma, beta = norm
        gamma, beta = float_vector(gamma), float_vector(beta)
        norm = (pointer(mean), pointer(rstd), pointer(gamma), pointer(beta))
    loaded().token_weight_gradient(
        size=right.shape,
        type=TYPES[left.dtype],
        D_S=hidden,
        left=pointer(left),
        C_left=left.stride(1),
        right=layout(right),
        norm=norm,
        noise=noise_of(noise),
        splits=splits,
        partial=pointer(partial),
        bias=pointer(bias),
        stream=stream_of(left),
    )
    return partial.sum(0), bias.sum(0)


def channel_products_backward(
    g: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    *,
    want_a: bool,
    approximate: str,
    noise: Noise,
    sm90: bool | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dz [M, D_C], a [M, D_C] or None, db3 [D_C] in float32)`` from ``g [B, S, C]``; ``z`` None: recompute it."""
    if z is None:
        z = channel_hidden(u, mean, rstd, gamma, beta, w3, b3, dtype=g.dtype, sm90=sm90)
    return channel_gelu_backward(g, w4, z, want_a=want_a, approximate=approximate, noise=noise, sm90=sm90)


def channel_hidden(
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    dtype: torch.dtype,
    sm90: bool | None,
) -> Tensor:
    """z ``[B * S, D_C]``, recomputed for the backward pass."""
    hidden = w3.shape[0]
    z = torch.empty(u.shape[0] * u.shape[1], round_up(hidden, 8), dtype=dtype, device=u.device)
    weights = fc1_weights(gamma, beta, w3, b3, dtype, folded=u.dtype is dtype)
    loaded().channel_hidden(
        u=layout(u),
        size=u.shape,
        weights=weights.arguments,
        type=TYPES[dtype],
        device=limits_of(u),
        sm90=sm90_takes(u, dtype, sm90),
        mean=pointer(mean),
        rstd=pointer(rstd),
        row=z.shape[1],
        z=pointer(z),
        stream=stream_of(u),
    )
    return z[:, :hidden]


def channel_gelu_backward(
    g: Tensor, w4: Tensor, z: Tensor, *, want_a: bool, approximate: str, noise: Noise, sm90: bool | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dz [M, D_C], a [M, D_C] or None, db3 [D_C] in float32)`` from ``g [B, S, C]`` and ``w4 [C, D_C]``."""
    rows, hidden = z.shape
    z = _aligned_rows(z)
    w4t = transposed_weight(w4, g.dtype, hidden, round_up(w4.shape[0], loaded().K_MULTIPLE))
    dz = torch.empty(rows, hidden, dtype=g.dtype, device=g.device)
    a = torch.empty_like(dz) if want_a else None
    sm90 = sm90_takes(g, g.dtype, sm90)
    tiles = loaded().sm90_gelu_backward_tiles(rows) if sm90 else loaded().gelu_backward_tiles(rows)
    sums = torch.empty(tiles, hidden, dtype=torch.float32, device=g.device)
    loaded().channel_gelu_backward(
        size=g.shape,
        type=TYPES[g.dtype],
        D_C=hidden,
        g=pointer(g),
        w4t=pointer(w4t),
        z=pointer(z),
        row=z.stride(0),
        noise=noise_of(noise),
        tanh=approximate == "tanh",
        device=limits_of(g),
        sm90=sm90,
        dz=pointer(dz),
        a=pointer(a),
        sums=pointer(sums),
        stream=stream_of(g),
    )
    return dz, a, sums.sum(0)


def norm_backward(
    x: Tensor,
    dn: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    n_dtype: torch.dtype | None,
) -> NormGradients:
    """``dx = dy + LayerNorm'(dn)``, the parameters' gradients, and n in ``n_dtype`` if one is given."""
    parts = loaded().norm_backward_parts(x.shape, target_of(x.device).multiprocessors)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = None if n_dtype is None else torch.empty(x.shape, dtype=n_dtype, device=x.device)
    sums = torch.empty(parts, 3, x.shape[2], dtype=torch.float32, device=x.device)
    dn, gamma, beta = dn.contiguous(), float_vector(gamma), float_vector(beta)
    loaded().norm_backward(
        x=layout(x),
        size=x.shape,
        norm=(pointer(mean), pointer(rstd), pointer(gamma), pointer(beta)),
        type=TYPES[dn.dtype],
        dn=pointer(dn),
        dy=pointer(dy),
        dx=pointer(dx),
        n=pointer(n),
        parts=parts,
        sums=pointer(sums),
        stream=stream_of(x),
    )
    # Each a tensor of its own: an operator's results may not share memory.
    return NormGradients(dx, n, *(sums[:, i].sum(0) for i in range(3)))


def _aligned_rows(z: Tensor) -> Tensor:
    """``z`` itself if its rows start on 16 bytes, as the forward pass has them; else a copy whose rows do."""
    if z.stride() == (round_up(z.shape[1], 8), 1) and z.data_ptr() % 16 == 0:
        return z
    wide = torch.empty(z.shape[0], round_up(z.shape[1], 8), dtype=z.dtype, device=z.device)[:, : z.shape[1]]
    return wide.copy_(z)
