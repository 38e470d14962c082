"""A block's last call in inference, repeated as long as nothing that it follows from has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import why_not_global_hooks
from .functional.direct import is_plain, surroundings
from .metadata import described

Plan = Callable[[Tensor], Tensor]


class Repeatable:
    """Mixin of blocks that are all one call, before their class of ``nn.Module``."""

    _last: LastCall | None = None

    def again(self, x: Tensor, options: Hashable) -> Tensor | None:
        """What the last call gives on ``x``, if it was one like this and nothing has changed since; else None."""
        if torch.compiler.is_compiling():  # nothing of this is to be recorded
            return None
        last = self._last
        if last is None:
            return None
        y = last.again(self, x, options)
        if y is None:  # of what has been replaced it would keep the memory
            self._last = None
        return y

    def keep_call(self, packs: Mapping[str, Tensor] | None, x: Tensor, options: Hashable) -> None:
        """A call with ``packs`` was all that the block did on ``x``: if it has left a plan, the next one repeats it."""
        plan = getattr(packs, "call", None)
        if plan is not None and self._snapshot is not None:
            self._last = LastCall(self, plan, x, options)


class LastCall:
    """A plan, which is made of metadata alone, and all that it follows from.

    It cannot be stale: everything is compared with what is read from the block and its parameters at hand. Numbers are
    read by the plan, at the addresses that were compared. deepcopy and pickle leave None in its place.
    """

    def __init__(self, block: nn.Module, plan: Plan, x: Tensor, options: Hashable) -> None:
        self._plan = plan
        # Not the block itself, which keeps this: in a cycle its memory would wait for the garbage collector.
        parts = [part for part in block.modules() if part is not block]
        self._noisy = [part for part in parts if hasattr(part, "p") or hasattr(part, "drop_prob")]
        self._parameters = [(m, name) for m in parts for name, p in m._parameters.items() if p is not None]
        self._own = [name for name, parameter in block._parameters.items() if parameter is not None]
        self._state = self._now(block, self._tensors(block), x, options)

    def again(self, block: nn.Module, x: Tensor, options: Hashable) -> Tensor | None:
        if torch.is_grad_enabled() or not is_plain(x):
            return None
        if block.training or any([part.training for part in self._noisy]):
            return None
        tensors = self._tensors(block)  # held until the plan has read them, whatever other threads replace
        now = self._now(block, tensors, x, options)
        if now is None or now != self._state or not block._snapshot.holds(block):
            return None
        return self._plan(x) if why_not_global_hooks() is None else None

    def _tensors(self, block: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
        """The parameters, and what a frozen block keeps of them; None if one is gone."""
        frozen, own, buffers = block._frozen, block._parameters, block._buffers
        try:
            parameters = [part._parameters[name] for part, name in self._parameters] + [own[name] for name in self._own]
            return parameters, [] if frozen is None else [buffers[name] for name in frozen.names.values()]
        except KeyError:
            return None

    def _now(
        self, block: nn.Module, tensors: tuple[list[Tensor], list[Tensor]] | None, x: Tensor, options: Hashable
    ) -> tuple[Any, ...] | None:
        frozen = block._frozen
        try:
            parameters, packs = tensors
            writes = None if frozen is None else _writes(parameters)
            found = described(parameters + packs)
        except (AttributeError, TypeError, KeyError, RuntimeError):  # one is gone, or has no address
            return None
        return block._snapshot, frozen, writes, surroundings(x), options, found

    def __reduce__(self) -> tuple:
        return type(None), ()


def _writes(tensors: list[Tensor | None]) -> list[int | None]:
    """How many PyTorch has counted to each; an inference tensor counts none."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [None if t.is_inference() else t._version for t in tensors]
