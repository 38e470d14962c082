"""The blocks of neuralforecast's TSMixer and TSMixerx: of its layers, and those that mix exogenous variables."""

from __future__ import annotations

from neuralforecast.models import tsmixer, tsmixerx
from torch import Tensor, nn

from .batch_norm import affine_of
from .tsmixer import Layer, Mixing


class TemporalMixing(Mixing):
    """Of both models."""

    submodules = frozenset({"temporal_norm", "temporal_lin", "temporal_drop"})
    mixes_features = False
    linear_names = ("temporal_lin",)
    dropout_names = ("temporal_drop",)

    @staticmethod
    def norm_of(block: nn.Module) -> tuple[nn.Module, bool]:
        return block._modules["temporal_norm"], False


class FeatureMixing(Mixing):
    """Of both models."""

    submodules = frozenset({"feature_norm", "feature_lin_1", "feature_lin_2", "feature_drop_1", "feature_drop_2"})
    mixes_features = True
    linear_names = ("feature_lin_1", "feature_lin_2")
    dropout_names = ("feature_drop_1", "feature_drop_2")

    @staticmethod
    def norm_of(block: nn.Module) -> tuple[nn.Module, bool]:
        return block._modules["feature_norm"], False


class FusedTemporalMixing(TemporalMixing, tsmixer.TemporalMixing):
    """TSMixer's mixes the time steps of each series; BatchNorm first, over each element of a series."""

    @staticmethod
    def norm_of(block: nn.Module) -> tuple[nn.Module, bool]:
        return block._modules["temporal_norm"], True

    @classmethod
    def is_batch_norm(cls, norm: nn.Module) -> bool:
        return type(norm) is nn.BatchNorm1d

    @classmethod
    def affine(cls, norm: nn.Module, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        gamma, beta = affine_of(norm)
        return gamma.view(channels, tokens).t(), beta.view(channels, tokens).t()


class FusedFeatureMixing(FeatureMixing, tsmixer.FeatureMixing):
    """TSMixer's mixes the series of each time step; the same norm."""

    @staticmethod
    def norm_of(block: nn.Module) -> tuple[nn.Module, bool]:
        return block._modules["feature_norm"], True

    @classmethod
    def is_batch_norm(cls, norm: nn.Module) -> bool:
        return type(norm) is nn.BatchNorm1d

    @classmethod
    def affine(cls, norm: nn.Module, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        gamma, beta = affine_of(norm)
        return gamma.view(tokens, channels), beta.view(tokens, channels)


class FusedTemporalMixingX(TemporalMixing, tsmixerx.TemporalMixing):
    """TSMixerx's mixes the time steps of each channel."""


class FusedFeatureMixingX(FeatureMixing, tsmixerx.FeatureMixing):
    """TSMixerx's mixes the channels of each time step, and may make them more or fewer."""

    optional_submodules = frozenset({"project_residual"})

    @staticmethod
    def skip_of(block: nn.Module) -> nn.Module | None:
        return block._modules["project_residual"] if block.linear_project_residual else None


class FusedMixingLayer(Layer, tsmixer.MixingLayer):
    """TSMixer's layer."""

    submodules = frozenset({"temporal_mixer", "feature_mixer"})
    mixers = {"temporal_mixer": FusedTemporalMixing, "feature_mixer": FusedFeatureMixing}


class FusedMixingLayerX(Layer, tsmixerx.MixingLayer):
    """TSMixerx's layer; of one with static variables the blocks run one by one."""

    submodules = frozenset({"temporal_mixer", "feature_mixer"})
    mixers = {"temporal_mixer": FusedTemporalMixingX, "feature_mixer": FusedFeatureMixingX}


FUSED = (
    FusedTemporalMixing,
    FusedFeatureMixing,
    FusedMixingLayer,
    FusedTemporalMixingX,
    FusedFeatureMixingX,
    FusedMixingLayerX,
)
