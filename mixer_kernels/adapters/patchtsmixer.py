"""The blocks of Hugging Face's PatchTSMixer."""

from __future__ import annotations

from transformers.models.patchtsmixer import modeling_patchtsmixer as library

from .time_series import fused_classes

FUSED = fused_classes(library, "PatchTSMixer", __name__)
globals().update({cls._defined_as: cls for cls in FUSED})  # where pickle looks for them
