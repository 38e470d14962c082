"""Weights from where people have them: Google's ``.npz`` files, lucidrains' ``MLPMixer``, timm.

Every function returns a state_dict of ``FusedMixer``, whose keys are timm's. Keys and shapes are checked: what is
missing, left over or of another shape is a ValueError that names it. ``python -m mixer_kernels convert`` does the same
with files::

    state_dict = convert.from_google_npz("Mixer-B_16.npz")
    model = FusedMixer(**convert.model_arguments(state_dict, origin="google"))
    model.load_state_dict(state_dict)
"""

from .files import load_state_dict, save_state_dict
from .google import from_google_npz
from .layout import from_timm, model_arguments, to_timm
from .lucidrains import from_lucidrains
from .resize import resize_tokens

__all__ = [
    "from_google_npz",
    "from_lucidrains",
    "from_timm",
    "load_state_dict",
    "model_arguments",
    "resize_tokens",
    "save_state_dict",
    "to_timm",
]
