"""What the classes that ``fuse_`` gives to blocks have in common."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..coverage import why_not_tensor, why_not_transformed
from ..freeze import Freezable
from ..functional import checks
from ..modules import memory_of
from ..repeat import Repeatable
from ..snapshot import Watched
from ..words import warn_once


class Options(NamedTuple):
    """What ``fuse_`` was asked for, kept by each block."""

    backend: str | None = None
    memory: str | None = "fast"


class Fused(Watched, Freezable):
    """Mixin that puts ``functional`` in front of a block's own forward, which it keeps for all that is not covered.

    A subclass also derives from the original class and adds no state: a block changes to it and back by its
    ``__class__`` alone. It takes the name of the original, by which tools find the blocks that they shard, wrap or
    place (``no_split_module_classes``, ``transformer_cls_names_to_wrap``). Whether the kernels compute what the block
    computes is asked on every forward, because modes, hooks and submodules may change between two calls. Where the
    torch backend is chosen nothing is asked: the block's own forward is that, and right whatever the block is.
    """

    dimensions: ClassVar[int] = 3
    """Of the input that the kernels take."""
    inputs_of_forward: ClassVar[int] = 1
    """That its own ``forward`` takes; the kernels take the first."""
    submodules: ClassVar[frozenset[str]]
    optional_submodules: ClassVar[frozenset[str]] = frozenset()
    parameters_of_its_own: ClassVar[frozenset[str]] = frozenset()
    """What a block has in the versions that the subclass was written for."""

    _fused_options: Options = Options()
    _defined_as: ClassVar[str]
    """The name of the class in its module."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _is_for_blocks(cls) and not any(map(_is_for_blocks, cls.__bases__)):  # FSDP derives from it, and names that
            cls._defined_as = cls.__name__
            original = cls.original()
            cls.__name__, cls.__qualname__ = original.__name__, original.__qualname__
            own = inspect.signature(original.forward)
            if [*own.parameters] != ["self", "x"] and "forward" not in cls.__dict__:
                cls.forward = _forward_as(original, own)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickle would look for the class by the name that it has taken."""
        cls = type(self)
        reduced = super().__reduce_ex__(protocol)
        return (*cls.made_by(), *reduced[2:]) if cls.is_as_fused() else reduced

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` calls before all else."""
        raise RuntimeError(
            f"torch.jit.script does not take a fused {self.original().__name__}: unfuse_ the model first, or use "
            "torch.jit.trace"
        )

    @classmethod
    def made_by(cls) -> tuple[Callable, tuple]:
        """A function, and its arguments, that makes a block without its state: what a pickle or a copy starts from."""
        return _new, (cls.__module__, cls._defined_as)

    @classmethod
    def is_as_fused(cls) -> bool:
        """Whether ``cls`` is what ``fuse_`` gave, rather than what FSDP or a parametrization has made of it since."""
        return "_defined_as" in cls.__dict__

    @classmethod
    def original(cls) -> type[nn.Module]:
        """The class that a block had, and gets back."""
        return cls.__mro__[cls.__mro__.index(Repeatable) + 1]  # also for a class that FSDP has derived since

    @classmethod
    def name_of_class(cls) -> str:
        return cls.original().__name__

    @staticmethod
    def function(block: nn.Module) -> str:
        """The function of ``mixer_kernels.functional`` that computes this block."""
        raise NotImplementedError

    def operator_on_cpu(self, x: Tensor) -> str | None:
        """The same, if a backend may have it for ``x`` on a CPU."""
        return self.function(self)

    @staticmethod
    def why_not_this_noise(block: nn.Module) -> str | None:
        """Why it does not in the mode of right now: the reasons of dropout and stochastic depth."""
        return None

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        """One parameter of each norm: eager PyTorch takes norms of another dtype than ``x``'s, the kernels do not."""
        raise NotImplementedError

    def compute(self, x: Tensor, options: Options) -> Tensor:
        """The block by that function."""
        raise NotImplementedError

    @classmethod
    def why_not_known(cls, block: nn.Module) -> str | None:
        """Why this block is not one that the subclass was written for: asked once, by ``fuse_``."""
        original = cls.original()
        name = original.__name__
        if "forward" in block.__dict__:
            return "its forward was replaced"
        if original.forward.__module__ != original.__module__:
            return f"{name}.forward was replaced"
        if len(inspect.signature(original.forward).parameters) != 1 + cls.inputs_of_forward:
            return f"this version's {name} takes more than x"
        more = block._modules.keys() - cls.submodules
        if (
            cls.submodules - block._modules.keys()
            or more - cls.optional_submodules
            or block._parameters.keys() != cls.parameters_of_its_own
        ):
            return f"its submodules or parameters are not those of a {name}"
        return None

    @classmethod
    def why_left(cls, block: nn.Module) -> str | None:
        """Why ``fuse_`` leaves this block as it is."""
        return cls.why_not_known(block) or cls.why_not_covered(block)

    @classmethod
    def checked_state(
        cls, block: nn.Module, name: str, before: Sequence[tuple[nn.Module, dict[str, Any]]]
    ) -> dict[str, Any]:
        """Attributes for this block, called ``name`` in the model, from what ``fuse_`` finds out by running it;
        ``before`` has what was found of other blocks of the same class."""
        return {}

    def why_not_kernels(self, x: Tensor) -> str | None:
        return (
            why_not_tensor(x)
            or why_not_transformed()
            or self.why_not_covered_now()
            or self.why_not_this_noise(self)
            or self._why_not_input(x)
        )

    def example(self) -> Tensor:
        norm = next(parameter for parameter in self.parameters())
        return torch.zeros(1, *self.image_shape(), dtype=norm.dtype, device=norm.device)

    def image_shape(self) -> tuple[int, ...]:
        """Of one image that the block takes."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        options = self._fused_options
        y = self.again(x, options)
        if y is not None:
            return y
        if self._frozen is not None:
            self.check_frozen()
        if isinstance(x, Tensor) and checks.runs_on_torch(options.backend, x, self.operator_on_cpu(x), self):
            return self.own_forward(x)
        reason = self.why_not_kernels(x)
        if reason is None:
            return self.compute(x, options._replace(memory=memory_of(self, options.memory)))
        self.say_why(reason)
        return self.own_forward(x)

    def own_forward(self, x: Tensor) -> Tensor:
        """The block by its own modules."""
        return super().forward(x)

    @classmethod
    def say_why(cls, reason: str) -> None:
        """Why the block's own ``forward`` runs."""
        warn_once(f"{cls.original().__name__}: computing eagerly, because {reason}")

    def _why_not_input(self, x: Tensor) -> str | None:
        if x.dim() != self.dimensions:
            return f"the input has {x.dim()} dimensions, not {self.dimensions}"
        if not checks.is_autocast_enabled(x.device.type):
            for parameter in self.norms(self):
                if parameter is not None and parameter.dtype != x.dtype:
                    return f"the input is {x.dtype}, a norm {parameter.dtype}"
        return None


def _forward_as(original: type[nn.Module], signature: inspect.Signature) -> Callable[..., Tensor]:
    """``Fused.forward``, called as the forward of ``original`` is: by position, or by its own name for x."""
    name = [*signature.parameters][-1]

    def forward(self: Fused, *inputs: Tensor, **named: Tensor) -> Tensor:
        if len(inputs) + len(named) == 1 and (inputs or name in named):
            return Fused.forward(self, *inputs, *named.values())
        return original.forward(self, *inputs, **named)  # a default of its own, or Python's error

    forward.__signature__ = signature
    return forward


def _is_for_blocks(cls: type) -> bool:
    """Whether ``cls`` is a class that blocks can have, rather than one that several of those have in common."""
    return issubclass(cls, Fused) and issubclass(cls, nn.Module)


def _new(module: str, name: str) -> nn.Module:
    cls = getattr(importlib.import_module(module), name)
    return cls.__new__(cls)
