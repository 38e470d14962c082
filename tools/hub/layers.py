"""Layers without state, whose ``forward`` takes the place of another class's."""

from __future__ import annotations

from torch import Tensor, nn

from .mixer_kernels.modules import FusedMixerBlock


class MixerBlock(nn.Module):
    """timm's ``MixerBlock``, ``x [B, S, C] -> [B, S, C]``; eager, with a warning, where the kernels do not cover it."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, x: Tensor) -> Tensor:
        return FusedMixerBlock.forward(self, x)


__all__ = ["MixerBlock"]
