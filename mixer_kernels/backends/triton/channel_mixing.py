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

from torch import Tensor

from ...tuning.configs import channel_product_config
from ...tuning.target import target_of
from ..arguments import Norm, Options
from ..new_tensors import aligned_rows, new_like, new_z
from . import channel_descriptors, channel_products
from .channel_epilogue import ChannelProduct
from .prepack import ProductWeights


def channel_mixing_products(
    u: Tensor, norm: Norm, first: ProductWeights, second: ProductWeights, options: Options, keep_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``y [B, S, C]``, contiguous, from ``u`` and packed weights; and z if ``keep_z``, as ``channel_hidden``'s."""
    a, z = channel_fc1(u, norm, first, options, keep_z)
    return channel_fc2(u, a, second, options), z


def channel_fc1(
    u: Tensor, norm: Norm, first: ProductWeights, options: Options, keep_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """a ``[B * S, D_C]``, rows aligned, and z if ``keep_z``, as ``channel_hidden``'s."""
    hidden = first.right.shape[0] // (1 + options.glu)
    a = aligned_rows(u.shape[0] * u.shape[1], hidden, options.dtype, u.device)
    z = new_z(u, first.right.shape[0], options) if keep_z else None
    _run(ChannelProduct(u, first, a, u, u.shape[2], options, is_fc1=True, z=z, norm=norm))
    return a, z


def channel_fc2(u: Tensor, a: Tensor, second: ProductWeights, options: Options) -> Tensor:
    """``y [B, S, C]``, contiguous, from ``u``, the residual, and ``a [B * S, D_C]``."""
    y = new_like(u)
    _run(ChannelProduct(a, second, y.flatten(0, 1), u, a.shape[1], options))
    return y


def channel_hidden(u: Tensor, norm: Norm, first: ProductWeights, options: Options) -> Tensor:
    """z ``[B * S, D_C]``, with SwiGLU ``[B * S, 2, D_C]``, recomputed for the backward pass."""
    z = new_z(u, first.right.shape[0], options)
    _run(ChannelProduct(u, first, None, u, u.shape[2], options.without_noise(), is_fc1=True, z=z, norm=norm))
    return z


def _run(product: ChannelProduct) -> None:
    target, options = target_of(product.u.device), product.options
    descriptors = channel_descriptors.fits(target, product.u, product.weights.right)
    config = channel_product_config(
        target, options.dtype, options.exact, product.is_fc1, product.K, descriptors,
        noise=options.noise, glu=product.is_glu,
    )  # fmt: skip
    if descriptors:
        channel_descriptors.run_product(config, product, target)
    else:
        channel_products.run_product(config, product)
