"""The blocks of Hugging Face's PatchTSMixer."""

from __future__ import annotations

from transformers.models.patchtsmixer import modeling_patchtsmixer as library

from .time_series import ChannelMixing, FeatureMixing, Layer, PatchMixing

PARTS = (library.PatchTSMixerNormLayer, library.PatchTSMixerMLP, library.PatchTSMixerGatedAttention)


class FusedFeatureMixerBlock(FeatureMixing, library.FeatureMixerBlock):
    """``feature_mixer`` of a ``PatchTSMixerLayer``."""

    classes_of_parts = PARTS


class FusedPatchMixerBlock(PatchMixing, library.PatchMixerBlock):
    """``patch_mixer`` of a ``PatchTSMixerLayer``."""

    classes_of_parts = PARTS


class FusedPatchTSMixerChannelFeatureMixerBlock(ChannelMixing, library.PatchTSMixerChannelFeatureMixerBlock):
    """``channel_feature_mixer`` of a ``PatchTSMixerLayer``."""

    classes_of_parts = PARTS


class FusedPatchTSMixerLayer(Layer, library.PatchTSMixerLayer):
    """A layer of the model."""

    mixers = {"patch_mixer": FusedPatchMixerBlock, "feature_mixer": FusedFeatureMixerBlock}


FUSED = (
    FusedFeatureMixerBlock,
    FusedPatchMixerBlock,
    FusedPatchTSMixerChannelFeatureMixerBlock,
    FusedPatchTSMixerLayer,
)
