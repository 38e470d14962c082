"""The blocks of IBM's TinyTimeMixer (granite-tsfm)."""

from __future__ import annotations

from tsfm_public.models.tinytimemixer import modeling_tinytimemixer as library

from .time_series import fused_classes

FUSED = fused_classes(library, "TinyTimeMixer", __name__)
globals().update({cls._defined_as: cls for cls in FUSED})  # where pickle looks for them
