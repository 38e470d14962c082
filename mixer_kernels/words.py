"""What the package says to its users: a choice that is refused, and what is logged once in a process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from .tracing import constant_while_tracing

logger = logging.getLogger("mixer_kernels")


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value`` if it is allowed; else a ValueError that names the argument."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


@constant_while_tracing
def warn_once(message: str) -> None:
    """Log ``message``, once in this process; tests clear ``_warn``."""
    _warn(message)


@functools.cache  # only what has been said
def _warn(message: str) -> None:
    logger.warning(message)
