"""A block's last call in inference, repeated as long as nothing that it follows from has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import why_not_global_hooks
from .functional.direct import is_plain, surroundings

Plan = Callable[[Tensor], Tensor]


class Repeatable:
    """Mixin of blocks that are all one call, before their class of ``nn.Module``."""

    _last: LastCall | None = None

    def again(self, x: Tensor, options: Hashable) -> Tensor | None:
        """What the last call gives on ``x``, if it was one like this and nothing has changed since; else None."""
        if torch.compiler.is_compiling():  # nothing of this is to be recorded
            return None
        last = self._last
        return None if last is None else last.again(self, x, options)

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
        self._state = self._now(block, x, options)

    def again(self, block: nn.Module, x: Tensor, options: Hashable) -> Tensor | None:
        if torch.is_grad_enabled() or not is_plain(x):
            return None
        if (
            block.training
            or any([part.training for part in self._noisy])
            or self._state != self._now(block, x, options)
        ):
            return None
        return self._plan(x) if block._snapshot.holds(block) and why_not_global_hooks() is None else None

    def _now(self, block: nn.Module, x: Tensor, options: Hashable) -> tuple[Any, ...] | None:
        frozen = block._frozen
        try:
            if frozen is None:
                parameters = [part._parameters[name] for part, name in self._parameters]
                parameters += [block._parameters[name] for name in self._own]
                of_weights = [(p.data_ptr(), p.dtype, p.shape, p.stride(), p.is_neg()) for p in parameters]
            else:
                buffers = block._buffers
                of_weights = [frozen.identities(), [buffers[name].data_ptr() for name in frozen.names.values()]]
        except (AttributeError, KeyError, RuntimeError):  # a parameter is gone, or has no address
            return None
        return block._snapshot, frozen, surroundings(x), options, of_weights

    def __reduce__(self) -> tuple:
        return type(None), ()
