"""The steps of the backward pass that choose among kernels."""

from __future__ import annotations

from torch import Tensor

from ...tuning.configs import MAX_FUSED_TOKENS
from ..arguments import Half, Norm, Options
from .token_data_gradient import token_data_gradient
from .token_products_backward import token_gradients_by_products


def token_backward_weights(x: Tensor, g: Tensor, norm: Norm, half: Half, options: Options) -> tuple[Tensor, Norm, Half]:
    """Each kernel has its weights packed by itself, from the half."""
    return half.w_in, norm, half


def channel_backward_weights(
    u: Tensor, z: Tensor | None, norm: Norm, half: Half, options: Options, want_n: bool
) -> tuple[Tensor, Norm, Half]:
    """The same of the channel half."""
    return half.w_in, norm, half


def token_products_backward(
    g: Tensor, x: Tensor, norm: Norm, half: Half, options: Options, want_a: bool, want_dz: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dn, a and dz by one kernel; SwiGLU's values, gates and gradients do not fit one, nor do many tokens: a and dz."""
    if x.shape[1] <= MAX_FUSED_TOKENS and not options.glu:
        return token_data_gradient(g, x, norm, half, options, want_a, want_dz)
    return None, *token_gradients_by_products(g, x, norm, half, options)
