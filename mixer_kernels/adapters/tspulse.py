"""The blocks of IBM's TSPulse (granite-tsfm)."""

from __future__ import annotations

from tsfm_public.models.tspulse import modeling_tspulse as library

from .time_series import ChannelMixing, FeatureMixing, Layer, PatchMixing

PARTS = (library.TSPulseNormLayer, library.TSPulseMLP, library.TSPulseGatedAttention)


class FusedFeatureMixerBlock(FeatureMixing, library.FeatureMixerBlock):
    """``feature_mixer`` of a ``TSPulseLayer``."""

    classes_of_parts = PARTS


class FusedPatchMixerBlock(PatchMixing, library.PatchMixerBlock):
    """``patch_mixer`` of a ``TSPulseLayer``."""

    classes_of_parts = PARTS


class FusedTSPulseChannelFeatureMixerBlock(ChannelMixing, library.TSPulseChannelFeatureMixerBlock):
    """``channel_feature_mixer`` of a ``TSPulseLayer``."""

    classes_of_parts = PARTS


class FusedTSPulseLayer(Layer, library.TSPulseLayer):
    """A layer of the model."""

    mixers = {"patch_mixer": FusedPatchMixerBlock, "feature_mixer": FusedFeatureMixerBlock}


FUSED = (
    FusedFeatureMixerBlock,
    FusedPatchMixerBlock,
    FusedTSPulseChannelFeatureMixerBlock,
    FusedTSPulseLayer,
)
