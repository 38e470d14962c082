"""The torch.library operators ``mixer_kernels::*`` of the Mixer and its relatives, and their backward.

One operator per call of the functional API, so that ``torch.compile`` and ``torch.export`` see one node whatever the
backend does inside. Operators take tensors that ``functional`` has checked, the dtype of the products and the name of
a backend with kernels; they return new contiguous tensors.
"""

from .operators import (
    channel_mixing,
    channel_mixing_backward,
    gated_channel_mixing,
    gated_channel_mixing_backward,
    gated_mixer_layer,
    gated_mixer_layer_backward,
    gated_mixing,
    gated_mixing_backward,
    mixer_block,
    spatial_gating,
    spatial_gating_backward,
    token_linear,
    token_linear_backward,
    token_mixing,
    token_mixing_backward,
)
from .packed import KeptPacks, NewPacks, packed, packs_of, takes_packs

__all__ = [
    "KeptPacks",
    "NewPacks",
    "channel_mixing",
    "channel_mixing_backward",
    "gated_channel_mixing",
    "gated_channel_mixing_backward",
    "gated_mixer_layer",
    "gated_mixer_layer_backward",
    "gated_mixing",
    "gated_mixing_backward",
    "mixer_block",
    "packed",
    "packs_of",
    "spatial_gating",
    "spatial_gating_backward",
    "takes_packs",
    "token_linear",
    "token_linear_backward",
    "token_mixing",
    "token_mixing_backward",
]
