"""What torch.compile is told about this package's plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_while_tracing(function: F) -> F:
    """Have dynamo call ``function`` once and take its result as a constant, instead of tracing into it.

    Does what ``torch.compiler.assume_constant_result`` does in torch 2.6 to 2.14, without importing torch._dynamo,
    which takes over a second and brings Triton along.
    """
    function._dynamo_marked_constant = True
    return function
