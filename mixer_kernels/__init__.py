"""Fused MLP-Mixer kernels: Mixer blocks at the speed of their matrix products.

``fuse_`` lets the kernels compute the blocks of a model that exists, ``FusedMixerBlock`` drops into timm's models,
``FusedMixer`` is the whole model, ``functional`` has the kernels as functions. Importing this package needs no GPU, no
Triton and no timm, and does not initialise CUDA.
"""

from . import functional
from .backends import use_backend
from .models import FusedMixer
from .modules import FusedMixerBlock
from .patch import Report, fuse_, unfuse_

__version__ = "0.1.0"
__all__ = [
    "FusedMixer",
    "FusedMixerBlock",
    "Report",
    "functional",
    "fuse_",
    "unfuse_",
    "use_backend",
    "__version__",
]
