"""For each model library the classes that ``fuse_`` gives to its blocks, one module per library; ``declared`` makes
those for the blocks of a user's own.

The module of a library is imported only once the library itself has been: no model has blocks of a library that is
not loaded.
"""

from __future__ import annotations

import importlib
import sys

from .base import Fused, Options
from .declared import Declared, MixerParts, declared_class

__all__ = ["Declared", "Fused", "MixerParts", "Options", "declared_class", "fused_classes"]

# Where blocks are defined, and the module here that knows them.
ORIGINS = {
    "timm.models.mlp_mixer": "timm",
    "mlp_mixer_pytorch.mlp_mixer_pytorch": "lucidrains",
    "transformers.models.patchtsmixer.modeling_patchtsmixer": "patchtsmixer",
    "tsfm_public.models.tinytimemixer.modeling_tinytimemixer": "tinytimemixer",
    "tsfm_public.models.tspulse.modeling_tspulse": "tspulse",
    "torch_geometric.nn.models.graph_mixer": "pyg",
    "sktime.libs.granite_ttm.modeling_tinytimemixer": "sktime",
    "darts.models.forecasting.tsmixer_model": "darts",
    "neuralforecast.models.tsmixer": "neuralforecast",
    "neuralforecast.models.tsmixerx": "neuralforecast",
}


def fused_classes() -> dict[type, type[Fused]]:
    """The class that each known class of blocks becomes, for the libraries that are loaded."""
    adapters = {adapter for origin, adapter in ORIGINS.items() if origin in sys.modules}
    modules = [importlib.import_module(f"{__name__}.{adapter}") for adapter in sorted(adapters)]
    return {cls.original(): cls for module in modules for cls in module.FUSED}
