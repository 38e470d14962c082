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
from .prepack import ChannelBackward, TokenBackward, channel_backward_weights, token_backward_weights


@cache  # functions, no tensor
def backward_kernels(dtype: torch.dtype, sm90: bool | None = None) -> Kernels:
    """All of them: the same for every ``dtype`` of the products. ``sm90`` as for the forward pass."""
    return Kernels(
        MAX_FUSED_TOKENS,
        branch_gradient,
        token_data_gradient,
        token_products_backward,
        weight_gradient,
        partial(channel_products_backward, sm90=sm90),
        norm_backward,
        partial(token_packs, sm90=sm90),
        channel_packs,
    )


def token_packs(
    x: Tensor,
    g: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    dtype: torch.dtype,
    *,
    sm90: bool | None,
) -> tuple[Tensor, dict[str, TokenBackward]]:
    """``w1`` for the plain product, and what all kernels of the half take as ``packs``."""
    sm90 = sm90_takes(x, dtype, sm90, tokens=True) and sm90_takes(g, dtype, sm90, tokens=True)
    w1, packs = token_backward_weights(gamma, beta, w1, b1, w2, dtype, sm90)
    return w1, {"packs": packs}


def channel_packs(
    u: Tensor,
    z: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    dtype: torch.dtype,
    norm: bool,
) -> tuple[Tensor, dict[str, ChannelBackward]]:
    """``w3`` for the plain product, and what all kernels of the half take as ``packs``."""
    w3, packs = channel_backward_weights(
        gamma, beta, w3, b3, w4, dtype, folded=u.dtype is dtype, keeps_z=z is not None, norm=norm
    )
    return w3, {"packs": packs}


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
    packs: TokenBackward,
) -> None:
    """Write ``dn [B, S, C]``, and ``a`` and ``dz`` ``[B, D_S, C]`` where they are wanted; S up to 256."""
    if packs.sm90:
        run, matrices = loaded().sm90_token_data_gradient, {"w1t": packs.w1, "w2": packs.w2}
    else:
        run, matrices = loaded().token_data_gradient, {"w1": packs.w1, "w2t": packs.w2}
    run(
        x=layout(x),
        size=x.shape,
        norm=(pointer(mean), pointer(rstd), packs.gamma, packs.beta),
        type=TYPES[dtype],
        S_pad=packs.padded_tokens,
        D=packs.wide_hidden,
        D_S=w1.shape[0],
        g=pointer(g),
        b1=packs.b1,
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
    packs: TokenBackward,
) -> tuple[Tensor, Tensor]:
    """``(a, dz)`` ``[B, D_S, C]``, rows padded to 16 bytes, from ``g [B, S, C]``; z is recomputed."""
    z = token_hidden(x, mean, rstd, w1, dtype=g.dtype, packs=packs)
    return token_gelu_backward(g, z, approximate=approximate, noise=noise, packs=packs)


def token_hidden(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w1: Tensor,
    *,
    dtype: torch.dtype,
    packs: TokenBackward,
) -> Tensor:
    """z ``[B, D_S, C]``, rows padded to 16 bytes, of more than 256 tokens."""
    batch_size, _, channels = x.shape
    z = torch.empty(batch_size, w1.shape[0], round_up(channels, 8), dtype=dtype, device=x.device)
    loaded().token_hidden(
        x=layout(x),
        size=x.shape,
        norm=(pointer(mean), pointer(rstd), packs.gamma, packs.beta),
        type=TYPES[dtype],
        D_S=w1.shape[0],
        w1=packs.w1,
        b1=packs.b1,
        z=pointer(z),
        stream=stream_of(x),
    )
    return z[..., :channels]


def token_gelu_backward(
    g: Tensor, z: Tensor, *, approximate: str, noise: Noise, packs: TokenBackward
) -> tuple[Tensor, Tensor]:
    """``(a, dz)``, strided like ``z``, from ``g [B, S, C]`` and ``z``, which dz overwrites."""
    batch_size, hidden, channels = z.shape
    a = torch.empty(batch_size, hidden, z.stride(1), dtype=z.dtype, device=z.device)
    loaded().token_gelu_backward(
        size=g.shape,
        type=TYPES[g.dtype],
        D_S=hidden,
        g=pointer(g),
        w2t=packs.w2,
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
    packs: TokenBackward,
) -> tuple[Tensor, Tensor]:
    """A weight's and its bias's gradient, float32: ``(dW1 [D_S, S], db1 [D_S])`` from ``left`` dz, ``right`` x and
    ``norm`` (mean, rstd, gamma, beta); ``(dW2' [D_S, S], db2 [S])`` from ``left`` a, ``right`` g and no ``norm``."""
    hidden, tokens = left.shape[1], right.shape[1]
    splits = loaded().weight_gradient_splits(right.shape, hidden, target_of(left.device).multiprocessors)
    partial = torch.empty(splits, hidden, tokens, dtype=torch.float32, device=left.device)
    bias = torch.empty(splits, tokens if norm is None else hidden, dtype=torch.float32, device=left.device)
    if norm is not None:
        mean, rstd, _, _ = norm
        norm = (pointer(mean), pointer(rstd), packs.gamma, packs.beta)
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
    packs: ChannelBackward,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dz [M, D_C], a [M, D_C] or None, db3 [D_C] in float32)`` from ``g [B, S, C]``; ``z`` None: recompute it."""
    if z is None:
        z = channel_hidden(u, mean, rstd, w3.shape[0], dtype=g.dtype, sm90=sm90, packs=packs)
    return channel_gelu_backward(g, z, want_a=want_a, approximate=approximate, noise=noise, sm90=sm90, packs=packs)


def channel_hidden(
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: int,
    *,
    dtype: torch.dtype,
    sm90: bool | None,
    packs: ChannelBackward,
) -> Tensor:
    """z ``[B * S, D_C]``, recomputed for the backward pass."""
    z = torch.empty(u.shape[0] * u.shape[1], round_up(hidden, 8), dtype=dtype, device=u.device)
    loaded().channel_hidden(
        u=layout(u),
        size=u.shape,
        weights=packs.first,
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
    g: Tensor,
    z: Tensor,
    *,
    want_a: bool,
    approximate: str,
    noise: Noise,
    sm90: bool | None,
    packs: ChannelBackward,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dz [M, D_C], a [M, D_C] or None, db3 [D_C] in float32)`` from ``g [B, S, C]`` and ``z [M, D_C]``."""
    rows, hidden = z.shape
    z = _aligned_rows(z)
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
        w4t=packs.w4,
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
    *,
    packs: TokenBackward | ChannelBackward,
) -> NormGradients:
    """``dx = dy + LayerNorm'(dn)``, the parameters' gradients, and n in ``n_dtype`` if one is given."""
    parts = loaded().norm_backward_parts(x.shape, target_of(x.device).multiprocessors)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = None if n_dtype is None else torch.empty(x.shape, dtype=n_dtype, device=x.device)
    sums = torch.empty(parts, 3, x.shape[2], dtype=torch.float32, device=x.device)
    dn = dn.contiguous()
    loaded().norm_backward(
        x=layout(x),
        size=x.shape,
        norm=(pointer(mean), pointer(rstd), packs.gamma, packs.beta),
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
