"""The blocks of IBM's TSPulse (granite-tsfm)."""

from __future__ import annotations

from tsfm_public.models.tspulse import modeling_tspulse as library

from .time_series import fused_classes

FUSED = fused_classes(library, "TSPulse", __name__)
globals().update({cls._defined_as: cls for cls in FUSED})  # where pickle looks for them
