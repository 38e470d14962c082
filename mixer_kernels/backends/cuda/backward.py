"""The CUDA kernels of the backward pass, as ``backends.backward`` takes them.

Kernels take addresses: of the packs in ``weights``, and of all that is in ``norm``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tuning.target import target_of
from ..arguments import Half, Norm, NormGradients, Options
from ..new_tensors import aligned_rows, new_like, new_z
from ..rounding import round_up
from .library import TYPES, layout, limits_of, loaded, noise_of, pointer, sm90_takes, stream_of
from .prepack import ChannelBackward, TokenBackward, channel_backward_packs, token_backward_packs


def token_backward_weights(
    x: Tensor, g: Tensor, norm: Norm, half: Half, options: Options, sm90: bool | None = None
) -> tuple[Tensor, Norm, TokenBackward]:
    """One launch packs all that the kernels of the half take. ``sm90`` as for the forward pass."""
    dtype = options.dtype
    sm90 = sm90_takes(x, dtype, sm90, tokens=True) and sm90_takes(g, dtype, sm90, tokens=True)
    w1, packs = token_backward_packs(half, dtype, sm90)
    return w1, _addresses(norm, packs), packs


def channel_backward_weights(
    u: Tensor, z: Tensor | None, norm: Norm, half: Half, options: Options, want_n: bool, sm90: bool | None = None
) -> tuple[Tensor, Norm, ChannelBackward]:
    """The same of the channel half."""
    dtype = options.dtype
    w3, packs = channel_backward_packs(
        half, dtype, folded=u.dtype is dtype, keeps_z=z is not None, norm=want_n, sm90=sm90
    )
    return w3, _addresses(norm, packs), packs


def branch_gradient(dy: Tensor, options: Options) -> Tensor:
    """The gradient of the branch ``[B, S, C]``."""
    if not options.noise:
        return dy.to(options.dtype)
    g = torch.empty(dy.shape, dtype=options.dtype, device=dy.device)
    loaded().branch_gradient(
        pointer(dy), TYPES[dy.dtype], dy.shape, noise_of(options), pointer(g), TYPES[g.dtype], stream_of(dy)
    )
    return g


def token_products_backward(
    g: Tensor, x: Tensor, norm: Norm, weights: TokenBackward, options: Options, want_a: bool, want_dz: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dn, a and dz by one kernel; a and dz for more than 256 tokens."""
    if not loaded().padded_tokens(x.shape[1]):
        return None, *_token_gradients_by_products(g, x, norm, weights, options)
    (batch_size, tokens, channels), hidden = x.shape, weights.hidden
    dn, a, dz = (
        torch.empty(batch_size, extent, channels, dtype=options.dtype, device=x.device) if want else None
        for extent, want in ((tokens, True), (hidden, want_a), (hidden, want_dz))
    )
    if weights.sm90:
        run, matrices = loaded().sm90_token_data_gradient, {"w1t": weights.w1, "w2": weights.w2}
    else:
        run, matrices = loaded().token_data_gradient, {"w1": weights.w1, "w2t": weights.w2}
    run(
        x=layout(x), size=x.shape, norm=norm, type=TYPES[options.dtype], S_pad=weights.padded_tokens,
        D=weights.wide_hidden, D_S=hidden, g=pointer(g), b1=weights.b1, **matrices, noise=noise_of(options),
        tanh=options.tanh, device=limits_of(x), dn=pointer(dn), a=pointer(a), dz=pointer(dz), stream=stream_of(x),
    )  # fmt: skip
    return dn, a, dz


def _token_gradients_by_products(
    g: Tensor, x: Tensor, norm: Norm, weights: TokenBackward, options: Options
) -> tuple[Tensor, Tensor]:
    """a and dz ``[B, D_S, C]``, rows padded to 16 bytes; dz overwrites z, which is recomputed."""
    (batch_size, _, channels), hidden = x.shape, weights.hidden
    a, z = (
        torch.empty(batch_size, hidden, round_up(channels, 8), dtype=options.dtype, device=x.device) for _ in range(2)
    )
    loaded().token_hidden(
        x=layout(x), size=x.shape, norm=norm, type=TYPES[z.dtype], D_S=hidden, w1=weights.w1, b1=weights.b1,
        z=pointer(z), stream=stream_of(x),
    )  # fmt: skip
    loaded().token_gelu_backward(
        size=g.shape, type=TYPES[g.dtype], D_S=hidden, g=pointer(g), w2t=weights.w2, z=pointer(z),
        noise=noise_of(options), tanh=options.tanh, a=pointer(a), dz=pointer(z), stream=stream_of(g),
    )  # fmt: skip
    return a[..., :channels], z[..., :channels]


def weight_gradient(left: Tensor, right: Tensor, norm: Norm | None, options: Options) -> tuple[Tensor, Tensor]:
    """A weight's and its bias's gradient, float32: ``(dW1 [D_S, S], db1 [D_S])`` from ``left`` dz, ``right`` x and
    ``norm``; ``(dW2' [D_S, S], db2 [S])`` from ``left`` a, ``right`` g and no ``norm``."""
    hidden, tokens = left.shape[1], right.shape[1]
    splits = loaded().weight_gradient_splits(right.shape, hidden, target_of(left.device).multiprocessors)
    partial = torch.empty(splits, hidden, tokens, dtype=torch.float32, device=left.device)
    bias = torch.empty(splits, tokens if norm is None else hidden, dtype=torch.float32, device=left.device)
    loaded().token_weight_gradient(
        size=right.shape, type=TYPES[left.dtype], D_S=hidden, left=pointer(left), C_left=left.stride(1),
        right=layout(right), norm=norm, noise=noise_of(options), splits=splits, partial=pointer(partial),
        bias=pointer(bias), stream=stream_of(left),
    )  # fmt: skip
    return partial.sum(0), bias.sum(0)


def channel_products_backward(
    g: Tensor, u: Tensor, z: Tensor | None, norm: Norm, weights: ChannelBackward, options: Options, want_a: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dz [M, D_C], a [M, D_C] or None, db3 [D_C] in float32)`` from ``g [B, S, C]``; ``z`` None: recompute it."""
    if z is None:
        z = channel_hidden(u, norm, weights, options)
    rows, hidden = z.shape
    z = _aligned_rows(z)
    dz = torch.empty(rows, hidden, dtype=g.dtype, device=g.device)
    a = torch.empty_like(dz) if want_a else None
    sm90 = sm90_takes(g, g.dtype, weights.sm90)
    tiles = loaded().sm90_gelu_backward_tiles(rows) if sm90 else loaded().gelu_backward_tiles(rows)
    sums = torch.empty(tiles, hidden, dtype=torch.float32, device=g.device)
    loaded().channel_gelu_backward(
        size=g.shape, type=TYPES[g.dtype], D_C=hidden, g=pointer(g), w4t=weights.w4, z=pointer(z), row=z.stride(0),
        noise=noise_of(options), tanh=options.tanh, device=limits_of(g), sm90=sm90, dz=pointer(dz), a=pointer(a),
        sums=pointer(sums), stream=stream_of(g),
    )  # fmt: skip
    return dz, a, sums.sum(0)


def channel_hidden(u: Tensor, norm: Norm, weights: ChannelBackward, options: Options) -> Tensor:
    """z ``[B * S, D_C]``, recomputed for the backward pass."""
    z = new_z(u, weights.first.hidden, options)
    loaded().channel_hidden(
        u=layout(u), size=u.shape, weights=weights.first, type=TYPES[z.dtype], device=limits_of(u),
        sm90=sm90_takes(u, z.dtype, weights.sm90), mean=norm.mean, rstd=norm.rstd, row=z.stride(0), z=pointer(z),
        stream=stream_of(u),
    )  # fmt: skip
    return z


def norm_backward(x: Tensor, dn: Tensor, dy: Tensor, norm: Norm, n_dtype: torch.dtype | None = None) -> NormGradients:
    """``dx = dy + LayerNorm'(dn)``, the parameters' gradients, and n in ``n_dtype`` if one is given."""
    parts = loaded().norm_backward_parts(x.shape, target_of(x.device).multiprocessors)
    dx = new_like(x)
    n = None if n_dtype is None else torch.empty(x.shape, dtype=n_dtype, device=x.device)
    sums = torch.empty(parts, 3, x.shape[2], dtype=torch.float32, device=x.device)
    dn = dn.contiguous()
    loaded().norm_backward(
        x=layout(x), size=x.shape, norm=norm, type=TYPES[dn.dtype], dn=pointer(dn), dy=pointer(dy), dx=pointer(dx),
        n=pointer(n), parts=parts, sums=pointer(sums), stream=stream_of(x),
    )  # fmt: skip
    # Each a tensor of its own: an operator's results may not share memory.
    return NormGradients(dx, n, *(sums[:, i].sum(0) for i in range(3)))


def _addresses(norm: Norm, packs: TokenBackward | ChannelBackward) -> Norm:
    """gamma and beta are float32, packed."""
    return Norm(pointer(norm.mean), pointer(norm.rstd), packs.gamma, packs.beta)


def _aligned_rows(z: Tensor) -> Tensor:
    """``z`` itself if its rows start on 16 bytes, as the forward pass has them; else a copy whose rows do."""
    if z.stride() == (round_up(z.shape[1], 8), 1) and z.data_ptr() % 16 == 0:
        return z
    return aligned_rows(*z.shape, z.dtype, z.device).copy_(z)
