"""``freeze_`` and ``unfreeze_``: the promise that weights stay, for which a block keeps them as the kernels take them.

Else a block packs its weights in every call, since no one can tell who wrote to them. What a frozen block keeps are
buffers of its own: they move and are copied with it, and are not in its ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .ops.packs import KeptPacks, NewPacks, has_packs
from .repeat import Repeatable
from .report import FROZEN, LEFT, RESTORED, Entry, Report
from .snapshot import plain_attributes

_BUFFER = "_pack{}"


def freeze_(model: nn.Module) -> Report:
    """Pack the weights of the fused blocks of ``model`` once, in place, instead of in every call.

    By calling it you promise that the weights will not change: no training, loading, averaging or merging until
    ``unfreeze_``. In return, no call packs weights, and neither does the replay of a CUDA graph that is captured
    afterwards. It pays at small batches: docs/use_in_your_model.md says how much it saves.

    Call it where the model will run: in eval mode, on its device, under the autocast and with the backend of inference.
    With another dtype or backend a block packs in each call, as if it were not frozen. ``.to()`` another device,
    ``copy.deepcopy`` and ``pickle`` take along what was packed.

    A frozen block raises RuntimeError, which names the block and says what to call, in three cases: in training mode;
    in grad mode, if one of its parameters requires a gradient; and if PyTorch has counted that a parameter was written
    to, replaced or converted. Writes through ``.data`` are not counted, and compiled or captured calls are not watched.

    Args:
        model: a model with blocks that ``fuse_`` fused or ``FusedMixerBlock``, or any part of one.

    Returns:
        What was frozen, for which backend and how many bytes; and what was left, and why: blocks that run on the
        ``torch`` backend or eagerly, and those whose weights need no packing. A second call packs them again.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a block is in training mode.
    """
    blocks = _blocks(model)
    for name, block in blocks:
        if block.training:
            raise RuntimeError(f"{_named(name)} is in training mode: call model.eval() before freeze_")
    return Report(tuple(_freeze(name, block) for name, block in blocks))


def unfreeze_(model: nn.Module) -> Report:
    """Undo ``freeze_``: the blocks of ``model`` drop what they kept, and pack their weights in each call again.

    Args:
        model: a model, or any part of one.

    Returns:
        The blocks that were frozen.

    Raises:
        TypeError: ``model`` is not a module.
    """
    entries = []
    for name, block in _blocks(model):
        if block.unfreeze():
            entries.append(Entry(name, block.name_of_class(), RESTORED, ""))
    return Report(tuple(entries))


class Freezable(Repeatable):
    """Mixin of blocks that ``freeze_`` takes, before their class of ``nn.Module``."""

    _frozen: Frozen | None = None

    def example(self) -> Tensor:
        """An input of one image: what decides which packs there are, but for its strides."""
        raise NotImplementedError

    def why_not_kernels(self, x: Tensor) -> str | None:
        """Why the kernels do not compute this block on ``x`` right now, or None."""
        raise NotImplementedError

    @classmethod
    def name_of_class(cls) -> str:
        """The name by which reports call it."""
        return cls.__name__

    def check_frozen(self) -> None:
        """Raise if the block is frozen and may not run."""
        if self._frozen is not None:
            self._frozen.check(self)

    def packs(self) -> dict[str, Tensor] | None:
        """What it keeps, by name: nothing if it is not frozen, and None where no call is repeated either."""
        frozen = self._frozen
        if frozen is None:
            repeats = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
            return KeptPacks((), None) if repeats else None
        if frozen.new is not None:
            return frozen.new
        buffers = self._buffers
        return KeptPacks([(name, buffers[buffer]) for name, buffer in frozen.names.items()], frozen.stamp)

    def unfreeze(self) -> bool:
        """Drop what it keeps; whether it was frozen."""
        frozen = self.__dict__.pop("_frozen", None)
        if frozen is None:
            return False
        for buffer in frozen.names.values():
            delattr(self, buffer)
        return True

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> nn.Module:
        frozen = self._frozen
        if frozen is None:
            return super()._apply(fn, *args, **kwargs)
        # A pack follows to another device, but its dtype is the kernels': `fn` does not see it.
        kept = {name: self._buffers.pop(name) for name in frozen.names.values()}
        was_intact, before = frozen.changed() is None, frozen.dtypes()
        try:
            return super()._apply(fn, *args, **kwargs)
        finally:
            device = _parameter(frozen.sources[0]).device
            self._buffers.update((name, pack.to(device)) for name, pack in kept.items())
            if was_intact and frozen.dtypes() == before:
                frozen.look()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._frozen is not None and self._frozen.was_intact:
            self._frozen.look()


class Frozen:
    """What a frozen block knows: the names of its packs, and what its parameters were when they were made."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name = name
        self.names: dict[str, str] = {}  # of packs, and of the buffers that hold them
        self.new: NewPacks | None = None  # while they are made
        self.was_intact = True  # of a copy: when it was made
        self.sources = [
            (f"{path}.{leaf}" if path else leaf, module, leaf)
            for path, module in block.named_modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.children = dict(block._modules)
        parts = [(path, part) for path, part in block.named_modules() if part is not block]
        self.grandchildren = [(f"{path}.", part, dict(part._modules)) for path, part in parts if part._modules]
        # What packs are made of may follow from them: whether there is a gate, and of which kind.
        self.attributes = [
            (f"{path}." if path else "", module, _attributes(module)) for path, module in block.named_modules()
        ]
        self.seen: list[Any] = []
        self.aliases: list[Tensor] = []
        self.look()

    def look(self) -> None:
        """Remember what the parameters are now."""
        # An alias keeps the address from being used again.
        self.aliases = [_parameter(source).detach() for source in self.sources]
        self.seen, self.stamp = self.identities(), object()

    def replaced(self, block: nn.Module) -> str | None:
        """The name of a submodule or an attribute of ``block`` that is not what it was, or None."""
        for path, module, children in (("", block, self.children), *self.grandchildren):
            now = module._modules
            if now != children:
                return path + next(name for name in (*children, *now) if now.get(name) is not children.get(name))
        for path, module, attributes in self.attributes:
            now = _attributes(module)
            for name, value in attributes.items():
                if name not in now or now[name] != value:
                    return path + name
        return None

    def changed(self) -> str | None:
        """The name of a parameter that is not what it was, or None."""
        if not self.seen:
            return self.sources[0][0]
        now = self.identities()
        if now == self.seen:
            return None
        return next(path for (path, *_), was, is_ in zip(self.sources, self.seen, now, strict=True) if was != is_)

    def identities(self) -> list[Any]:
        """What the parameters are now, the number of writes to them included."""
        return [_identity(_parameter(source)) for source in self.sources]

    def dtypes(self) -> list[torch.dtype | None]:
        """Of the parameters."""
        return [getattr(_parameter(source), "dtype", None) for source in self.sources]

    def check(self, block: nn.Module) -> None:
        """Raise RuntimeError if ``block`` may not run."""
        if self.new is not None:
            return
        name = _named(self.name)
        if block.training:
            raise RuntimeError(f"{name} is frozen, but in training mode: call mixer_kernels.unfreeze_ to train it")
        if torch.is_grad_enabled():
            for path, module, leaf in self.sources:
                if getattr(module._parameters.get(leaf), "requires_grad", False):
                    raise RuntimeError(
                        f"{name} is frozen, but its {path} requires a gradient: run it under torch.no_grad() or "
                        "torch.inference_mode(), or call mixer_kernels.unfreeze_ to train it"
                    )
        if not torch.compiler.is_compiling():
            changed = self.replaced(block) or self.changed()
            if changed is not None:
                raise RuntimeError(
                    f"{name} is frozen, but its {changed} was written to, replaced or converted since: "
                    "call mixer_kernels.unfreeze_ and then freeze_ again"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": [], "aliases": [], "was_intact": self.changed() is None}


def kept(packs: dict[str, Tensor] | None, name: str, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a tensor made of parameters; of a frozen block, whose ``packs`` these are, the one that it keeps."""
    if not has_packs(packs):
        return make()
    if isinstance(packs, NewPacks):
        packs[name] = make()
    return packs[name]


def _freeze(name: str, block: Freezable) -> Entry:
    def left(why: str) -> Entry:
        return Entry(name, block.name_of_class(), LEFT, why)

    block.unfreeze()
    x = block.example()
    reason = block.why_not_kernels(x)
    if reason is not None:
        return left(reason)
    frozen = block._frozen = Frozen(name, block)
    frozen.new = NewPacks()
    try:
        with torch.no_grad():
            for one in _variants(x):
                block.forward(one)
    except BaseException:
        del block._frozen
        raise
    packs, frozen.new = frozen.new, None
    backends = sorted({pack.partition("/")[0] for pack in packs if "/" in pack})
    if not backends:
        del block._frozen
        return left("there is nothing to keep: at one image its weights are taken as they are")
    frozen.names = {name: _BUFFER.format(i) for i, name in enumerate(packs)}
    for buffer, pack in zip(frozen.names.values(), packs.values(), strict=True):
        block.register_buffer(buffer, pack, persistent=False)
    size = sum(pack.nbytes for pack in packs.values())
    return Entry(name, block.name_of_class(), FROZEN, f"{', '.join(backends)}: {len(packs)} packs, {size:,} bytes")


def _variants(x: Tensor) -> list[Tensor]:
    """``x`` as it may come: its strides decide on tiles, and so on padding; its dtype on how LayerNorm is applied."""
    dtypes = [x.dtype]
    if torch.is_autocast_enabled(x.device.type):
        dtypes.append(torch.get_autocast_dtype(x.device.type))
    return [y for dtype in dtypes for y in (x.to(dtype), x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2))]


def _blocks(model: Any) -> list[tuple[str, Freezable]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Freezable)]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Those that are numbers, strings and the like; not eps, of which no pack is made, and not the probabilities of
    noise, which a frozen block lacks."""
    named = plain_attributes(module)
    return {name: value for name, value in named if not name.startswith("_") and name not in ("p", "drop_prob", "eps")}


def _named(name: str) -> str:
    return f"block {name!r}" if name else "the block"


def _identity(p: Tensor | None) -> tuple | None:
    if p is None:
        return None
    writes = None if p.is_inference() else p._version  # an inference tensor counts none
    return p.data_ptr(), writes, p.dtype, p.shape, p.stride()


def _parameter(source: tuple[str, nn.Module, str]) -> Tensor | None:
    _, module, leaf = source
    return module._parameters.get(leaf)
