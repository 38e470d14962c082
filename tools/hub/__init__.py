"""Fused MLP-Mixer kernels: ``functional`` has them as functions, ``layers`` for models of timm, by ``kernelize``."""

from . import layers
from .mixer_kernels import functional, use_backend

__all__ = ["functional", "layers", "use_backend"]
