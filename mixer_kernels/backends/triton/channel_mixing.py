"""Channel mixing as two products with everything else in their epilogues: equations (6) to (8) of docs/maths.md.

::

    fc1    a = GELU(LN(u) . W3' + b3)     [M, D_C]      M = B * S rows
    fc2    y = u + a . W4' + b4           [M, C]

LayerNorm costs fc1 no pass over ``u``. *Folded* (16-bit products of a 16-bit stream): the product takes ``u`` as it
is, with gamma in the weight, and the epilogue applies mean and rstd, equation (8). *Applied* (float32 products, or a
float32 stream): each tile of ``u`` is normalised as it is loaded. Folded, a mean of 30 standard deviations would cost
float32 four times eager's error, and rounding a float32 stream to 16 bits before the mean is gone would cost more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...tuning.configs import channel_product_config
from ...tuning.target import target_of
from ..noise import Noise
from ..rounding import round_up
from . import channel_descriptors, channel_products
from .channel_epilogue import ChannelProduct
from .prepack import FirstWeights


def channel_mixing_products(
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    first: FirstWeights,
    w4: Tensor,
    b4: Tensor | None,
    *,
    approximate: str,
    precision: str,
    noise: Noise,
    keep_z: bool,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor | None]:
    """``y [B, S, C]``, contiguous, from ``u``, its row statistics and packed weights; and z if ``keep_z``, as
    ``channel_hidden``'s."""
    shared = {"approximate": approximate, "precision": precision, "noise": noise}
    a, z = channel_fc1(u, mean, rstd, first, keep_z=keep_z, activation=activation, **shared)
    return channel_fc2(u, a, w4, b4, **shared), z


def channel_fc1(
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    first: FirstWeights,
    *,
    approximate: str,
    precision: str,
    noise: Noise,
    keep_z: bool,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor | None]:
    """a ``[B * S, D_C]``, rows aligned, and z if ``keep_z``, as ``channel_hidden``'s."""
    rows, gated, w3 = u.shape[0] * u.shape[1], activation == "swiglu", first.right
    a = aligned_rows(rows, w3.shape[0] // (1 + gated), w3.dtype, u.device)
    z = _empty_z(rows, w3, gated) if keep_z else None
    shared = {"approximate": approximate, "precision": precision, "noise": noise}
    _run(ChannelProduct(out=a, z=z, is_gated=gated, **_fc1(u, mean, rstd, first), **shared))
    return a, z


def channel_fc2(
    u: Tensor,
    a: Tensor,
    w4: Tensor,
    b4: Tensor | None,
    *,
    approximate: str,
    precision: str,
    noise: Noise,
) -> Tensor:
    """``y [B, S, C]``, contiguous, from ``u``, the residual, and ``a [B * S, D_C]``."""
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _run(
        ChannelProduct(
            left=a, right=w4, out=y.flatten(0, 1), u=u, K=a.shape[1], bias=b4, approximate=approximate,
            precision=precision, noise=noise,
        )
    )  # fmt: skip
    return y


def channel_hidden(
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    first: FirstWeights,
    *,
    precision: str,
    activation: str = "gelu",
) -> Tensor:
    """z ``[B * S, D_C]``, with SwiGLU ``[B * S, 2, D_C]``, recomputed for the backward pass."""
    gated = activation == "swiglu"
    z = _empty_z(u.shape[0] * u.shape[1], first.right, gated)
    _run(
        ChannelProduct(
            out=None, z=z, is_gated=gated, approximate="none", precision=precision, noise=Noise(),
            **_fc1(u, mean, rstd, first),
        )
    )  # fmt: skip
    return z


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, columns]`` whose rows start on 16 bytes, for wide loads and tensor descriptors."""
    return torch.empty(rows, round_up(columns, 16 // dtype.itemsize), dtype=dtype, device=device)[:, :columns]


def _empty_z(rows: int, w3: Tensor, gated: bool) -> Tensor:
    if not gated:
        return aligned_rows(rows, w3.shape[0], w3.dtype, w3.device)
    return aligned_rows(2 * rows, w3.shape[0] // 2, w3.dtype, w3.device).unflatten(0, (rows, 2))


def _fc1(u: Tensor, mean: Tensor | None, rstd: Tensor | None, first: FirstWeights) -> dict[str, Any]:
    """fc1's operands."""
    return {"left": u, "u": u, "K": u.shape[2], "is_fc1": True, "mean": mean, "rstd": rstd, **first._asdict()}


def _run(product: ChannelProduct) -> None:
    target = target_of(product.u.device)
    descriptors = channel_descriptors.fits(target, product.u, product.right)
    config = channel_product_config(
        target, product.dtype, product.precision == "ieee", product.is_fc1, product.K, descriptors,
        noise=product.noise.on_branch, gated=product.is_gated,
    )  # fmt: skip
    if descriptors:
        channel_descriptors.run_product(config, product, target)
    else:
        channel_products.run_product(config, product)
