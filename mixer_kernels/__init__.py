"""Fused MLP-Mixer kernels: Mixer blocks at the speed of their matrix products.

``FusedMixerBlock`` drops into timm's models, ``FusedMixer`` is the whole model, ``functional`` has the kernels as
functions. Importing this package needs no GPU, no Triton and no timm, and does not initialise CUDA.
"""

from . import functional
from .backends import forget_packs, use_backend
from .models import FusedMixer
from .modules import FusedMixerBlock

__version__ = "0.1.0"
__all__ = ["FusedMixer", "FusedMixerBlock", "forget_packs", "functional", "use_backend", "__version__"]
