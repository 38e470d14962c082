"""GELU on a tile and its derivative, equations (4), (9) and (13) of docs/maths.md: the tanh form, the erf form for
float32 outputs, and a fit to the erf form.

Both sigmoid forms keep the negative tail's relative accuracy, which 1 + tanh(...) cancels away. The fit's slope takes
the exact z * phi(z): a systematic error would not average out in a weight gradient.

exp(v) is exp2(v log2(e)), and log2(e) is in the coefficients: GPUs have exp2; exp is a product more and, for subnormal
results, which exp2 flushes to zero, three instructions.
"""

import triton
import triton.language as tl


@triton.jit
def _fitted_cdf(z):
    """The standard normal distribution function within 6.8e-6, and z times it within 3.1e-6: sigmoid(z p(z^2)).

    Far below the rounding of 16-bit outputs, and a third of erf's instructions. rsqrt(1 + e^-v)^2 is sigmoid(v)
    without a division. p is positive everywhere and grows, so that far out the sigmoid is 0 or 1, also where z^2
    overflows.
    """
    t = z * z
    p = 2.3020454 + t * (0.10522668 + t * (-3.6027187e-4 + t * (-8.823869e-5 + t * 3.2290224e-6)))
    q = tl.rsqrt(1.0 + tl.exp2(-z * p))
    return q * q


@triton.jit
def gelu_tanh(z):
    return z / (1.0 + tl.exp2(-z * (2.302208198144325 + 0.10294323460816256 * z * z)))


@triton.jit
def gelu_erf(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_fit(z):
    return z * _fitted_cdf(z)


@triton.jit
def gelu_tanh_and_slope(z):
    # z * sigmoid(v): slope = sigmoid + z * v' * sigmoid * (1 - sigmoid); past the clamp sigmoid is 0 or 1
    t = tl.minimum(z * z, 100.0)
    cdf = 1.0 / (1.0 + tl.exp2(-z * (2.302208198144325 + 0.10294323460816256 * t)))
    a = z * cdf
    return a, cdf + a * (1.0 - cdf) * (1.5957691216057308 + 0.21406443847910659 * t)


@triton.jit
def gelu_erf_and_slope(z):
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return z * cdf, cdf + z * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z))


@triton.jit
def gelu_fit_and_slope(z):
    cdf = _fitted_cdf(z)
    return z * cdf, cdf + z * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z))
