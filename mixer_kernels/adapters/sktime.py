"""The blocks of TinyTimeMixer as sktime carries it, which are granite-tsfm's."""

from __future__ import annotations

from sktime.libs.granite_ttm import modeling_tinytimemixer as library

from .time_series import fused_classes

FUSED = fused_classes(library, "TinyTimeMixer", __name__)
globals().update({cls._defined_as: cls for cls in FUSED})  # where pickle looks for them
