"""``fuse_`` and ``unfuse_``: let the kernels compute the blocks of a model that exists, and undo it.

Blocks are changed in place and one by one, by their ``__class__``: to a subclass of their own class that has another
``forward`` (``adapters``), and back. Parameters, buffers, submodules, hooks, names and ``state_dict`` keys stay what
they are, and so do ``isinstance``, ``copy.deepcopy`` and ``pickle``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapters import Declared, Fused, MixerParts, Options, declared_class, fused_classes
from .backends import CHOICES
from .functional import MEMORY_MODES
from .modules import FusedMixerBlock
from .report import FUSED, LEFT, RESTORED, Entry, Report
from .words import one_of

BUILT_FUSED = "it was built to run through the kernels"
IS_GRAPH = (
    "it is a graph, whose blocks are no modules: fuse_ the model that it was made from; tools that change graphs, such "
    "as PT2E quantisation, need that model unfused: unfuse_ it first"
)


def fuse_(
    model: nn.Module,
    *,
    backend: str | None = None,
    memory: str = "fast",
    blocks: Mapping[type[nn.Module], MixerParts] | None = None,
) -> Report:
    """Let the kernels compute the blocks of ``model`` that they cover, in place. ``unfuse_`` undoes it exactly.

    Known blocks: timm's ``MixerBlock`` (also gMixer's), ``ResBlock`` (ResMLP) and ``SpatialGatingBlock`` (gMLP);
    ``PreNormResidual`` of lucidrains' ``MLPMixer`` and ``MLPMixer3D``; the layers of Hugging Face's PatchTSMixer and of
    granite-tsfm's TinyTimeMixer (sktime's too) and TSPulse, and the feature, patch and channel mixing blocks in them;
    the MLP-Mixer in PyTorch Geometric's GraphMixer; the layers of darts' TSMixerModel and of neuralforecast's
    TSMixer and TSMixerx, and the time and feature mixing in and around them; and what ``blocks`` declares.

    Fused blocks compute what they did before, by the accuracy rule of this package: in training and inference, under
    autocast and gradient checkpointing. They keep their parameters and ``state_dict`` keys. If a block later becomes
    something that the kernels do not cover (another mode, a hook on a part, another activation), its own ``forward``
    runs, with one warning on the logger "mixer_kernels".

    Some blocks are left alone, and the report says why: blocks with norms, activations or MLPs that the kernels do not
    have; with quantised, distributed or parametrised weights; with hooks on their parts (hooks on the block itself keep
    working); with a replaced ``forward``; subclasses of known blocks; models that ``torch.compile`` or TorchScript has
    already compiled, and graphs. Fuse first, then compile, shard or wrap.

    Args:
        model: a model, or any part of one. Other modules in it are not touched.
        backend: "auto", "cuda", "cuda:sm90", "triton", "cpu" or "torch" for these blocks. None leaves the choice to
            ``use_backend`` or ``MIXER_KERNELS_BACKEND`` at each call.
        memory: what training keeps, "fast" or "min" as in ``functional``.
        blocks: classes of blocks of your own, and what is what in them (``MixerParts``). They are checked: a copy
            runs once, forward and backward, in float64 with random weights, on random inputs of usual size and on rows
            of large and small numbers (1e6, 1e-3) and of zeros, beside what was declared. Of blocks that differ in
            nothing but their weights one is checked. The block at hand, its mode, gradients and hooks and the random
            number generators stay as they are. It is a check of what the block is now: where its submodules, or its
            attributes that are numbers, strings or functions change later, its own ``forward`` runs. Not watched is
            what that reads elsewhere, such as a configuration, a list, a tensor that is no parameter, a global; not
            seen, what it does with NaN, infinities or other dtypes, or with large numbers inside.

    Returns:
        What was fused, what was left, and why. A second call changes the options and returns the same report.

    Raises:
        TypeError: ``model`` is not a module; ``blocks`` is not a dictionary from classes of modules to ``MixerParts``.
        ValueError: unknown ``backend`` or ``memory``; a block does not compute what ``blocks`` says, with what differs
            and by how much, has no such parts, cannot be copied, or has a block in it that would be fused too; the
            model has no blocks of a class in ``blocks``. Nothing is fused.
    """
    options = Options(
        None if backend is None else one_of("backend", backend, CHOICES), one_of("memory", memory, MEMORY_MODES)
    )
    classes = fused_classes()
    declared = _declared_classes(blocks or {}, classes)
    classes |= declared
    found = []
    for name, module, outer_reason in _walk(_checked(model)):
        block = _name_of_block(module, classes)
        if block is not None:
            fused = _fused_class(module, classes)
            reason = (None if isinstance(module, Fused) else outer_reason) or _why_left(module, classes, fused)
            found.append(_Found(name, block, module, fused, reason))
        elif isinstance(module, torch.fx.GraphModule):
            found.append(_Found(name, type(module).__name__, module, None, IS_GRAPH))
    for original in declared:
        if not any(issubclass(type(each.module), original) for each in found):
            raise ValueError(f"blocks has {original.__module__}.{original.__qualname__}, of which the model has none")
    _check_not_nested([each for each in found if each.reason is None], declared)
    states: dict[type[Fused], list[tuple[nn.Module, dict[str, Any]]]] = {}
    for each in found:
        if each.reason is None:
            before = states.setdefault(each.fused, [])
            before.append((each.module, each.fused.checked_state(each.module, each.name, before)))
    of_module = {module: state for of_class in states.values() for module, state in of_class}
    entries = []
    for name, block, module, fused, reason in found:
        if reason is None:
            if not isinstance(module, fused):
                module.__class__ = fused
            module._fused_options = options
            module.__dict__.update(of_module[module])
            noise = fused.why_not_this_noise(module)
            detail = f"functional.{fused.function(module)}"
            detail = f"{detail}, but not in this mode: {noise}" if noise else detail
        entries.append(Entry(name, block, FUSED if reason is None else LEFT, reason or detail))
    return Report(tuple(entries))


class _Found(NamedTuple):
    """A block in a model."""

    name: str
    block: str  # the name of the class that it had
    module: nn.Module
    fused: type[Fused] | None  # what it becomes
    reason: str | None  # why it is left


def unfuse_(model: nn.Module) -> Report:
    """Undo ``fuse_``, in place: every block gets its class back and computes what it did before, to the last bit.

    Args:
        model: a model, or any part of one.

    Returns:
        What was restored, what was left, and why: blocks whose class or ``forward`` something else has changed
        since (FSDP, parametrizations on the block itself, accelerate's hooks), and ``FusedMixerBlock``, which has no
        other class to go back to.

    Raises:
        TypeError: ``model`` is not a module.
    """
    entries = []
    for name, module, _ in _walk(_checked(model)):
        if isinstance(module, FusedMixerBlock):
            reason = f"{BUILT_FUSED}: for plain modules load its state_dict into timm's MlpMixer"
            entries.append(Entry(name, type(module).__name__, LEFT, reason))
        if not isinstance(module, Fused):
            continue
        reason, original = None, type(module).original()
        if not module.is_as_fused():
            reason = f"it has become a {type(module).__name__} since it was fused: undo that first"
        elif "forward" in module.__dict__:
            reason = "its forward was replaced since it was fused: undo that first"
        else:
            module.unfreeze()
            module.__class__ = original
            for state in ("_fused_options", "_snapshot", "_last", "_checked"):
                module.__dict__.pop(state, None)
        entries.append(Entry(name, original.__name__, LEFT if reason else RESTORED, reason or ""))
    return Report(tuple(entries))


def _walk(
    module: nn.Module, name: str = "", outer_reason: str | None = None, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Each module once: its name, itself, and why it must be left for something around it."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    outer_reason = outer_reason or _why_not_inside(module)
    yield name, module, outer_reason
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, outer_reason, seen)


def _why_not_inside(module: nn.Module) -> str | None:
    cls = type(module)
    is_optimized = cls.__name__ == "OptimizedModule" and cls.__module__.startswith("torch._dynamo")
    if is_optimized or module._compiled_call_impl is not None:
        return "torch.compile has compiled it: fuse_ first, then compile"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript: fuse_ the model that it was made from"
    return None


def _name_of_block(module: nn.Module, classes: dict[type, type[Fused]]) -> str | None:
    """The name of the known class of blocks that ``module`` is of, or None."""
    if isinstance(module, Fused):
        return type(module).original().__name__
    if isinstance(module, FusedMixerBlock):
        return type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", None)
        return name if name in {cls.__name__ for cls in classes} else None
    return type(module).__name__ if issubclass(type(module), tuple(classes)) else None


def _why_left(module: nn.Module, classes: dict[type, type[Fused]], fused: type[Fused] | None) -> str | None:
    if isinstance(module, FusedMixerBlock):
        return BUILT_FUSED
    if fused is None:
        cls = type(module)
        parent = next(base.__name__ for base in cls.__mro__ if base in classes)
        return f"it is a {cls.__name__}, a subclass of {parent}"
    return fused.why_left(module)


def _fused_class(module: nn.Module, classes: dict[type, type[Fused]]) -> type[Fused] | None:
    """What ``module`` becomes, or is already."""
    cls = type(module)
    if not isinstance(module, Fused):
        return classes.get(cls)
    return classes.get(cls.original(), cls) if cls.is_as_fused() else cls


def _declared_classes(
    blocks: Mapping[type[nn.Module], MixerParts], classes: dict[type, type[Fused]]
) -> dict[type, type[Fused]]:
    """What the user's own classes become."""
    declared = {}
    for cls, parts in blocks.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"blocks must have classes of modules as keys, got {cls!r}")
        if not isinstance(parts, MixerParts):
            raise TypeError(f"blocks[{cls.__name__}] must be a MixerParts, got {type(parts).__name__}")
        original = cls.original() if issubclass(cls, Fused) else cls
        if original in classes:
            raise ValueError(f"fuse_ knows {original.__module__}.{original.__name__}: leave it out of blocks")
        declared[original] = declared_class(original, parts)
    return declared


def _check_not_nested(fused: list[_Found], declared: dict[type, type[Fused]]) -> None:
    """Raise ValueError for a block in a declared one: the kernels would compute the outer one without it."""
    for outer in fused:
        if not issubclass(outer.fused, Declared):
            continue
        parts = set(outer.module.modules()) - {outer.module}
        inner = next((each for each in fused if each.module in parts), None)
        if inner is not None:
            either = outer.block + (f" or {inner.block}" if issubclass(inner.fused, Declared) else "")
            raise ValueError(
                f"block {inner.name!r}, {inner.block}, lies in block {outer.name!r}, {outer.block}, and kernels can "
                f"compute only one of the two: leave {either} out of blocks, or unfuse_ the one of an earlier call"
            )


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model
