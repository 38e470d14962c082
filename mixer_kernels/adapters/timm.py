"""The blocks of timm's ``mlp_mixer.py``: those of MLP-Mixer and gMixer, of ResMLP, of gMLP."""

from __future__ import annotations

from timm.layers import GatedMlp
from timm.models.mlp_mixer import Affine, MixerBlock, ResBlock, SpatialGatingBlock, SpatialGatingUnit
from torch import Tensor, nn

from .. import coverage, functional, modules
from ..freeze import kept
from .base import Fused, Options


class FusedMixerBlock(Fused, MixerBlock):
    """MLP-Mixer's block, with ``Mlp``, or gMixer's, with ``GluMlp``."""

    submodules = frozenset({"norm1", "mlp_tokens", "drop_path", "norm2", "mlp_channels"})
    why_not_covered = staticmethod(coverage.why_not_covered)
    why_not_this_noise = staticmethod(coverage.why_not_this_noise)

    @staticmethod
    def function(block: nn.Module) -> str:
        return "mixer_block"

    operator_on_cpu = modules.operator_on_cpu

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return block.norm1.weight, block.norm2.weight

    image_shape = modules.image_shape

    def compute(self, x: Tensor, options: Options) -> Tensor:
        backend, memory = options
        return modules.fused(self, x, memory=memory, backend=backend, packs=self.packs(), options=self._fused_options)


def _why_not_this_noise(block: nn.Module) -> str | None:
    """Of a block with one MLP."""
    mlp = block.mlp_channels
    return coverage.why_not_same_dropout(mlp.drop1, mlp.drop2) or coverage.why_not_rescaled(block.drop_path)


class FusedResBlock(Fused, ResBlock):
    """ResMLP's block: affine maps for norms, one linear layer along the tokens, LayerScale."""

    submodules = frozenset({"norm1", "linear_tokens", "drop_path", "norm2", "mlp_channels"})
    parameters_of_its_own = frozenset({"ls1", "ls2"})

    @staticmethod
    def function(block: nn.Module) -> str:
        return "token_linear, channel_mixing"

    @staticmethod
    def why_not_covered(block: nn.Module) -> str | None:
        parts = block._modules
        for name in ("norm1", "norm2"):
            if type(parts[name]) is not Affine:
                return f"{name} is {type(parts[name]).__name__}, not Affine"
            if coverage.is_hooked(parts[name]):
                return f"{name} has hooks or a replaced forward"
        return (
            coverage.why_not_global_hooks()
            or coverage.why_not_linear("linear_tokens", parts["linear_tokens"])
            or coverage.why_not_mlp("mlp_channels", parts["mlp_channels"])
            or coverage.why_not_drop_path(parts["drop_path"])
        )

    why_not_this_noise = staticmethod(_why_not_this_noise)

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return block.norm1.alpha, block.norm2.alpha

    def image_shape(self) -> tuple[int, ...]:
        return self.linear_tokens.in_features, self.mlp_channels.fc1.in_features

    def compute(self, x: Tensor, options: Options) -> Tensor:
        norm1, linear, norm2, mlp = self.norm1, self.linear_tokens, self.norm2, self.mlp_channels
        drop_path_p, packs = coverage.drop_path_p_of(self.drop_path), self.packs()
        u = functional.token_linear(
            x,
            *(norm1.alpha.flatten(), norm1.beta.flatten(), linear.weight, linear.bias, self.ls1),
            drop_path_p=drop_path_p,
            backend=options.backend,
            packs=packs,
        )
        w4, b4, scale = mlp.fc2.weight, mlp.fc2.bias, self.ls2
        scaled_w4 = kept(packs, "ls2 * w4", lambda: scale[:, None] * w4)
        scaled_b4 = None if b4 is None else kept(packs, "ls2 * b4", lambda: scale * b4)
        return functional.channel_mixing(
            u,
            *(norm2.alpha.flatten(), norm2.beta.flatten(), mlp.fc1.weight, mlp.fc1.bias, scaled_w4, scaled_b4),
            norm="affine",
            dropout_p=coverage.dropout_p_of(mlp.drop1),
            drop_path_p=drop_path_p,
            memory=options.memory,
            backend=options.backend,
            packs=packs,
            **coverage.activation_of(mlp),
        )


class FusedSpatialGatingBlock(Fused, SpatialGatingBlock):
    """gMLP's block: a channel MLP with a spatial gating unit between its products."""

    submodules = frozenset({"norm", "mlp_channels", "drop_path"})

    @staticmethod
    def function(block: nn.Module) -> str:
        return "gated_channel_mixing"

    @staticmethod
    def why_not_covered(block: nn.Module) -> str | None:
        parts = block._modules
        mlp = parts["mlp_channels"]
        if type(mlp) is not GatedMlp:
            return f"mlp_channels is {type(mlp).__name__}, not GatedMlp"
        gate = mlp._modules["gate"]
        if type(gate) is not SpatialGatingUnit:
            return f"mlp_channels has {type(gate).__name__}, not SpatialGatingUnit"
        if coverage.is_hooked(gate):
            return "mlp_channels.gate has hooks or a replaced forward"
        return (
            coverage.why_not_global_hooks()
            or coverage.why_not_layers("mlp_channels", mlp)
            or coverage.why_not_norm("norm", parts["norm"], mlp.fc1.in_features)
            or coverage.why_not_norm("mlp_channels.gate.norm", gate.norm, mlp.fc1.out_features // 2)
            or coverage.why_not_linear("mlp_channels.gate", gate.proj)
            or coverage.why_not_drop_path(parts["drop_path"])
        )

    why_not_this_noise = staticmethod(_why_not_this_noise)

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return block.norm.weight, block.mlp_channels.gate.norm.weight

    def image_shape(self) -> tuple[int, ...]:
        mlp = self.mlp_channels
        return mlp.gate.proj.in_features, mlp.fc1.in_features

    def compute(self, x: Tensor, options: Options) -> Tensor:
        norm, mlp = self.norm, self.mlp_channels
        gate = mlp.gate
        return functional.gated_channel_mixing(
            x,
            *(norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias),
            *(gate.norm.weight, gate.norm.bias, gate.proj.weight, gate.proj.bias),
            *(mlp.fc2.weight, mlp.fc2.bias),
            eps=norm.eps,
            gate_eps=gate.norm.eps,
            approximate=coverage.activation_of(mlp)["approximate"],
            dropout_p=coverage.dropout_p_of(mlp.drop1),
            drop_path_p=coverage.drop_path_p_of(self.drop_path),
            memory=options.memory,
            backend=options.backend,
            packs=self.packs(),
        )


FUSED = (FusedMixerBlock, FusedResBlock, FusedSpatialGatingBlock)
