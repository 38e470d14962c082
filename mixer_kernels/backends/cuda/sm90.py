"""The ``cuda:sm90`` backend: ``cuda`` with the kernels of csrc/sm90 for all tensors that they take.

TMA, wgmma and warp specialisation, for compute capability 9.0. For what they do not take (``library.sm90_takes`` says
which tensors they do) and for all other steps the kernels are those of ``cuda``.
"""

from __future__ import annotations

from functools import partial

from . import backward_kernels as _backward_kernels
from . import channel_mixing_forward as _channel_mixing_forward
from . import mixer_block_forward as _mixer_block_forward
from . import token_mixing_forward as _token_mixing_forward
from .library import why_not_sm90 as why_not
from .prepack import Packing

__all__ = [
    "Packing",
    "backward_kernels",
    "channel_mixing_forward",
    "mixer_block_forward",
    "token_mixing_forward",
    "why_not",
]

token_mixing_forward = partial(_token_mixing_forward, sm90=True)
channel_mixing_forward = partial(_channel_mixing_forward, sm90=True)
mixer_block_forward = partial(_mixer_block_forward, sm90=True)
backward_kernels = partial(_backward_kernels, sm90=True)
