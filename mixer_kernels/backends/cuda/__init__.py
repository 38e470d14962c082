"""The ``cuda`` backend: kernels compiled by nvcc when the package was installed, for NVIDIA GPUs from sm_80 on.

No compiler runs at the first call. A whole block is two calls into ``mixer_kernels._C``: one launch that packs its
weights, five (six for more than 256 tokens) that compute it, on PyTorch's current stream, in memory from PyTorch's
allocator. The kernels are in csrc/.

On compute capability 9.0 there are kernels of that GPU's own instructions for the fused token half, forward and
backward, and for the channel products: those of csrc/sm90. Functions use them for the tensors that they take
(``library.sm90_takes``) where ``sm90`` is true, or None and they have passed on a GPU as they were built
(``library.sm90_by_default``); all else is for the kernels of every GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Half, Options
from ..devices import device_of
from ..new_tensors import new_like, new_statistics, new_z
from ..rounding import round_up
from .backward import (
    branch_gradient,
    channel_backward_weights,
    channel_products_backward,
    norm_backward,
    token_backward_weights,
    token_products_backward,
    weight_gradient,
)
from .block import mixer_block_forward, mixer_block_plan
from .library import TYPES, has, layout, limits_of, loaded, noise_of, pointer, sm90_takes, stream_of, why_not
from .prepack import Packing


def token_mixing_forward(
    x: Tensor, half: Half, options: Options, sm90: bool | None = None, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``u [B, S, C]``, contiguous, and mean and rstd ``[B * S]`` of ``x [B, S, C]``.

    ``packing`` as for ``mixer_block_forward``.
    """
    u = new_like(x)
    mean, rstd = new_statistics(x)
    if x.numel() == 0:
        return u, mean, rstd
    dtype = options.dtype
    with device_of(x):
        packing = packing or Packing(dtype)
        weights = packing.token(half, sm90_takes(x, dtype, sm90, tokens=True))
        a = None
        if not loaded().padded_tokens(x.shape[1]):  # two kernels, with a between them in memory
            a = torch.empty(x.shape[0], half.w_in.shape[0], round_up(x.shape[2], 8), dtype=dtype, device=x.device)
        loaded().token_mixing_forward(
            layout(x), x.shape, options.eps, weights, TYPES[dtype], options.tanh, noise_of(options), limits_of(x),
            pointer(mean), pointer(rstd), pointer(a), pointer(u), stream_of(x),
        )  # fmt: skip
    return u, mean, rstd


def channel_mixing_forward(
    u: Tensor,
    half: Half,
    options: Options,
    keep_z: bool = False,
    sm90: bool | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``y [B, S, C]``, contiguous, mean and rstd ``[B * S]`` of ``u [B, S, C]``, and z ``[B * S, D_C]`` if kept.

    ``packing`` as for ``mixer_block_forward``.
    """
    dtype = options.dtype
    y = new_like(u)
    mean, rstd = new_statistics(u)
    z = new_z(u, half.w_in.shape[0], options) if keep_z else None
    if u.numel() > 0:
        with device_of(u):
            packing = packing or Packing(dtype)
            first, second = packing.channel(half, folded=u.dtype is dtype)
            a = new_z(u, half.w_in.shape[0], options)
            loaded().channel_mixing_forward(
                layout(u), u.shape, options.eps, first, second, TYPES[dtype], options.tanh, noise_of(options),
                limits_of(u), sm90_takes(u, dtype, sm90), pointer(mean), pointer(rstd), pointer(a), pointer(z),
                a.stride(0), pointer(y), stream_of(u),
            )  # fmt: skip
    return y, mean, rstd, z
