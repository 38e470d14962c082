"""The blocks of PatchTSMixer, TinyTimeMixer and TSPulse: each library repeats the classes of the first.

A layer mixes, in "mix_channel" mode, the channels of the series, then patches, then features, each in a block of its
own: a LayerNorm, or a BatchNorm, which is an affine map in inference, an MLP and, if the configuration says so, a gate
that multiplies by the softmax of a linear layer, or by its sigmoid. The last two are one call where both are plain.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import functional
from ..coverage import (
    dropout_p_of,
    is_hooked,
    weight_and_bias,
    why_not_dropout,
    why_not_global_hooks,
    why_not_linear,
    why_not_norm,
    why_not_same_dropout,
)
from ..freeze import kept
from .base import Fused, Options
from .batch_norm import affine_of, why_not_affine, why_not_statistics


class Mixing(Fused):
    """A block that mixes ``[batch, channels, patches, features]`` along one axis."""

    dimensions = 4
    submodules = frozenset({"norm", "mlp"})
    optional_submodules = frozenset({"gating_block"})
    axis: ClassVar[int]
    gate_first: ClassVar[bool] = False
    classes_of_parts: ClassVar[tuple[type, type, type]]
    """The library's norm, MLP and gate."""
    batch_norm: ClassVar[type]
    """The library's other norm, in its norm."""

    @staticmethod
    def function(block: nn.Module) -> str:
        return "gated_mixing"

    def operator_on_cpu(self, x: Tensor) -> str | None:
        return None if _why_not_folded(x, self) else self.function(self)

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
        if type(norm.norm) not in (nn.LayerNorm, cls.batch_norm):
            return f"its norm is {type(norm.norm).__name__}, not LayerNorm or BatchNorm"
        features = mlp.fc1.in_features if cls.axis == -1 else _features(block)
        return (
            why_not_global_hooks()
            or (_why_not_batch_norm if is_batch_norm(block) else why_not_norm)("norm", _norm(block), features)
            or ("its norm has hooks or a replaced forward" if is_hooked(norm.norm) else None)
            or why_not_linear("mlp", mlp.fc1, mlp.fc2)
            or why_not_dropout("mlp", mlp.dropout1, mlp.dropout2)
            or (None if gate is None else _why_not_gate(gate) or why_not_linear("gating_block", gate.attn_layer))
        )

    @staticmethod
    def why_not_this_noise(block: nn.Module) -> str | None:
        return why_not_same_dropout(*_dropouts(block)) or _why_not_these_statistics(block)

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return weight_and_bias(_norm(block))[:1]

    def _why_not_input(self, x: Tensor) -> str | None:
        return super()._why_not_input(x) or _why_not_folded(x, self)

    def parameters_in_order(self, packs: dict[str, Tensor] | None) -> tuple[Tensor | None, ...]:
        """As ``functional.gated_mixing`` takes them; ``packs`` has what is made of them, of a frozen block."""
        parts = self._modules
        mlp, gate = parts["mlp"]._modules, (None, None)
        if self.gated_attn:
            gate = weight_and_bias(parts["gating_block"]._modules["attn_layer"])
        if self.is_grouped():
            of_groups = partial(_means_of_groups, groups=parts["gating_block"].groups)
            names = (f"gate {self.axis} {kind}" for kind in ("weight", "bias"))
            gate = [
                t if t is None else kept(packs, name, partial(of_groups, t))
                for name, t in zip(names, gate, strict=True)
            ]
        norm = _norm(self)
        affine = affine_of(norm) if is_batch_norm(self) else weight_and_bias(norm)
        return *affine, *weight_and_bias(mlp["fc1"]), *weight_and_bias(mlp["fc2"]), *gate

    def is_repeatable(self) -> bool:
        """Whether the function takes the parameters themselves: what is made for a call is not there in the next."""
        return not (self.is_grouped() or is_batch_norm(self))

    def is_grouped(self) -> bool:
        """Whether its gate is one for each group of elements."""
        return self.gated_attn and getattr(self._modules["gating_block"], "mode", None) == "group_sigmoid"

    def image_shape(self) -> tuple[int, ...]:
        shape = [1, 1, _features(self)]
        shape[self.axis] = self.mlp.fc1.in_features
        return tuple(shape)

    def compute(self, x: Tensor, options: Options) -> Tensor:
        packs = self.packs()
        y = functional.gated_mixing(
            x,
            *self.parameters_in_order(packs),
            axis=self.axis,
            gate_first=self.gate_first,
            gate=_gate(self),
            norm="affine" if is_batch_norm(self) else "layer",
            eps=_norm(self).eps,
            dropout_p=dropout_p_of(_dropouts(self)[0]),
            backend=options.backend,
            packs=packs,
        )
        if self.is_repeatable():
            self.keep_call(packs, x, self._fused_options)
        return y


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


class Layer(Fused):
    """A layer: its blocks that mix patches and features at once, behind the one that mixes channels."""

    dimensions = 4
    submodules = frozenset({"feature_mixer"})
    optional_submodules = frozenset({"patch_mixer", "channel_feature_mixer"})
    mixers: ClassVar[dict[str, type[Mixing]]]
    """``patch_mixer`` and ``feature_mixer``: what each becomes."""

    @staticmethod
    def function(layer: nn.Module) -> str:
        return "gated_mixer_layer"

    def operator_on_cpu(self, x: Tensor) -> str | None:
        return None if _why_not_folded(x, *self._mixers(self)) else self.function(self)

    @classmethod
    def why_not_covered(cls, layer: nn.Module) -> str | None:
        reason = why_not_global_hooks()
        if reason is not None:
            return reason
        for name, fused in cls.mixers.items():
            mixer = layer._modules.get(name)
            if mixer is None:
                return f"it has no {name}"
            if type(mixer) not in (fused, fused.original()):
                return f"its {name} is a {type(mixer).__name__}, not a {fused.original().__name__}"
            if is_hooked(mixer):
                return f"its {name} has hooks or a replaced forward"
            reason = fused.why_not_covered(mixer)
            if reason:
                return f"of its {name}: {reason}"
        gates = {_gate(mixer) for mixer in cls._mixers(layer) if mixer.gated_attn}
        if len(gates) > 1:
            return "its blocks have different gates"
        return "its blocks have different norms" if len({*map(is_batch_norm, cls._mixers(layer))}) > 1 else None

    def parts(self) -> Iterable[nn.Module]:
        """Not the mixer of channels, which is called as it is."""
        return self._mixers(self)

    @classmethod
    def why_not_known(cls, layer: nn.Module) -> str | None:
        reason = super().why_not_known(layer) or cls.why_not_covered(layer)
        for name, fused in cls.mixers.items():
            reason = reason or fused.why_not_known(getattr(layer, name))
        return reason

    @classmethod
    def why_not_this_noise(cls, layer: nn.Module) -> str | None:
        mixers = cls._mixers(layer)
        reason = why_not_same_dropout(*[dropout for mixer in mixers for dropout in _dropouts(mixer)])
        return reason or next(filter(None, map(_why_not_these_statistics, mixers)), None)

    @classmethod
    def norms(cls, layer: nn.Module) -> tuple[Tensor | None, ...]:
        return tuple([weight_and_bias(_norm(mixer))[0] for mixer in cls._mixers(layer)])

    @classmethod
    def _mixers(cls, layer: nn.Module) -> list[nn.Module]:
        parts = layer._modules
        return [parts[name] for name in cls.mixers]

    def image_shape(self) -> tuple[int, ...]:
        patches, features = (getattr(self, name).mlp.fc1.in_features for name in self.mixers)
        channels = self.channel_feature_mixer.mlp.fc1.in_features if self.mode == "mix_channel" else 1
        return channels, patches, features

    def compute(self, x: Tensor, options: Options) -> Tensor:
        if self.mode == "mix_channel":
            x = self.channel_feature_mixer(x)
        mixers, packs = self._mixers(self), self.packs()
        y = functional.gated_mixer_layer(
            x,
            *[parameter for mixer in mixers for parameter in mixer.parameters_in_order(packs)],
            gate=_gate(mixers[0] if mixers[0].gated_attn else mixers[1]),
            norm="affine" if is_batch_norm(mixers[0]) else "layer",
            eps=tuple([_norm(mixer).eps for mixer in mixers]),
            dropout_p=dropout_p_of(_dropouts(mixers[0])[0]),
            memory=options.memory,
            backend=options.backend,
            packs=packs,
        )
        if self.mode != "mix_channel" and all([mixer.is_repeatable() for mixer in mixers]):
            self.keep_call(packs, x, self._fused_options)
        return y

    def _why_not_input(self, x: Tensor) -> str | None:
        for name, mixer in zip(self.mixers, self._mixers(self), strict=True):
            if not isinstance(mixer, Fused) or mixer._fused_options != self._fused_options:
                return f"its {name} was not fused with it"
        return super()._why_not_input(x) or _why_not_folded(x, *self._mixers(self))

    @classmethod
    def say_why(cls, reason: str) -> None:
        """Nothing: the blocks of the layer run one by one, and say why they compute eagerly if they do."""


def fused_classes(library: ModuleType, prefix: str, module: str) -> tuple[type[Fused], ...]:
    """What the blocks of ``library`` become, whose classes have ``prefix`` in their names: classes of ``module``."""
    parts = tuple(getattr(library, prefix + name) for name in ("NormLayer", "MLP", "GatedAttention"))

    def of(mixin: type[Fused], original: str, **attributes: Any) -> type[Fused]:
        return type(f"Fused{original}", (mixin, getattr(library, original)), {"__module__": module, **attributes})

    known = {"classes_of_parts": parts, "batch_norm": getattr(library, f"{prefix}BatchNorm")}
    features = of(FeatureMixing, "FeatureMixerBlock", **known)
    patches = of(PatchMixing, "PatchMixerBlock", **known)
    channels = of(ChannelMixing, f"{prefix}ChannelFeatureMixerBlock", **known)
    layer = of(Layer, f"{prefix}Layer", mixers={"patch_mixer": patches, "feature_mixer": features})
    return features, patches, channels, layer


def _norm(mixer: nn.Module) -> nn.Module:
    """The LayerNorm or the BatchNorm1d."""
    norm = mixer._modules["norm"]._modules["norm"]
    return norm._modules.get("batchnorm", norm)


def is_batch_norm(mixer: nn.Module) -> bool:
    return "batchnorm" in mixer._modules["norm"]._modules["norm"]._modules


def _features(mixer: nn.Module) -> int:
    norm = _norm(mixer)
    return norm.num_features if is_batch_norm(mixer) else norm.normalized_shape[-1]


def _why_not_batch_norm(name: str, norm: nn.Module, features: int) -> str | None:
    if type(norm) is not nn.BatchNorm1d:
        return f"{name} is {type(norm).__name__}, not a plain BatchNorm1d"
    if norm.num_features != features or not norm.eps > 0:
        return f"{name} has {norm.num_features} features and eps {norm.eps}"
    return f"{name} has hooks or a replaced forward" if is_hooked(norm) else None


def _why_not_these_statistics(mixer: nn.Module) -> str | None:
    return why_not_statistics(_norm(mixer)) if is_batch_norm(mixer) else None


def _why_not_folded(x: Tensor, *mixers: nn.Module) -> str | None:
    reason = why_not_affine(x)
    return reason if reason and any(map(is_batch_norm, mixers)) else None


def _dropouts(mixer: nn.Module) -> tuple[nn.Module, nn.Module]:
    parts = mixer._modules["mlp"]._modules
    return parts["dropout1"], parts["dropout2"]


def _gate(mixer: nn.Module) -> str:
    """``gate`` of ``functional.gated_mixing``; what it is without a gate does not matter."""
    if not mixer.gated_attn:
        return "softmax"
    gate = mixer._modules["gating_block"]
    mode = getattr(gate, "mode", None)
    if mode is None:
        return "sigmoid" if any([type(part) is nn.Sigmoid for part in gate._modules.values()]) else "softmax"
    return "softmax" if mode == "softmax" else "sigmoid"


def _why_not_gate(gate: nn.Module) -> str | None:
    """Why a gate does not multiply by the softmax of ``attn_layer`` over the last dimension, or by the sigmoid."""
    if getattr(gate, "mode", "softmax") not in ("softmax", "sigmoid", "group_sigmoid"):
        return f"its gate is {gate.mode}, not softmax, sigmoid or group_sigmoid"
    if getattr(gate, "use_reg_context", False):
        return "its gate depends on register tokens too"
    for name, part in gate._modules.items():
        is_known = type(part) is nn.Sigmoid or (type(part) is nn.Softmax and part.dim == -1)
        if name != "attn_layer" and (not is_known or is_hooked(part)):
            return f"its gate has {type(part).__name__}, not a plain Softmax or Sigmoid"
    return None


def _means_of_groups(t: Tensor, groups: int) -> Tensor:
    """A linear layer whose outputs are each the mean of those of their group, of ``t``, weight or bias of one."""
    return (
        t.unflatten(0, (groups, -1)).mean(1, keepdim=True).expand(-1, t.shape[0] // groups, *t.shape[1:]).flatten(0, 1)
    )
