"""The functional API: a Mixer block, ``mixer_block``, and its halves, ``token_mixing`` and ``channel_mixing``.

Shapes: ``x [B, S, C]`` (batch, tokens, channels); ``w1 [D_S, S]``, ``w2 [S, D_S]`` act on tokens;
``w3 [D_C, C]``, ``w4 [C, D_C]`` act on channels: the layout of ``nn.Linear.weight``. ``gamma``, ``beta`` ``[C]`` are
LayerNorm's weight and bias. ``gamma``, ``beta`` and the biases may be None.

Dtypes: float16, bfloat16, float32 (and float64 on the torch backend), the same for all tensors; under
``torch.autocast`` the products run in autocast's dtype and the result has ``x``'s dtype, as in eager PyTorch.
``x`` may have any strides. The result is a new tensor; nothing is written in place.

Gradients: the kernels have a backward pass, once differentiable; the torch backend any number of times.
``memory`` says what training keeps for it: "fast" the two inputs, the row statistics and the hidden units z of the
channel half; "min" the inputs and statistics only, z is recomputed (the torch backend keeps what autograd keeps).
None promises that no gradient will be asked for; ``mixer_block`` then raises if one is. Under ``torch.func`` and in
forward mode "auto" is the torch backend.

Dropout and stochastic depth are active where ``dropout_p`` or ``drop_path_p`` is above 0. Both draw from PyTorch's
generator of ``x``'s device. Which elements the kernels drop differs from what ``torch.nn.Dropout`` drops; how many
does not.

Errors, for all functions: ValueError for a wrong shape, device, ``eps``, ``approximate`` or ``backend``; TypeError for
a dtype or layout that is not supported or not the same for all tensors; RuntimeError when a backend that was asked for
by name cannot run here, which the kernels cannot while ``torch.func`` or forward mode differentiates.
"""

from .checks import ACTIVATIONS, APPROXIMATIONS, MEMORY_MODES, NORMS, SUPPORTED_DTYPES
from .mixer import channel_mixing, mixer_block, token_mixing
from .relatives import gated_channel_mixing, spatial_gating, token_linear
from .time_series import gated_mixer_layer, gated_mixing
from .tsmixer import feature_mixing, time_mixing, tsmixer_layer

__all__ = [
    "ACTIVATIONS",
    "APPROXIMATIONS",
    "MEMORY_MODES",
    "NORMS",
    "SUPPORTED_DTYPES",
    "channel_mixing",
    "feature_mixing",
    "gated_channel_mixing",
    "gated_mixer_layer",
    "gated_mixing",
    "mixer_block",
    "spatial_gating",
    "time_mixing",
    "token_linear",
    "token_mixing",
    "tsmixer_layer",
]
