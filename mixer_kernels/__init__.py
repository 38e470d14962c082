"""Fused MLP-Mixer kernels for PyTorch.

``fuse_`` lets the kernels compute the blocks of a model that exists, ``FusedMixerBlock`` drops into timm's models,
``FusedMixer`` is the whole model, ``functional`` has the kernels as functions. Importing this package needs no GPU, no
Triton and no timm, and does not initialise CUDA.
"""

from . import functional
from .adapters import MixerParts
from .backends import use_backend
from .freeze import freeze_, unfreeze_
from .models import FusedMixer
from .modules import FusedMixerBlock
from .patch import fuse_, unfuse_
from .report import Report

__version__ = "0.1.0"
__all__ = [
    "FusedMixer",
    "FusedMixerBlock",
    "MixerParts",
    "Report",
    "freeze_",
    "functional",
    "fuse_",
    "unfreeze_",
    "unfuse_",
    "use_backend",
    "__version__",
]
