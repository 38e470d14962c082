// exp, GELU and its slope, equations (4) and (13) of docs/maths.md; the coefficients are tools/fit_cpu_gelu.py's.
#pragma once

#include "vectors.h"

namespace {

template <int Terms>
inline Vector polynomial(const float (&coefficients)[Terms], Vector x) {
    Vector value = all(coefficients[Terms - 1]);
#pragma GCC unroll 16
    for (int i = Terms - 2; i >= 0; --i) value = value * x + coefficients[i];
    return value;
}

// 2^(whole + part) from a whole number, |part| <= 1/2; 0 below the normal numbers, infinity above.
inline Vector power_of_two(Vector whole, Vector part) {
    constexpr float kPower[] = {1.0f,           0.693147182f,  0.240226477f,  0.0555033237f,
                                0.00961843692f, 0.0013398875f, 0.00015353362f};
    const Vector bounded = whole < -127.0f ? all(-127.0f) : (whole > 127.0f ? all(127.0f) : whole);
    // Behind 1.5 * 2^23 the last bits of a float are a whole number.
    const Integers exponent = (Integers)(bounded + 12582912.0f) - 0x4B400000;
    const Vector value = polynomial(kPower, part) * (Vector)((exponent + 127) << 23);
    return whole > 127.0f ? all(__builtin_inff()) : value;
}

inline Vector rounded(Vector x) { return (x + 12582912.0f) - 12582912.0f; }

inline Vector exp(Vector x) {
    constexpr float kLog2e = 1.44269502f, kRest = 1.92596303e-8f;                    // of 1 / ln 2
    const Vector far = x < -200.0f ? all(-200.0f) : (x > 200.0f ? all(200.0f) : x);  // 200 / ln 2 can be rounded
    const Vector whole = rounded(far * kLog2e);
    return power_of_two(whole, (far * kLog2e - whole) + far * kRest);
}

// erfc(|z| / sqrt 2) / 2, the tail of the normal distribution behind |z|, from -|z|.
inline Vector normal_tail(Vector minus_z) {
    constexpr float kExponent[] = {
        -1.0f,           1.15110493f,    -0.459212065f,    0.0524771288f,    0.00701976614f,
        8.34869861e-05f, -0.0002230838f, -5.37054875e-05f, -5.73876332e-06f, -2.37946978e-07f};
    constexpr float kEnd = -9.0f;
    const Vector bounded = minus_z > kEnd ? minus_z : all(kEnd);
    const Vector exponent = polynomial(kExponent, bounded);
    const Vector whole = rounded(exponent);
    return minus_z > kEnd ? power_of_two(whole, exponent - whole) : Vector{};
}

constexpr float kTanh1 = 1.5957691216057308f, kTanh3 = 0.07135481282636886f;  // 2 sqrt(2 / pi) (z + 0.044715 z^3)

// Infinity, minus infinity and NaN give what PyTorch gives: infinity, NaN and NaN.
template <bool Tanh>
inline Vector gelu(Vector z) {
    if constexpr (Tanh) return z / (1.0f + exp(z * (-kTanh1 - kTanh3 * (z * z))));
    // z - z q(z) for positive z, z q(-z) for negative: what is rounded is small beside z.
    const Vector minus = z > 0.0f ? -z : z;
    const Vector factor = z > 0.0f ? (z < 9.0f ? -z : all(-9.0f)) : z;
    return factor * normal_tail(minus) + (z > 0.0f ? z : Vector{});
}

// GELU's value in place of z, and its slope.
template <bool Tanh>
inline Vector gelu_and_slope(Vector& z) {
    if constexpr (Tanh) {
        const Vector square = z * z < 100.0f ? z * z : all(100.0f);  // the sigmoid is 0 or 1 there
        const Vector cdf = 1.0f / (1.0f + exp(z * (-kTanh1 - kTanh3 * square)));
        z = z * cdf;
        return cdf + z * (1.0f - cdf) * (kTanh1 + 3.0f * kTanh3 * square);
    } else {
        const Vector tail = normal_tail(z > 0.0f ? -z : z);
        const Vector density = 0.398942280f * exp(-0.5f * z * z);
        const Vector slope = (z > 0.0f ? 1.0f - tail : tail) + z * density;
        z = gelu<false>(z);
        return slope;
    }
}

}  // namespace
