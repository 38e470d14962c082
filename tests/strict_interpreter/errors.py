"""What the strict interpreter raises. Every message names kernel, program, argument and element where it has them."""

from __future__ import annotations


class StrictError(AssertionError):
    """A kernel did what the hardware doesn't promise to do right."""


class OutOfBounds(StrictError):
    """An unmasked lane touched memory that is no element of the tensor argument its pointer came from."""


class Race(StrictError):
    """Without atomics, two programs or two lanes of one store met on an element that one of them wrote."""


class Int32Overflow(StrictError):
    """Integer arithmetic left the range of its type (int32, or a narrower or unsigned one)."""


class GridTooLarge(StrictError):
    """A launch asked for more programs on an axis than CUDA allows."""
