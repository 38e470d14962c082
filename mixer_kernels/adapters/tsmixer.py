"""What the time mixing and the feature mixing of TSMixer have in common, in darts and in neuralforecast.

Each is a block of its own, and a layer of the two, where both are plain, another: what is around them, such as static
covariates, runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from .. import functional
from ..coverage import (
    PLAIN_ACTIVATIONS,
    approximate_of,
    is_hooked,
    weight_and_bias,
    why_not_global_hooks,
    why_not_linear,
)
from ..functional import checks
from .base import Fused, Options
from .batch_norm import why_not_affine, why_not_statistics


class Mixing(Fused):
    """A block that mixes ``[batch, tokens, channels]`` along one axis."""

    mixes_features: ClassVar[bool]
    linear_names: ClassVar[tuple[str, ...]]
    """Of one layer along the tokens, or two along the channels."""
    dropout_names: ClassVar[tuple[str, ...]]
    layer_norms: ClassVar[tuple[type, ...]] = (nn.LayerNorm,)
    dropout_class: ClassVar[type] = nn.Dropout

    @staticmethod
    def norm_of(block: nn.Module) -> tuple[nn.Module, bool]:
        """The norm, and whether it comes first."""
        raise NotImplementedError

    @staticmethod
    def skip_of(block: nn.Module) -> nn.Module | None:
        """The residual's projection, if it has one."""
        return None

    @staticmethod
    def activation_of(block: nn.Module) -> dict[str, str] | None:
        """``activation`` and ``approximate`` for ``functional``; None for one that the kernels lack."""
        return {"activation": "relu"}

    @classmethod
    def is_batch_norm(cls, norm: nn.Module) -> bool:
        """Whether it is the library's BatchNorm."""
        return False

    @classmethod
    def affine(cls, norm: nn.Module, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        """Of that, in inference, ``[tokens, channels]``."""
        raise NotImplementedError

    @classmethod
    def function(cls, block: nn.Module) -> str:
        return "feature_mixing" if cls.mixes_features else "time_mixing"

    def operator_on_cpu(self, x: Tensor) -> str | None:
        name = self.function(self)
        if self.training and checks.is_small_to_train(name, x):
            return None
        return None if self.is_left_on_cpu(self, x) else name

    @classmethod
    def is_left_on_cpu(cls, block: nn.Module, x: Tensor) -> bool:
        """Whether ``auto`` leaves it: the map that is made in each call costs what a small call gains."""
        is_batch_norm = cls.is_batch_norm(cls.norm_of(block)[0])
        return is_batch_norm and (why_not_affine(x) is not None or checks.is_left_to_torch(x))

    @classmethod
    def why_not_covered(cls, block: nn.Module) -> str | None:
        for drop in cls._dropouts(block):
            if type(drop) is not cls.dropout_class or is_hooked(drop):
                return f"it has {type(drop).__name__}, not a plain {cls.dropout_class.__name__}"
        if cls.activation_of(block) is None:
            return "its activation is not a plain ReLU, GELU or SiLU"
        linears, skip = cls._linears(block), cls.skip_of(block)
        if skip is not None:
            linears.append(skip)
        return why_not_global_hooks() or why_not_linear("it", *linears) or cls._why_not_norm(block)

    @classmethod
    def _why_not_norm(cls, block: nn.Module) -> str | None:
        norm, norm_first = cls.norm_of(block)
        if is_hooked(norm):
            return "its norm has hooks or a replaced forward"
        is_batch_norm = cls.is_batch_norm(norm)
        if type(norm) not in cls.layer_norms and not is_batch_norm:
            return f"its norm is {type(norm).__name__}, not LayerNorm or BatchNorm"
        if not norm.eps > 0:
            return f"its norm has eps {norm.eps}"
        if is_batch_norm:
            return None
        shape, linears = norm.normalized_shape, cls._linears(block)
        if cls.mixes_features:
            expected = (shape[0], linears[0].in_features if norm_first else linears[-1].out_features)
        else:
            expected = (linears[0].in_features, shape[-1])
        return None if shape == expected else f"its norm normalises {shape}, not {expected}"

    @classmethod
    def why_not_this_noise(cls, block: nn.Module) -> str | None:
        if len({*map(cls.dropout_p, cls._dropouts(block))}) > 1:
            return "the dropouts have different probabilities or modes"
        norm, _ = cls.norm_of(block)
        return why_not_statistics(norm) if cls.is_batch_norm(norm) else None

    @classmethod
    def _linears(cls, block: nn.Module) -> list[nn.Module]:
        parts = block._modules
        return [parts[name] for name in cls.linear_names]

    @classmethod
    def _dropouts(cls, block: nn.Module) -> list[nn.Module]:
        parts = block._modules
        return [parts[name] for name in cls.dropout_names]

    @staticmethod
    def dropout_p(drop: nn.Module) -> float:
        """With what probability it drops right now."""
        return drop.p if drop.training else 0.0

    @classmethod
    def norms(cls, block: nn.Module) -> tuple[Tensor | None, ...]:
        return weight_and_bias(cls.norm_of(block)[0])[:1]

    def _why_not_input(self, x: Tensor) -> str | None:
        return super()._why_not_input(x) or self._why_not_folded(x)

    def _why_not_folded(self, x: Tensor) -> str | None:
        return why_not_affine(x) if self.is_batch_norm(self.norm_of(self)[0]) else None

    def image_shape(self) -> tuple[int, ...]:
        norm, mixed = self.norm_of(self)[0], self._linears(self)[0].in_features
        if self.is_batch_norm(norm):  # of one feature: then there may be any number
            others = max(norm.num_features // mixed, 1)
        else:
            others = norm.normalized_shape[0 if self.mixes_features else 1]
        return (others, mixed) if self.mixes_features else (mixed, others)

    def parameters_in_order(self, x: Tensor) -> list[Tensor | None]:
        """As the function takes them for ``x``."""
        (norm, norm_first), linears, more, channels = self.norm_of(self), self._linears(self), (), x.shape[-1]
        if self.mixes_features:
            skip = self.skip_of(self)
            more = (None, None) if skip is None else weight_and_bias(skip)
            channels = channels if norm_first else linears[-1].out_features
        affine = self.affine(norm, x.shape[1], channels) if self.is_batch_norm(norm) else weight_and_bias(norm)
        return [*affine, *[parameter for linear in linears for parameter in weight_and_bias(linear)], *more]

    def compute(self, x: Tensor, options: Options) -> Tensor:
        (norm, norm_first), packs = self.norm_of(self), self.packs()
        is_batch_norm = self.is_batch_norm(norm)
        y = getattr(functional, self.function(self))(
            x,
            *self.parameters_in_order(x),
            norm_first=norm_first,
            norm="affine" if is_batch_norm else "layer",
            eps=norm.eps,
            dropout_p=self.dropout_p(self._dropouts(self)[0]),
            memory=options.memory,
            backend=options.backend,
            packs=packs,
            **self.activation_of(self),
        )
        if not is_batch_norm:  # what is made for a call is not there in the next
            self.keep_call(packs, x, self._fused_options)
        return y


class Layer(Fused):
    """A layer, time mixing and then feature mixing, at once."""

    mixers: ClassVar[dict[str, type[Mixing]]]
    """What each of the two becomes, by name."""

    @staticmethod
    def function(layer: nn.Module) -> str:
        return "tsmixer_layer"

    def operator_on_cpu(self, x: Tensor) -> str | None:
        if self.training and checks.is_small_to_train("tsmixer_layer", x):
            return None
        known = [(mixer, fused) for mixer, fused in self._mixers(self) if isinstance(mixer, fused.original())]
        return None if any([fused.is_left_on_cpu(mixer, x) for mixer, fused in known]) else self.function(self)

    @classmethod
    def why_not_covered(cls, layer: nn.Module) -> str | None:
        for name, fused in cls.mixers.items():
            mixer = layer._modules.get(name)
            if type(mixer) not in (fused, fused.original()):
                return f"its {name} is a {type(mixer).__name__}, not a {fused.original().__name__}"
            if is_hooked(mixer):
                return f"its {name} has hooks or a replaced forward"
            reason = fused.why_not_covered(mixer)
            if reason:
                return f"of its {name}: {reason}"
        (time, of_time), (features, of_features) = cls._mixers(layer)
        if of_time.activation_of(time) != of_features.activation_of(features):
            return "its blocks have different activations"
        (norm1, first1), (norm2, first2) = of_time.norm_of(time), of_features.norm_of(features)
        if first1 != first2 or of_time.is_batch_norm(norm1) != of_features.is_batch_norm(norm2):
            return "its blocks have different norms"
        return None

    @classmethod
    def why_not_known(cls, layer: nn.Module) -> str | None:
        reason = super().why_not_known(layer) or cls.why_not_covered(layer)
        for mixer, fused in cls._mixers(layer) if reason is None else ():
            reason = reason or fused.why_not_known(mixer)
        return reason

    def parts(self) -> Iterable[nn.Module]:
        return [mixer for mixer, _ in self._mixers(self)]

    @classmethod
    def _mixers(cls, layer: nn.Module) -> list[tuple[nn.Module, type[Mixing]]]:
        parts = layer._modules
        return [(parts[name], fused) for name, fused in cls.mixers.items()]

    @classmethod
    def why_not_this_noise(cls, layer: nn.Module) -> str | None:
        mixers = cls._mixers(layer)
        if len({fused.dropout_p(drop) for mixer, fused in mixers for drop in fused._dropouts(mixer)}) > 1:
            return "the dropouts have different probabilities or modes"
        return next(filter(None, [fused.why_not_this_noise(mixer) for mixer, fused in mixers]), None)

    @classmethod
    def norms(cls, layer: nn.Module) -> tuple[Tensor | None, ...]:
        return tuple([fused.norms(mixer)[0] for mixer, fused in cls._mixers(layer)])

    def image_shape(self) -> tuple[int, ...]:
        time, features = [fused.image_shape(mixer) for mixer, fused in self._mixers(self)]
        return time[0], features[1]

    def _why_not_input(self, x: Tensor) -> str | None:
        for name in self.mixers:
            mixer = self._modules[name]
            if not isinstance(mixer, Fused) or mixer._fused_options != self._fused_options:
                return f"its {name} was not fused with it"
            reason = mixer._why_not_folded(x)
            if reason:
                return reason
        return super()._why_not_input(x)

    def compute(self, x: Tensor, options: Options) -> Tensor:
        time, features = self.parts()
        packs, (norm, norm_first) = self.packs(), time.norm_of(time)
        is_batch_norm = time.is_batch_norm(norm)
        y = functional.tsmixer_layer(
            x,
            *time.parameters_in_order(x),
            *features.parameters_in_order(x),
            norm_first=norm_first,
            norm="affine" if is_batch_norm else "layer",
            eps=(norm.eps, features.norm_of(features)[0].eps),
            dropout_p=time.dropout_p(time._dropouts(time)[0]),
            memory=options.memory,
            backend=options.backend,
            packs=packs,
            **time.activation_of(time),
        )
        if not is_batch_norm:
            self.keep_call(packs, x, self._fused_options)
        return y

    @classmethod
    def say_why(cls, reason: str) -> None:
        """Nothing: the blocks of the layer run one by one, and say why they compute eagerly if they do."""


def plain_activation(module: nn.Module) -> dict[str, str] | None:
    """A plain activation module's, for functional; None if the kernels lack it."""
    if is_hooked(module):
        return None
    approximate = approximate_of(module)
    if approximate is not None:
        return {"activation": "gelu", "approximate": approximate}
    return {"activation": PLAIN_ACTIVATIONS[type(module)]} if type(module) in PLAIN_ACTIVATIONS else None
