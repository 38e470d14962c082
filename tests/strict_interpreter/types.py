"""Triton's block types and shapes, each made once: stock makes them anew in every operation, for half of its time."""

from __future__ import annotations

from typing import Any

import triton.language as tl

_block_type, _tensor = tl.block_type.__init__, tl.tensor.__init__
_types: dict[tuple, dict[str, Any]] = {}  # attributes of a type by what it is made of, which never change


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """In place of ``tl.block_type.__init__``."""
    key = (element_ty.name, *(tl.core._unwrap_if_constexpr(size) for size in shape))
    if key not in _types:
        _block_type(self, element_ty, shape)
        _types[key] = dict(self.__dict__)
    self.__dict__.update(_types[key])


def tensor(self: Any, handle: Any, type: Any) -> None:
    """In place of ``tl.tensor.__init__``: the shape, in which nothing is ever set, is its type's."""
    if not hasattr(type, "_shape_of_tensors"):
        _tensor(self, handle, type)
        type._shape_of_tensors = self.shape, self.numel
        if type.is_block():
            _types[(type.element_ty.name, *type.shape)]["_shape_of_tensors"] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type._shape_of_tensors
