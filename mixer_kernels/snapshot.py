"""What a block was when the kernels were found to cover it: found once, compared on every call.

The reasons of ``coverage`` lie in which parts a block has, in their classes and hooks, in attributes that are numbers,
strings, functions and the like (eps, normalized_shape, approximate), and in the classes of their weights. As long as
all of those are what they were, the answer is. What depends on the mode is asked anew each time.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import why_not_global_hooks
from .metadata import Remembered, are_unchanged

_CHANGING = ("training", "_last", "_snapshot")  # the mode; what is kept between calls
_PLAIN = (str, tuple, numbers.Number, type(None), FunctionType, BuiltinFunctionType)


class Watched:
    """Mixin of blocks that kernels may compute, before their class of ``nn.Module``."""

    _snapshot: Snapshot | None = None

    @staticmethod
    def why_not_covered(block: nn.Module) -> str | None:
        """Why the kernels do not compute what this block computes, whatever the mode; None if they do."""
        raise NotImplementedError

    def parts(self) -> Iterable[nn.Module]:
        """The submodules that ``why_not_covered`` looks into."""
        return self._modules.values()

    def why_not_covered_now(self) -> str | None:
        """``why_not_covered(self)``, asked again only where something has changed since it was None."""
        if torch.compiler.is_compiling():  # comparing is not to be recorded
            return self.why_not_covered(self)
        snapshot = self._snapshot
        if snapshot is not None and snapshot.holds(self):
            return why_not_global_hooks()
        reason = self.why_not_covered(self)
        self._snapshot = Snapshot(self, self.parts()) if reason is None else None
        return reason


class Snapshot:
    """All that ``coverage`` reads of a block and its ``parts``, the submodules that it looks into.

    It cannot be stale: everything is compared with what is read from the block at hand. A shallow copy that was given
    other submodules (``DataParallel``'s replicas) does not match; deepcopy and pickle leave None in its place.
    """

    def __init__(self, block: nn.Module, parts: Iterable[nn.Module]) -> None:
        self.children, self.size = dict(block._modules), _size(block.__dict__)
        _, self.read, self.values = _plain_attributes(block)
        self.modules = [_remembered(module) for part in parts for module in part.modules()]
        # Weights that are no parameters (of replicas, FSDP1's views) come and go, and with them their classes.
        self.is_usable = not any(isinstance(v, Tensor) for one in self.modules for v in one.module.__dict__.values())

    def holds(self, block: nn.Module) -> bool:
        """Whether everything is what it was, and without hooks."""
        own = block.__dict__
        try:
            if not self.is_usable or own["_modules"] != self.children or self.read(own) != self.values:
                return False
        except KeyError:  # an attribute is gone
            return False
        # An attribute of the class may have been hidden.
        return _size(own) == self.size and are_unchanged(self.modules)

    def __reduce__(self) -> tuple:
        return type(None), ()


def _size(own: dict[str, Any]) -> int:
    """How many attributes a block has, but for those that come and go as it is called and frozen."""
    return len(own) - ("_snapshot" in own) - ("_last" in own) - ("_frozen" in own)


def _remembered(module: nn.Module) -> Remembered:
    children, weights = dict(module._modules), tuple(map(type, module._parameters.values()))
    return Remembered(module, type(module), len(module.__dict__), *_plain_attributes(module), children, weights)


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, ...], itemgetter, tuple[Any, ...]]:
    """Their names, what reads them from the module's ``__dict__``, and what it reads now."""
    names = ("_is_full_backward_hook", *[name for name, _ in plain_attributes(module)])  # two at least: a tuple
    read = itemgetter(*names)
    return names, read, read(module.__dict__)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values of those that can be compared: numbers, strings, functions and the like, but not the mode."""
    for name, value in module.__dict__.items():
        if name not in _CHANGING and isinstance(value, _PLAIN):
            yield name, value
