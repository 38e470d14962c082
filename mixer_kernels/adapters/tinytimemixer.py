"""The blocks of IBM's TinyTimeMixer (granite-tsfm)."""

from __future__ import annotations

from tsfm_public.models.tinytimemixer import modeling_tinytimemixer as library

from .time_series import ChannelMixing, FeatureMixing, Layer, PatchMixing

PARTS = (library.TinyTimeMixerNormLayer, library.TinyTimeMixerMLP, library.TinyTimeMixerGatedAttention)


class FusedFeatureMixerBlock(FeatureMixing, library.FeatureMixerBlock):
    """``feature_mixer`` of a ``TinyTimeMixerLayer``."""

    classes_of_parts = PARTS


class FusedPatchMixerBlock(PatchMixing, library.PatchMixerBlock):
    """``patch_mixer`` of a ``TinyTimeMixerLayer``."""

    classes_of_parts = PARTS


class FusedTinyTimeMixerChannelFeatureMixerBlock(ChannelMixing, library.TinyTimeMixerChannelFeatureMixerBlock):
    """``channel_feature_mixer`` of a ``TinyTimeMixerLayer``."""

    classes_of_parts = PARTS


class FusedTinyTimeMixerLayer(Layer, library.TinyTimeMixerLayer):
    """A layer of the model."""

    mixers = {"patch_mixer": FusedPatchMixerBlock, "feature_mixer": FusedFeatureMixerBlock}


FUSED = (
    FusedFeatureMixerBlock,
    FusedPatchMixerBlock,
    FusedTinyTimeMixerChannelFeatureMixerBlock,
    FusedTinyTimeMixerLayer,
)
