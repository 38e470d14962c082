"""What calls that look the same have in common: found by the first, kept for the others.

The key is all that it follows from: functions, options, what is asked for and switched on, and of each tensor the
address, dtype, shape, strides and device, read anew in every call. What is kept cannot be stale, then, whoever writes
to a weight, swaps or converts it; a key that is not met again is only memory, and there is an end to that too. Neither
tensors nor what is in them are kept.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

MOST = 1024  # a few KiB each
_known: dict[Hashable, Any] = {}  # threads may find the same at once: the last one stays


def recall(key: Hashable) -> Any:
    """What was remembered under ``key``, or None."""
    return _known.get(key)


def remember(key: Hashable, value: Any) -> None:
    """Keep ``value`` under ``key``."""
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = value


def forget() -> None:
    """Everything: for who replaces a backend's kernels."""
    _known.clear()
