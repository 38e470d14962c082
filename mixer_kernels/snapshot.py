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

_CHANGING = ("training", "_last")  # the mode; what repeat keeps
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
        self.read, self.values = _plain_attributes(block)
        self.modules = [_remembered(module) for part in parts for module in part.modules()]
        # Weights that are no parameters (of replicas, FSDP1's views) come and go, and with them their classes.
        self.is_usable = not any(isinstance(v, Tensor) for module, *_ in self.modules for v in module.__dict__.values())

    def holds(self, block: nn.Module) -> bool:
        """Whether everything is what it was, and without hooks."""
        own = block.__dict__
        try:
            if not self.is_usable or own["_modules"] != self.children or self.read(own) != self.values:
                return False
            if _size(own) != self.size:  # an attribute of the class may have been hidden
                return False
            for module, cls, size, read, values, children, weights in self.modules:
                attributes = module.__dict__
                if (
                    type(module) is not cls
                    or len(attributes) != size  # "forward" may have come
                    or attributes["_forward_hooks"]
                    or attributes["_forward_pre_hooks"]
                    or attributes["_backward_hooks"]
                    or attributes["_backward_pre_hooks"]
                    or read(attributes) != values
                    or (children and attributes["_modules"] != children)
                    or (weights and [*map(type, attributes["_parameters"].values())] != weights)
                ):
                    return False
        except KeyError:  # an attribute is gone
            return False
        return True

    def __reduce__(self) -> tuple:
        return type(None), ()


def _size(own: dict[str, Any]) -> int:
    """How many attributes a block has, but for those that come and go as it is called and frozen."""
    return len(own) - ("_snapshot" in own) - ("_last" in own) - ("_frozen" in own)


def _remembered(module: nn.Module) -> tuple[Any, ...]:
    attributes = module.__dict__
    children, weights = dict(module._modules), [*map(type, module._parameters.values())]
    return module, type(module), len(attributes), *_plain_attributes(module), children, weights


def _plain_attributes(module: nn.Module) -> tuple[itemgetter, Any]:
    """What reads them from the module's ``__dict__``, and what it reads now."""
    attributes = module.__dict__
    read = itemgetter(*[name for name, _ in plain_attributes(module)])  # _is_full_backward_hook at least
    return read, read(attributes)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values of those that can be compared: numbers, strings, functions and the like, but not the mode."""
    for name, value in module.__dict__.items():
        if name not in _CHANGING and isinstance(value, _PLAIN):
            yield name, value
