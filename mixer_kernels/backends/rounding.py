"""Sizes in whole tiles."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``a``."""
    return cdiv(a, multiple) * multiple
