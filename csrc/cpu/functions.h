// exp, GELU and its slope, equations (4) and (13) of docs/maths.md; the coefficients are tools/fit_cpu_gelu.py's.
#pragma once

#include "vectors.h"

namespace {

// Even powers and odd ones apart: two chains of products, each half as long, are done at the same time.
template <int Terms>
inline Vector polynomial(const float (&coefficients)[Terms], Vector x) {
    const Vector square = x * x;
    Vector last = all(coefficients[Terms - 1]), other = all(coefficients[Terms - 2]);
#pragma GCC unroll 16
    for (int i = Terms - 3; i >= 1; i -= 2) {
        last = last * square + coefficients[i];
        other = other * square + coefficients[i - 1];
    }
    if constexpr (Terms % 2 == 0) return last * x + other;
    return (last * square + coefficients[0]) + other * x;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the last bits of what it is added to are a whole number

// 2^(whole + part) from 1.5 * 2^23 plus the whole number, and |part| <= 1/2; for sums from -126 to 127.
inline Vector power_of_two(Vector shifted, Vector part) {
    constexpr float kPower[] = {1.0f,           0.693147182f,  0.240226477f,  0.0555033237f,
                                0.00961843692f, 0.0013398875f, 0.00015353362f};
    return polynomial(kPower, part) * (Vector)(((Integers)shifted << 23) + 0x3F800000);
}

inline Vector exp_bounded(Vector x) {
    constexpr float kLog2e = 1.44269502f, kRest = 1.92596303e-8f;  // of 1 / ln 2
    const Vector shifted = x * kLog2e + kRound;
    return power_of_two(shifted, (x * kLog2e - (shifted - kRound)) + x * kRest);
}

constexpr float kLeastExponent = -87.3f, kMostExponent = 88.0f;  // of normal numbers

// Where x is not above 0; 0 below the normal numbers.
inline Vector exp_of_negative(Vector x) {
    const Vector value = exp_bounded(x < kLeastExponent ? all(kLeastExponent) : x);
    return x < kLeastExponent ? Vector{} : value;
}

inline Vector exp(Vector x) {
    const Vector value = exp_of_negative(x > kMostExponent ? all(kMostExponent) : x);
    return x > kMostExponent ? all(__builtin_inff()) : value;
}

// erfc(|z| / sqrt 2) / 2, the tail of the normal distribution behind |z|, from -|z|.
inline Vector normal_tail(Vector minus_z) {
    constexpr float kExponent[] = {
        -1.0f,           1.15110493f,    -0.459212065f,    0.0524771288f,    0.00701976614f,
        8.34869861e-05f, -0.0002230838f, -5.37054875e-05f, -5.73876332e-06f, -2.37946978e-07f};
    constexpr float kEnd = -9.0f;
    const Vector exponent = polynomial(kExponent, minus_z > kEnd ? minus_z : all(kEnd));
    const Vector shifted = exponent + kRound;
    const Vector value = power_of_two(shifted, exponent - (shifted - kRound));
    return minus_z > kEnd ? value : Vector{};
}

inline Vector minus_magnitude(Vector z) { return (Vector)((Integers)z | INT32_MIN); }

constexpr float kTanh1 = 1.5957691216057308f, kTanh3 = 0.07135481282636886f;  // 2 sqrt(2 / pi) (z + 0.044715 z^3)

// Infinity, minus infinity and NaN give what PyTorch gives: infinity, NaN and NaN.
template <bool Tanh>
inline Vector gelu(Vector z) {
    if constexpr (Tanh) return z / (1.0f + exp(z * (-kTanh1 - kTanh3 * (z * z))));
    // z - z q(z) for positive z, z q(-z) for negative: what is rounded is small beside z.
    const Vector minus = minus_magnitude(z);
    const Vector bounded = minus > -9.0f ? minus : all(-9.0f);  // or infinity would be multiplied by 0
    return (z > 0.0f ? bounded : z) * normal_tail(minus) + (z > 0.0f ? z : Vector{});
}

#ifdef MIXER_KERNELS_BF16
// The same for results that are rounded to bfloat16: off by a tenth of such a rounding at most.
template <bool Tanh>
inline Vector gelu_to_round(Vector z) {
    if constexpr (Tanh) return gelu<true>(z);
    constexpr float kEnd = -6.0f;
    constexpr float kRoot[] = {0.957614243f,    0.047930941f,    -0.0173797794f, 0.00175569381f,
                               0.000842589361f, 7.42656994e-05f, 2.01421881e-06f};  // of the tail, the 16th
    const Vector minus = minus_magnitude(z);
    const Vector bounded = minus > kEnd ? minus : all(kEnd);
    Vector tail = polynomial(kRoot, bounded);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) tail *= tail;
    return bounded * tail + (z < 0.0f ? z * 0.0f : z);  // minus infinity times 0 is NaN, as in PyTorch
}
#endif

// GELU's value in place of z, and its slope.
template <bool Tanh>
inline Vector gelu_and_slope(Vector& z) {
    if constexpr (Tanh) {
        const Vector square = z * z < 100.0f ? z * z : all(100.0f);  // the sigmoid is 0 or 1 there
        const Vector cdf = 1.0f / (1.0f + exp(z * (-kTanh1 - kTanh3 * square)));
        z = z * cdf;
        return cdf + z * (1.0f - cdf) * (kTanh1 + 3.0f * kTanh3 * square);
    } else {
        const Vector tail = normal_tail(minus_magnitude(z));
        const Vector density = 0.398942280f * exp_of_negative(-0.5f * z * z);
        const Vector slope = (z > 0.0f ? 1.0f - tail : tail) + z * density;
        z = gelu<false>(z);
        return slope;
    }
}

}  // namespace
