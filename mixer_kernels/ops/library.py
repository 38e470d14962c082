"""How the operators of this package are defined, and the shapes that their fake implementations give.

``Library.define`` rather than ``custom_op``: a call costs a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Operators, registered once; no state of any call.
_library = torch.library.Library("mixer_kernels", "DEF")

HALF = "Tensor? gamma, Tensor? beta, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"
NOISE = "float dropout_p, float drop_path_p, Tensor? seed"


def define(name: str, schema: str, implementation: Callable, fake: Callable) -> Callable:
    """The operator ``mixer_kernels::name``."""
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixer_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.mixer_kernels, name).default


def differentiate(name: str, backward: Callable | None = None, save: Callable | None = None) -> None:
    """Give ``mixer_kernels::name`` its gradient; without ``backward``, an error that says what has one."""
    torch.library.register_autograd(
        f"mixer_kernels::{name}", backward or _no_gradient, setup_context=save, lib=_library
    )


def _no_gradient(ctx, *_):
    raise RuntimeError(
        "the fused mixer operators have no gradient here (a second derivative, or mixer_block called as an operator): "
        "use backend='torch', which autograd differentiates any number of times"
    )


def new_like(x: Tensor) -> Tensor:
    """A new contiguous tensor of ``x``'s shape."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of the rows of ``x [B, S, C]``."""
    rows = x.shape[0] * x.shape[1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, x: Tensor) -> Tensor:
    """``[rows, columns]`` whose rows start on 16 bytes, as backends make z."""
    multiple = 16 // dtype.itemsize
    return x.new_empty(rows, (columns + multiple - 1) // multiple * multiple, dtype=dtype)[:, :columns]


def absent(x: Tensor) -> Tensor:
    """An operator's result cannot be None: an empty tensor stands for it."""
    return x.new_empty(0)


def or_absent(results: Iterable[Tensor | None], x: Tensor) -> list[Tensor]:
    """What an operator returns for ``results`` of which some are None."""
    return [absent(x) if result is None else result.contiguous() for result in results]


def new_gradients(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """The fake of a backward operator's result."""
    return [new_like(t) if want else absent(inputs[0]) for t, want in zip(inputs, wanted, strict=True)]


def or_none(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of a backward operator as autograd takes them."""
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
