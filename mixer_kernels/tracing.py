"""What else PyTorch is doing while it calls this package: compiling, exporting, transforming functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 does not tell


def constant_while_tracing(function: F) -> F:
    """Have dynamo call ``function`` once and take its result as a constant, instead of tracing into it.

    Does what ``torch.compiler.assume_constant_result`` does in torch 2.6 to 2.14, without importing torch._dynamo,
    which takes over a second and brings Triton along.
    """
    function._dynamo_marked_constant = True
    return function


@constant_while_tracing
def transform() -> str | None:
    """What differentiates PyTorch's operators right now, as a reason to run them; None for plain autograd.

    ``torch.func``'s grad, vjp, jvp and all that is made of them, and a dual level of forward-mode differentiation: the
    operators of this package have no rules for those. ``vmap`` alone calls them once for each element, and is none.
    """
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None:
        differentiating = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
        if any(interpreter.key() in differentiating for interpreter in functorch.get_interpreter_stack()):
            return "torch.func differentiates PyTorch's operators alone"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation knows PyTorch's operators alone"
    return None


def is_watched() -> bool:
    """Whether anything beside plain autograd has a part in calls of operators right now, or looks at them."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
    )
