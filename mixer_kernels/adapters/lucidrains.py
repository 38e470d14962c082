"""The blocks of lucidrains' ``mlp-mixer-pytorch``, for images and for videos.

A block is a pair of ``PreNormResidual``, each of which is half a Mixer block: its ``FeedForward`` has two pointwise
``Conv1d`` along the tokens, or two ``Linear`` along the channels.
"""

from __future__ import annotations

from mlp_mixer_pytorch import mlp_mixer_3d_pytorch, mlp_mixer_pytorch
from torch import Tensor, nn

from .. import coverage, functional
from ..functional import checks
from .base import Fused, Options


class _FusedPreNormResidual(Fused):
    submodules = frozenset({"norm", "fn"})

    def operator_on_cpu(self, x: Tensor) -> str | None:
        return None if checks.is_left_to_torch(x) else self.function(self)

    @staticmethod
    def function(block: nn.Module) -> str:
        dense1 = block._modules["fn"]._modules.get("0")  # in a third of the time of fn[0]
        return "token_mixing" if type(dense1) is nn.Conv1d else "channel_mixing"

    @staticmethod
    def why_not_covered(block: nn.Module) -> str | None:
        norm, feed_forward = block._modules["norm"], block._modules["fn"]
        if type(feed_forward) is not nn.Sequential or len(feed_forward) != 5:
            return f"fn is {type(feed_forward).__name__}, not a FeedForward"
        dense1, act, drop1, dense2, drop2 = feed_forward._modules.values()
        if coverage.approximate_of(act) is None:
            return f"fn has {type(act).__name__}, not GELU"
        for part in (feed_forward, act):
            if coverage.is_hooked(part):
                return "fn or a part of it has hooks or a replaced forward"
        if type(dense1) is nn.Conv1d:
            reason, channels = coverage.why_not_pointwise("fn", dense1, dense2), norm.normalized_shape[-1]
        else:
            reason, channels = coverage.why_not_linear("fn", dense1, dense2), dense1.in_features
        return (
            coverage.why_not_global_hooks()
            or reason
            or coverage.why_not_dropout("fn", drop1, drop2)
            or coverage.why_not_norm("norm", norm, channels)
        )

    @staticmethod
    def why_not_this_noise(block: nn.Module) -> str | None:
        return coverage.why_not_same_dropout(block.fn[2], block.fn[4])

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return (block.norm.weight,)

    def image_shape(self) -> tuple[int, ...]:
        dense1 = self.fn[0]
        tokens = dense1.in_channels if type(dense1) is nn.Conv1d else 1  # any number
        return tokens, self.norm.normalized_shape[0]

    def compute(self, x: Tensor, options: Options) -> Tensor:
        norm = self.norm
        dense1, act, drop, dense2, _ = self.fn
        arguments = {
            "eps": norm.eps,
            "approximate": coverage.approximate_of(act),
            "dropout_p": coverage.dropout_p_of(drop),
            "backend": options.backend,
            "packs": self.packs(),
        }
        if type(dense1) is nn.Linear:
            layers = (norm.weight, norm.bias, dense1.weight, dense1.bias, dense2.weight, dense2.bias)
            return functional.channel_mixing(x, *layers, memory=options.memory, **arguments)
        w1, w2 = dense1.weight.squeeze(2), dense2.weight.squeeze(2)  # a pointwise Conv1d's are [out, in, 1]
        return functional.token_mixing(x, norm.weight, norm.bias, w1, dense1.bias, w2, dense2.bias, **arguments)


class FusedPreNormResidual(_FusedPreNormResidual, mlp_mixer_pytorch.PreNormResidual):
    """Half a block of ``MLPMixer``."""


class FusedPreNormResidual3D(_FusedPreNormResidual, mlp_mixer_3d_pytorch.PreNormResidual):
    """Half a block of ``MLPMixer3D``."""


FUSED = (FusedPreNormResidual, FusedPreNormResidual3D)
