"""bfloat16 in NumPy, which has no such type: 16-bit patterns in uint16 arrays, arithmetic in float32.

A float32 has 24 significant bits, more than twice bfloat16's 8 plus 2, so rounding an exact +, -, *, / or sqrt to
float32 first and then to bfloat16 gives the correctly rounded bfloat16 result.
"""

from __future__ import annotations

import numpy as np

NAN = np.uint16(0x7FC0)


def decode(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns to the float32 values that they stand for, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """Values of any real dtype to uint16 patterns, through float32, rounded to nearest even; every NaN is 0x7FC0."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    last_kept_bit = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (np.uint32(0x7FFF) + last_kept_bit)) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, NAN, rounded) if nan.any() else rounded
