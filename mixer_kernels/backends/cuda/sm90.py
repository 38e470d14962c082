"""The ``cuda:sm90`` backend: ``cuda`` with the kernels of csrc/sm90 for all tensors that they take.

For what those do not take, and for all other steps, the kernels are those of ``cuda``.
"""

from __future__ import annotations

from functools import partial

from . import (
    branch_gradient,
    channel_products_backward,
    has,
    norm_backward,
    token_products_backward,
    weight_gradient,
)
from . import channel_backward_weights as _channel_backward_weights
from . import channel_mixing_forward as _channel_mixing_forward
from . import mixer_block_forward as _mixer_block_forward
from . import mixer_block_plan as _mixer_block_plan
from . import token_backward_weights as _token_backward_weights
from . import token_mixing_forward as _token_mixing_forward
from .library import why_not_sm90 as why_not
from .prepack import Packing

token_mixing_forward = partial(_token_mixing_forward, sm90=True)
channel_mixing_forward = partial(_channel_mixing_forward, sm90=True)
mixer_block_forward = partial(_mixer_block_forward, sm90=True)
mixer_block_plan = partial(_mixer_block_plan, sm90=True)
token_backward_weights = partial(_token_backward_weights, sm90=True)
channel_backward_weights = partial(_channel_backward_weights, sm90=True)
