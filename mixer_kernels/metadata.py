"""What a call compares before it repeats the one before: tensors but for their numbers, modules but for their mode.

In Python that is two thirds of a small layer's host time. The compiled module ``mixer_kernels._metadata``, built with
the CPU kernels, compares the same; it reads tensors through DLPack's C functions, which torch has from 2.10 on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

_CANNOT_BE_COMPARED = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


class Remembered(NamedTuple):
    """A module without hooks, and what was read from it."""

    module: nn.Module
    cls: type[nn.Module]
    size: int
    """How many attributes it had."""
    names: tuple[str, ...]
    read: itemgetter
    values: tuple[Any, ...]
    """Of attributes that can be compared: ``read`` gives the values from the module's ``__dict__``."""
    children: dict[str, nn.Module | None]
    weights: tuple[type, ...]
    """The classes of its parameters."""


def described(tensors: list[Tensor | None]) -> Hashable:
    """Address, dtype, shape, strides of each, and whether PyTorch negates what is read from it.

    Raises:
        RuntimeError: a sparse or nested tensor, which has no address or no strides.
    """
    return _describe()(tensors)


def are_unchanged(modules: list[Remembered]) -> bool:
    """Whether each is what it was, and still without hooks."""
    try:
        return _unchanged()(modules)
    except _CANNOT_BE_COMPARED:
        return False


def describe_in_python(tensors: Sequence[Tensor | None]) -> Hashable:
    """``described`` without the compiled module."""
    return tuple([None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg()) for t in tensors])


def unchanged_in_python(modules: Sequence[Remembered]) -> bool:
    """``are_unchanged`` without the compiled module."""
    for module, cls, size, _, read, values, children, weights in modules:
        attributes = module.__dict__
        if (
            type(module) is not cls
            or len(attributes) != size
            or attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or read(attributes) != values
            or (children and attributes["_modules"] != children)
            or (weights and tuple(map(type, attributes["_parameters"].values())) != weights)
        ):
            return False
    return True


@functools.cache  # what is installed does not change
def _compiled() -> ModuleType | None:
    with contextlib.suppress(ImportError):
        return importlib.import_module("._metadata", __package__)


@functools.cache  # as _compiled
def _describe() -> Callable[[list[Tensor | None]], Hashable]:
    module, table = _compiled(), getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if module is None or table is None:
        return describe_in_python
    try:
        return module.Describe(table)
    except RuntimeError:  # another version of DLPack
        return describe_in_python


@functools.cache  # as _compiled
def _unchanged() -> Callable[[list[Remembered]], bool]:
    module = _compiled()
    return unchanged_in_python if module is None else module.Unchanged()
