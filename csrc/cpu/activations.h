// Activations of rows of whole vectors, and their slopes: equations (4) and (13) of docs/maths.md, ReLU, SiLU.
#pragma once

#include "functions.h"
#include "tsmixer.h"

namespace {

using mixer_kernels::cpu::Activation;

template <Activation Kind>
inline Vector activated(Vector z) {
    if constexpr (Kind == Activation::kRelu) return z <= 0.0f ? Vector{} : z;  // NaN stays
    if constexpr (Kind == Activation::kSilu) return z / (1.0f + exp(-z));
    return gelu<Kind == Activation::kGeluTanh>(z);
}

// The value in place of z, and the slope.
template <Activation Kind>
inline Vector activated_and_slope(Vector& z) {
    if constexpr (Kind == Activation::kRelu) {
        const Vector slope = z <= 0.0f ? Vector{} : all(1.0f);
        z = activated<Kind>(z);
        return slope;
    } else if constexpr (Kind == Activation::kSilu) {
        const Vector sigmoid = 1.0f / (1.0f + exp(-z));
        const Vector slope = sigmoid * (1.0f + z * (1.0f - sigmoid));
        z = z * sigmoid;
        return slope;
    } else {
        return gelu_and_slope<Kind == Activation::kGeluTanh>(z);
    }
}

// `slope` may be null, and has z's stride.
template <Activation Kind>
inline void activate_as(int64_t rows, int64_t columns, float* z, float* slope, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r * stride; c < r * stride + columns; c += kLanes) {
            Vector value = load(z + c);
            if (slope)
                store(slope + c, activated_and_slope<Kind>(value));
            else
                value = activated<Kind>(value);
            store(z + c, value);
        }
}

inline void activate(Activation kind, int64_t rows, int64_t columns, float* z, float* slope, int64_t stride) {
    if (kind == Activation::kRelu) return activate_as<Activation::kRelu>(rows, columns, z, slope, stride);
    if (kind == Activation::kSilu) return activate_as<Activation::kSilu>(rows, columns, z, slope, stride);
    if (kind == Activation::kGeluTanh) return activate_as<Activation::kGeluTanh>(rows, columns, z, slope, stride);
    activate_as<Activation::kGelu>(rows, columns, z, slope, stride);
}

}  // namespace
