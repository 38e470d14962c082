"""The ``cuda:sm90`` backend: ``cuda`` with the kernels of csrc/sm90 for all tensors that they take.

For what those do not take, and for all other steps, the kernels are those of ``cuda``.
"""

from __future__ import annotations

from functools import partial

from . import (
    branch_gradient,
    channel_backward_weights,
    channel_mixing_forward,
    channel_products_backward,
    has,
    mixer_block_forward,
    mixer_block_plan,
    norm_backward,
    token_backward_weights,
    token_mixing_forward,
    token_products_backward,
    weight_gradient,
)
from .library import why_not_sm90 as why_not
from .prepack import Packing

token_mixing_forward = partial(token_mixing_forward, sm90=True)
channel_mixing_forward = partial(channel_mixing_forward, sm90=True)
mixer_block_forward = partial(mixer_block_forward, sm90=True)
mixer_block_plan = partial(mixer_block_plan, sm90=True)
token_backward_weights = partial(token_backward_weights, sm90=True)
channel_backward_weights = partial(channel_backward_weights, sm90=True)
