"""GELU on a tile, equation (4) of docs/maths.md."""

import triton
import triton.language as tl


@triton.jit
def gelu(z, TANH: tl.constexpr, EXACT: tl.constexpr):
    """GELU of float32 ``z``: the tanh form, the erf form (``EXACT``, for float32 outputs), or a fit to the erf form.

    The fit, z * sigmoid(2 z p(z^2)), is within 3.0e-5 of the erf form: below the rounding of 16-bit outputs, and
    without erf's 25 instructions. z^2 is clamped at 36 because the quartic turns negative for |z| > 11. Both sigmoid
    forms keep the negative tail's relative accuracy, which 1 + tanh(...) cancels away.
    """
    if TANH:
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif EXACT:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        t = tl.minimum(z * z, 36.0)
        # rsqrt(1 + e^-2u)^2 is sigmoid(2u) without a division
        q = tl.rsqrt(1.0 + tl.exp(z * (-1.594916 + t * (-0.0741020 + 7.17734e-4 * t))))
        return z * q * q
