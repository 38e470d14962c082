// GELU and its derivative for outputs of 16 bits, equations (4), (9) and (13) of docs/maths.md.
#pragma once

#include "numbers.cuh"
#include "platform.cuh"

namespace mixer_kernels {

struct GeluGradient {
    float a;      // GELU(z)
    float slope;  // GELU'(z)
};

__device__ __forceinline__ float sigmoid(float v) { return reciprocal_approx(1.0f + exp_approx(-v)); }

// The standard normal distribution function, and z times it within 3.1e-6: sigmoid(z p(z^2)). p is positive everywhere
// and grows, so that far out the sigmoid is 0 or 1, also where z^2 overflows. rsqrt(1 + e^-v)^2 is sigmoid(v).
__device__ __forceinline__ float fitted_cdf(float z) {
    const float t = z * z;
    const float p = 1.5956563f + t * (0.07293758f + t * (-2.4972143e-4f + t * (-6.11624e-5f + t * 2.2381878e-6f)));
    const float q = rsqrt_approx(1.0f + exp_approx(-z * p));
    return q * q;
}

// The tanh form or the erf form. As sigmoids both keep the negative tail's relative accuracy, which 1 + tanh(...)
// cancels away.
__device__ __forceinline__ float gelu(float z, bool tanh_form) {
    if (tanh_form) return z * sigmoid(1.5957691216057308f * (z + 0.044715f * z * z * z));
    return z * fitted_cdf(z);
}

// Either form without a branch, for kernels that learn at run time which one they compute: z sigmoid(z p(z^2)) with the
// form's polynomial, times -log2(e) for the base of the exponential.
struct GeluForm {
    float p[5];
    bool is_tanh;

    explicit GeluForm(bool tanh_form) : is_tanh(tanh_form) {
        constexpr double erf[5] = {1.5956563, 0.07293758, -2.4972143e-4, -6.11624e-5, 2.2381878e-6};
        constexpr double tanh[5] = {1.5957691216057308, 0.07135481282636886};
        for (int i = 0; i < 5; ++i) p[i] = static_cast<float>(-1.4426950408889634 * (tanh_form ? tanh : erf)[i]);
    }

    __device__ __forceinline__ float cdf(float z, float t) const {  // t = z^2, below what overflows
        const float of_t = p[0] + t * (p[1] + t * (p[2] + t * (p[3] + t * p[4])));
        return reciprocal_approx(1.0f + exp2_approx(z * of_t));
    }
};

__device__ __forceinline__ float square_below_overflow(float z) { return fminf(z * z, 100.0f); }  // its cdf is 0 or 1

__device__ __forceinline__ float gelu(float z, const GeluForm& form) {
    return z * form.cdf(z, square_below_overflow(z));
}

// The erf form's, with z phi(z) as below.
__device__ __forceinline__ GeluGradient gelu_and_slope_erf(float z, const GeluForm& form) {
    const float t = square_below_overflow(z), cdf = form.cdf(z, t);
    return {z * cdf, cdf + z * (0.3989422804014327f * exp2_approx(-0.7213475204444817f * t))};
}

// The tanh form's.
__device__ __forceinline__ GeluGradient gelu_and_slope_tanh(float z, const GeluForm& form) {
    const float t = square_below_overflow(z), cdf = form.cdf(z, t), a = z * cdf;
    return {a, cdf + a * (1.0f - cdf) * (1.5957691216057308f + 0.21406443847910659f * t)};
}

__device__ __forceinline__ GeluGradient gelu_and_slope(float z, bool tanh_form) {
    if (tanh_form) {
        const float t = fminf(z * z, 100.0f);  // past the clamp the sigmoid is 0 or 1
        const float cdf = sigmoid(z * (1.5957691216057308f + 0.07135481282636886f * t));
        const float a = z * cdf;
        return {a, cdf + a * (1.0f - cdf) * (1.5957691216057308f + 0.21406443847910659f * t)};
    }
    const float cdf = fitted_cdf(z);
    // The exact z * phi(z): a systematic error of the slope would not average out in a weight gradient.
    return {z * cdf, cdf + z * (0.3989422804014327f * exp_approx(-0.5f * z * z))};
}

}  // namespace mixer_kernels
