"""Blocks of a class of the user's own, of which ``MixerParts`` says what is what.

What such a block computes is its own code, which cannot be read off its parts: ``fuse_`` runs it once beside its
declaration (``verify``). What the block is made of then is kept, and where it differs later the block's own forward
runs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..coverage import (
    drop_path_p_of,
    dropout_p_of,
    is_hooked,
    weight_and_bias,
    why_not_drop_path,
    why_not_dropout,
    why_not_global_hooks,
    why_not_linear,
    why_not_norm,
    why_not_pointwise,
    why_not_rescaled,
)
from ..functional import checks
from ..snapshot import plain_attributes
from ..words import one_of
from . import verify
from .base import Fused, Options

_OF_TOKENS, _OF_CHANNELS = ("norm1", "fc1", "fc2"), ("norm2", "fc3", "fc4")
_DROPOUTS, _DROP_PATHS = ("drop1", "drop2", "drop3", "drop4"), ("drop_path1", "drop_path2")
_OF_MODULES = frozenset(nn.Module().__dict__)
_OF_FUSED = frozenset({"_fused_options", "_snapshot", "_last", "_frozen", "_checked"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerParts:
    """Says which submodule of your own block is what, for ``fuse_(model, blocks={MyBlock: MixerParts(...)})``.

    The block must compute, for ``x [B, S, C]``, what MLP-Mixer's block does::

        x = x + drop_path1(drop2(fc2(drop1(act(fc1(norm1(x).mT))))).mT)
        x = x + drop_path2(drop4(fc4(drop3(act(fc3(norm2(x)))))))

    or one of these two lines; then leave out the parts of the other. Each part is named by its dotted path in the
    block, as ``block.get_submodule`` takes it; the numbers are those of W1 to W4 in ``functional.mixer_block``. One
    submodule may be several parts, such as a LayerNorm for both halves.

    Args:
        norm1, norm2: LayerNorm over C.
        fc1, fc2: Linear along the tokens, ``[D_S, S]`` and ``[S, D_S]``, on a transposed tensor, or Conv1d with kernel
            size 1 on one that is not.
        fc3, fc4: Linear along the channels, ``[D_C, C]`` and ``[C, D_C]``, or Conv1d with kernel size 1.
        activation: "gelu", "relu", "silu" or "swiglu", the same in both halves; see ``functional.token_mixing``.
        approximate: "none" for the erf form of GELU, "tanh" for the tanh form.
        drop1, drop2, drop3, drop4: Dropout after the activation and after the second product of each half. All of
            them have the same probability, and a half has both or none. If the forward draws differently, or calls
            ``F.dropout``, leave them out: training then runs the block's own forward.
        drop_path1, drop_path2: stochastic depth of each half, timm's ``DropPath``, with one probability.

    Raises:
        ValueError: some parts of a half are missing; an unknown activation.
        TypeError: a path that is not a string.
    """

    norm1: str | None = None
    fc1: str | None = None
    fc2: str | None = None
    norm2: str | None = None
    fc3: str | None = None
    fc4: str | None = None
    activation: str = "gelu"
    approximate: str = "none"
    drop1: str | None = None
    drop2: str | None = None
    drop3: str | None = None
    drop4: str | None = None
    drop_path1: str | None = None
    drop_path2: str | None = None

    def __post_init__(self) -> None:
        one_of("activation", self.activation, checks.ACTIVATIONS)
        one_of("approximate", self.approximate, checks.APPROXIMATIONS)
        if self.activation != "gelu" and self.approximate != "none":
            raise ValueError(
                f"approximate={self.approximate!r} is a form of GELU, but activation is {self.activation!r}"
            )
        for name, path in self.paths():
            if not isinstance(path, str):
                raise TypeError(f"{name} must be a submodule's dotted path, a string, got {type(path).__name__}")
        for needed, more in (
            (_OF_TOKENS, ("drop1", "drop2", "drop_path1")),
            (_OF_CHANNELS, ("drop3", "drop4", "drop_path2")),
        ):
            given = [name for name in (*needed, *more) if getattr(self, name) is not None]
            missing = [name for name in needed if getattr(self, name) is None]
            if given and missing:
                raise ValueError(f"{', '.join(given)} given without {', '.join(missing)}")
        if self.fc1 is None and self.fc3 is None:
            raise ValueError(f"no parts are given: {', '.join(_OF_TOKENS)}, or {', '.join(_OF_CHANNELS)}, or all six")

    def paths(self, *names: str) -> Iterator[tuple[str, str]]:
        """Name and path of those of ``names``, by default of all parts, that are given."""
        for name in names or (*_OF_TOKENS, *_OF_CHANNELS, *_DROPOUTS, *_DROP_PATHS):
            path = getattr(self, name)
            if path is not None:
                yield name, path

    @property
    def function(self) -> str:
        """The function of ``functional`` that computes such a block."""
        if self.fc3 is None:
            return "token_mixing"
        return "channel_mixing" if self.fc1 is None else "mixer_block"


class Checked(NamedTuple):
    """What ``fuse_`` found out about a block by running it."""

    structure: dict[str, dict[str, Any]]
    """What the block was made of."""
    is_noise_declared: bool
    """Whether in training it draws nothing but what the declared parts draw."""


class Declared(Fused):
    """A block of which ``declaration`` says what is what."""

    declaration: ClassVar[MixerParts]
    _checked: Checked

    @classmethod
    def made_by(cls) -> tuple[Callable, tuple]:
        return _new, (cls.original(), cls.declaration)

    @classmethod
    def function(cls, block: nn.Module) -> str:
        return cls.declaration.function

    def operator_on_cpu(self, x: Tensor) -> str | None:
        if self.declaration.activation != "gelu" or checks.is_left_to_torch(x):
            return None
        return self.declaration.function

    @classmethod
    def why_left(cls, block: nn.Module) -> str | None:
        cls._check_paths(block)
        return cls.why_not_known(block) or cls._why_not_parts(block)

    @classmethod
    def checked_state(
        cls, block: nn.Module, name: str, before: Sequence[tuple[nn.Module, dict[str, Any]]]
    ) -> dict[str, Any]:
        if not cls.is_as_fused():  # FSDP's, which cannot be copied, and was checked before
            return {}
        structure = _structure(block, cls.declaration)
        for other, state in before:
            checked = state.get("_checked")
            if checked is not None and _are_equal(checked.structure, structure) and _are_alike(other, block):
                return state
        shape = _image_shape(block, cls.declaration)
        return {"_checked": Checked(structure, verify.run(block, cls.original(), cls, shape, name))}

    @classmethod
    def why_not_known(cls, block: nn.Module) -> str | None:
        name = cls.original().__name__
        if "forward" in block.__dict__:
            return "its forward was replaced"
        _, *inputs = inspect.signature(cls.original().forward).parameters.values()
        if len(inputs) != 1 or inputs[0].kind not in (inputs[0].POSITIONAL_ONLY, inputs[0].POSITIONAL_OR_KEYWORD):
            return f"{name}.forward takes more than x"
        if isinstance(block, Fused):
            return None
        own = {*dir(cls.original()), *block._modules, *block._parameters, *block._buffers, *block.__dict__}
        clash = sorted(_NAMES_OF_FUSED & own)
        return f"it has {clash[0]!r}, a name that fused blocks use: rename it" if clash else None

    @classmethod
    def why_not_covered(cls, block: nn.Module) -> str | None:
        changed = _difference(block._checked.structure, _structure(block, cls.declaration), block)
        if changed is not None:
            return f"{changed} is not what it was when fuse_ checked the block: call fuse_ again"
        return cls._why_not_parts(block)

    @classmethod
    def _check_paths(cls, block: nn.Module) -> None:
        """Raise ValueError for a path that leads nowhere."""
        modules = dict(block.named_modules(remove_duplicate=False))
        for name, path in cls.declaration.paths():
            if path not in modules or not path:
                raise ValueError(
                    f"blocks[{cls.original().__name__}] says that {name} is {path!r}, but there is no such submodule; "
                    f"there are {', '.join(filter(None, modules))}"
                )

    @classmethod
    def _why_not_parts(cls, block: nn.Module) -> str | None:
        parts = cls.declaration
        for path, part in block.named_modules():
            if part is not block and is_hooked(part):
                return f"{path} has hooks or a replaced forward"
        for name, path in parts.paths("norm1", "norm2"):
            norm = _part(block, path)
            channels = getattr(norm, "normalized_shape", (0,))[-1]
            reason = why_not_norm(f"{name} ({path})", norm, channels)
            if reason:
                return reason
        for name, path in parts.paths("fc1", "fc2", "fc3", "fc4"):
            layer = _part(block, path)
            why_not = why_not_pointwise if type(layer) is nn.Conv1d else why_not_linear
            reason = why_not(f"{name} ({path})", layer)
            if reason:
                return reason
        for name, path in parts.paths(*_DROPOUTS):
            reason = why_not_dropout(f"{name} ({path})", _part(block, path))
            if reason:
                return reason
        for _, path in parts.paths(*_DROP_PATHS):
            reason = why_not_drop_path(_part(block, path))
            if reason:
                return reason
        if any(parameter.is_meta for parameter in block.parameters()):
            return "its weights are on the meta device, and fuse_ has to run it once"
        return why_not_global_hooks()

    @classmethod
    def why_not_this_noise(cls, block: nn.Module) -> str | None:
        if not block._checked.is_noise_declared and any([module.training for module in block.modules()]):
            return "in training its forward draws or does more than was declared"
        dropouts, drop_paths = cls._of_halves(_DROPOUTS), cls._of_halves(_DROP_PATHS)
        if len({_p(block, path, dropout_p_of) for path in dropouts}) > 1:
            return "the dropouts have different probabilities or modes"
        if len({_p(block, path, drop_path_p_of) for path in drop_paths}) > 1:
            return "the two halves have different probabilities of stochastic depth"
        return next((reason for path in drop_paths if path and (reason := why_not_rescaled(_part(block, path)))), None)

    @classmethod
    def _of_halves(cls, names: tuple[str, ...]) -> list[str | None]:
        """The paths of ``names``, of which each half has as many, for the halves that there are."""
        parts, of_one = cls.declaration, len(names) // 2
        of_tokens = names[:of_one] if parts.fc1 is not None else ()
        of_channels = names[of_one:] if parts.fc3 is not None else ()
        return [getattr(parts, name) for name in of_tokens + of_channels]

    @classmethod
    def norms(cls, block: nn.Module) -> tuple[Tensor | None, ...]:
        return tuple([weight_and_bias(_part(block, path))[0] for _, path in cls.declaration.paths("norm1", "norm2")])

    def image_shape(self) -> tuple[int, ...]:
        return _image_shape(self, self.declaration)

    @classmethod
    def parameters_in_order(cls, block: nn.Module) -> list[Tensor | None]:
        """As the function takes them."""
        parameters = []
        for _, path in cls.declaration.paths(*_OF_TOKENS, *_OF_CHANNELS):
            weight, bias = weight_and_bias(_part(block, path))
            is_pointwise = weight is not None and weight.dim() == 3  # of a Conv1d: [out, in, 1]
            parameters += (weight.squeeze(2) if is_pointwise else weight, bias)
        return parameters

    @classmethod
    def arguments(cls, block: nn.Module) -> dict[str, Any]:
        """Those of the function that lie in the block and its declaration, but for noise."""
        parts = cls.declaration
        eps = [_part(block, path).eps for _, path in parts.paths("norm1", "norm2")]
        return {
            "eps": eps[0] if len(eps) == 1 else tuple(eps),
            "activation": parts.activation,
            "approximate": parts.approximate,
        }

    def compute(self, x: Tensor, options: Options) -> Tensor:
        name, packs = self.declaration.function, self.packs()
        more = {} if name == "token_mixing" else {"memory": options.memory}
        y = getattr(functional, name)(
            x,
            *self.parameters_in_order(self),
            **self.arguments(self),
            **more,
            dropout_p=_p(self, self._of_halves(_DROPOUTS)[0], dropout_p_of),
            drop_path_p=_p(self, self._of_halves(_DROP_PATHS)[0], drop_path_p_of),
            backend=options.backend,
            packs=packs,
        )
        self.keep_call(packs, x, self._fused_options)
        return y


_NAMES_OF_FUSED = frozenset(
    name
    for cls in Declared.__mro__
    for name in (*vars(cls), *cls.__dict__.get("__annotations__", ()))
    if not name.startswith("__") and not hasattr(nn.Module, name)
)


def declared_class(original: type[nn.Module], declaration: MixerParts) -> type[Declared]:
    """What blocks of ``original`` become: one class for each declaration. Python keeps them, with ``original``."""
    for cls in original.__subclasses__():
        if issubclass(cls, Declared) and cls.__dict__.get("declaration") == declaration:
            return cls
    attributes = {"__module__": __name__, "declaration": declaration}
    return type(original)(f"Fused{original.__name__}", (Declared, original), attributes)


def _new(original: type[nn.Module], declaration: MixerParts) -> nn.Module:
    cls = declared_class(original, declaration)
    return cls.__new__(cls)


def _part(block: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        block = block._modules[name]
    return block


def _image_shape(block: nn.Module, parts: MixerParts) -> tuple[int, int]:
    """Tokens and channels of what a block takes; of a channel half, any number of tokens."""
    channels = _part(block, parts.norm1 or parts.norm2).normalized_shape[-1]
    return 5 if parts.fc1 is None else _part(block, parts.fc1).weight.shape[1], channels


def _p(block: nn.Module, path: str | None, p_of: Callable[[nn.Module], float]) -> float:
    return 0.0 if path is None else p_of(_part(block, path))


def _structure(block: nn.Module, declaration: MixerParts) -> dict[str, dict[str, Any]]:
    """What the forward of a block may depend on and can be compared: its submodules' classes, which parameters and
    buffers there are, attributes that are numbers, strings, functions and the like. Not the probabilities of declared
    noise, which are read in each call."""
    noisy = {path for _, path in declaration.paths(*_DROPOUTS, *_DROP_PATHS)}
    structure, first_paths = {}, {}
    for path, module in block.named_modules(remove_duplicate=False):
        unread = _OF_MODULES | (_OF_FUSED if module is block else {"p", "drop_prob"} if path in noisy else set())
        structure[path] = {name: value for name, value in plain_attributes(module) if name not in unread}
        structure[path]["its module"] = first_paths.setdefault(id(module), path)  # one may have several paths
        structure[path]["its parameters"] = sorted(name for name, p in module._parameters.items() if p is not None)
        structure[path]["its buffers"] = sorted(module._buffers.keys() - _packs_of(module))
        if module is not block:
            structure[path]["its class"] = type(module)
    return structure


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks of one structure differ in nothing but their weights, which the check draws anew: then both
    compute the same of them."""
    for a, b in zip(one.modules(), other.modules(), strict=True):
        unread = _OF_MODULES | _OF_FUSED | {name for each in (a, b) for name, _ in plain_attributes(each)}
        own, others = ({n: v for n, v in each.__dict__.items() if n not in unread} for each in (a, b))
        if own.keys() != others.keys() or not all(_are_equal(own[name], others[name]) for name in own):
            return False
    return all(map(_are_alike_tensors, _tensors(one), _tensors(other))) and _shared(one) == _shared(other)


def _are_equal(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and isinstance(a, (list, dict, set)) and bool(a == b))
    except (RuntimeError, TypeError, ValueError):  # tensors or arrays in them
        return False


def _tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _shared(block: nn.Module) -> list[int]:
    """Of each parameter, by its names in order, where the same one came first."""
    addresses = [id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False)]
    return [addresses.index(address) for address in addresses]


def _are_alike_tensors(a: Tensor, b: Tensor) -> bool:
    if (type(a), a.shape, a.dtype, a.device) != (type(b), b.shape, b.dtype, b.device):
        return False
    return a.is_floating_point() or torch.equal(a, b)


def _packs_of(module: nn.Module) -> set[str]:
    frozen = getattr(module, "_frozen", None)
    return set() if frozen is None else set(frozen.names.values())


def _difference(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], block: nn.Module) -> str | None:
    """Where the two differ, in words, or None. Attributes that have come since are tools', unless they hide one of the
    class: those are the forward's."""
    for path in {**before, **now}:
        if path not in now or path not in before:
            return path
        cls = type(block.get_submodule(path))
        new = [name for name in now[path] if name not in before[path] and hasattr(cls, name)]
        changed = [name for name, value in before[path].items() if name not in now[path] or now[path][name] != value]
        for name in (*changed, *new):
            whose = name if name.startswith("its ") else repr(name)
            return f"{whose} of {path}" if path else whose
    return None
