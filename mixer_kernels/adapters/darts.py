"""The blocks of darts' TSMixerModel: of its layers, and those in front of them that mix the features of covariates."""

from __future__ import annotations

from darts.models.components import layer_norm_variants
from darts.models.forecasting.tsmixer_model import (
    TimeBatchNorm2d,
    _ConditionalMixerLayer,
    _FeatureMixing,
    _TimeMixing,
)
from darts.utils.torch import MonteCarloDropout
from torch import Tensor, nn

from .batch_norm import affine_of
from .tsmixer import Layer, Mixing, plain_activation


class DartsMixing(Mixing):
    """With one of darts' norms, before or after, and its Monte Carlo dropout, which inference may switch on."""

    layer_norms = (nn.LayerNorm, layer_norm_variants.LayerNorm, layer_norm_variants.LayerNormNoBias)
    dropout_class = MonteCarloDropout

    @staticmethod
    def norm_of(block: nn.Module) -> tuple[nn.Module, bool]:
        parts = block._modules
        before = parts["norm_before"]
        return (parts["norm_after"], False) if type(before) is nn.Identity else (before, True)

    @staticmethod
    def activation_of(block: nn.Module) -> dict[str, str] | None:
        activation = block._modules.get("activation")  # darts takes a function as well
        return None if activation is None else plain_activation(activation)

    @classmethod
    def is_batch_norm(cls, norm: nn.Module) -> bool:
        return type(norm) is TimeBatchNorm2d

    @classmethod
    def affine(cls, norm: nn.Module, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        gamma, beta = affine_of(norm)  # one number each
        return gamma.expand(tokens, channels), beta.expand(tokens, channels)

    @staticmethod
    def dropout_p(drop: nn.Module) -> float:
        return drop.p if drop.mc_dropout_enabled else 0.0


class FusedTimeMixing(DartsMixing, _TimeMixing):
    """Mixes the time steps of each channel."""

    submodules = frozenset({"norm_before", "activation", "dropout", "fc1", "norm_after"})
    mixes_features = False
    linear_names = ("fc1",)
    dropout_names = ("dropout",)


class FusedFeatureMixing(DartsMixing, _FeatureMixing):
    """Mixes the channels of each time step."""

    submodules = frozenset(
        {"projection", "norm_before", "fc1", "activation", "dropout1", "fc2", "dropout2", "norm_after"}
    )
    mixes_features = True
    linear_names = ("fc1", "fc2")
    dropout_names = ("dropout1", "dropout2")

    @staticmethod
    def skip_of(block: nn.Module) -> nn.Module | None:
        skip = block._modules["projection"]
        return None if type(skip) is nn.Identity else skip


class FusedConditionalMixerLayer(Layer, _ConditionalMixerLayer):
    """Both, where there are no static covariates."""

    submodules = frozenset({"time_mixing", "feature_mixing"})
    optional_submodules = frozenset({"feature_mixing_static"})
    inputs_of_forward = 2
    mixers = {"time_mixing": FusedTimeMixing, "feature_mixing": FusedFeatureMixing}

    @classmethod
    def why_not_covered(cls, layer: nn.Module) -> str | None:
        if layer.feature_mixing_static is not None:
            return "it has static covariates"
        return super().why_not_covered(layer)

    def forward(self, x: Tensor, x_static: Tensor | None = None) -> Tensor:
        if self.feature_mixing_static is not None:
            return _ConditionalMixerLayer.forward(self, x, x_static)
        return super().forward(x)

    def own_forward(self, x: Tensor) -> Tensor:
        return _ConditionalMixerLayer.forward(self, x, None)


FUSED = (FusedTimeMixing, FusedFeatureMixing, FusedConditionalMixerLayer)
