"""What the blocks of PatchTSMixer, TinyTimeMixer and TSPulse have in common: one repeats the classes of the other.

A layer mixes features, patches and, in "mix_channel" mode, the channels of the series, each in a block of its own: a
LayerNorm, an MLP and, if the configuration says so, a gate that multiplies by the softmax of a linear layer.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .. import functional
from ..modules import (
    dropout_p_of,
    is_hooked,
    why_not_dropout,
    why_not_global_hooks,
    why_not_linear,
    why_not_norm,
    why_not_same_dropout,
)
from .base import Fused, Options


class Mixing(Fused):
    """A block that mixes ``[batch, channels, patches, features]`` along one axis."""

    dimensions = 4
    submodules = frozenset({"norm", "mlp"})
    optional_submodules = frozenset({"gating_block"})
    axis: ClassVar[int]
    gate_first: ClassVar[bool] = False
    classes_of_parts: ClassVar[tuple[type, type, type]]
    """The library's norm, MLP and gate."""

    @staticmethod
    def function(block: nn.Module) -> str:
        return "gated_mixing"

    @classmethod
    def why_not_covered(cls, block: nn.Module) -> str | None:
        norm, mlp = block.norm, block.mlp
        gate = block.gating_block if block.gated_attn else None
        if getattr(block, "self_attn", False):
            return "it has self-attention"
        for part, expected in zip((norm, mlp, gate), cls.classes_of_parts, strict=True):
            if part is not None and type(part) is not expected:
                return f"it has {type(part).__name__}, not {expected.__name__}"
            if part is not None and is_hooked(part):
                return f"its {expected.__name__} has hooks or a replaced forward"
        if type(norm.norm) is not nn.LayerNorm:
            return f"its norm is {type(norm.norm).__name__}, not LayerNorm"
        features = mlp.fc1.in_features if cls.axis == -1 else norm.norm.normalized_shape[-1]
        return (
            why_not_global_hooks()
            or why_not_norm("norm", norm.norm, features)
            or why_not_linear("mlp", mlp.fc1, mlp.fc2)
            or why_not_dropout("mlp", mlp.dropout1, mlp.dropout2)
            or (None if gate is None else why_not_softmax(gate) or why_not_linear("gating_block", gate.attn_layer))
        )

    @staticmethod
    def why_not_this_noise(block: nn.Module) -> str | None:
        return why_not_same_dropout(block.mlp.dropout1, block.mlp.dropout2)

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return (block.norm.norm.weight,)

    def compute(self, x: Tensor, options: Options) -> Tensor:
        norm, fc1, fc2 = self.norm.norm, self.mlp.fc1, self.mlp.fc2
        gate = self.gating_block.attn_layer if self.gated_attn else None
        return functional.gated_mixing(
            x,
            *(norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
            *((None, None) if gate is None else (gate.weight, gate.bias)),
            axis=self.axis,
            gate_first=self.gate_first,
            eps=norm.eps,
            dropout_p=dropout_p_of(self.mlp.dropout1),
            backend=options.backend,
        )


class FeatureMixing(Mixing):
    """Mixes the features of each patch."""

    axis = -1


class PatchMixing(Mixing):
    """Mixes the patches of each feature."""

    axis = -2
    optional_submodules = frozenset({"gating_block", "self_attn_layer", "norm_attn"})


class ChannelMixing(Mixing):
    """Mixes the channels of the series."""

    axis = -3
    gate_first = True


def why_not_softmax(gate: nn.Module) -> str | None:
    """Why a gate does not multiply by the softmax of ``attn_layer`` over the last dimension."""
    if getattr(gate, "mode", "softmax") != "softmax":
        return f"its gate is {gate.mode}, not softmax"
    if getattr(gate, "use_reg_context", False):
        return "its gate depends on register tokens too"
    for name, part in gate._modules.items():
        if name != "attn_layer" and (type(part) is not nn.Softmax or part.dim != -1 or is_hooked(part)):
            return f"its gate has {type(part).__name__}, not a plain Softmax"
    return None
