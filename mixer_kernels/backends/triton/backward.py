"""The Triton kernels of the backward pass, as ``backends.backward`` takes them."""

from __future__ import annotations

from functools import cache, partial

from ...tuning.configs import MAX_FUSED_TOKENS
from ..backward import Kernels
from ..relatives import RelativesKernels
from .branch_gradient import branch_gradient
from .channel_backward import channel_products_backward, recomputed_hidden
from .gated_mixing_backward import gated_mixing_again, gated_mixing_gradients
from .hidden_units import hidden_gelu, hidden_gelu_backward
from .norm_backward import norm_backward
from .row_statistics import row_statistics
from .token_data_gradient import token_data_gradient
from .token_linear import spatial_gate_backward, token_linear_data_gradient
from .token_products_backward import token_products_backward
from .token_weight_gradients import weight_gradient


@cache  # functions and a word, no tensor
def kernels_with(precision: str) -> Kernels:
    """All of them with ``precision``, tl.dot's input_precision."""
    return Kernels(
        MAX_FUSED_TOKENS,
        branch_gradient,
        partial(token_data_gradient, precision=precision),
        partial(token_products_backward, precision=precision),
        partial(weight_gradient, precision=precision),
        partial(channel_products_backward, precision=precision),
        norm_backward,
    )


@cache  # likewise
def relatives_kernels_with(precision: str) -> RelativesKernels:
    """Those of the relatives, likewise."""
    return RelativesKernels(
        kernels_with(precision),
        row_statistics,
        partial(recomputed_hidden, precision=precision),
        partial(token_linear_data_gradient, precision=precision),
        partial(spatial_gate_backward, precision=precision),
        hidden_gelu,
        hidden_gelu_backward,
        partial(gated_mixing_gradients, precision=precision),
        partial(gated_mixing_again, precision=precision),
    )
