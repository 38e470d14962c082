// LayerNorm of one row of F features, and its backward with the residual: equations (1), (2), (17) to (19) of
// docs/maths.md.
#pragma once

#include "vectors.h"

namespace {

struct Statistics {
    float mean[kLanes], rstd[kLanes];
};

// Of up to kLanes rows, so that their sums are taken at once.
template <class T>
inline Statistics statistics_of(const T* const* x, int64_t rows, int64_t F, float eps) {
    const float scale = 1.0f / F;
    Vector parts[kLanes], squares[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
        parts[i] = Vector{};
        for (int64_t f = 0; i < rows && f < F; f += kLanes) parts[i] += load(x[i] + f, F - f);
    }
    Statistics s;
    const Vector mean = sums(parts) * scale;
    store(s.mean, mean);
    for (int64_t i = 0; i < kLanes; ++i) {
        parts[i] = squares[i] = Vector{};
        for (int64_t f = 0; i < rows && f < F; f += kLanes) {
            const Vector d = only(load(x[i] + f, F - f) - s.mean[i], F - f);
            squares[i] += d * d;
            parts[i] += d;
        }
    }
    // rstd multiplies the rounding error of the mean, by a thousand in a row without variance: the rest corrects it.
    const Vector rest = sums(parts) * scale;
    const Vector square = sums(squares) * scale;
    const Vector variance = square - (square < __builtin_inff() ? rest * rest : Vector{}) + eps;  // or infinity twice
    store(s.mean, mean + rest);
    for (int64_t i = 0; i < kLanes; ++i) s.rstd[i] = 1.0f / __builtin_sqrtf(variance[i]);
    return s;
}

// Those with which LayerNorm is its affine map alone.
inline Statistics no_statistics() {
    Statistics s;
    store(s.mean, Vector{});
    store(s.rstd, all(1.0f));
    return s;
}

// `out`, `gamma` and `beta` have whole vectors; what lies behind the features in `out` is not to be used.
template <class T>
inline void normalise(const T* x, float mean, float rstd, int64_t F, const float* gamma, const float* beta,
                      float* out) {
    for (int64_t f = 0; f < F; f += kLanes)
        store(out + f, (load(x + f, F - f) - mean) * rstd * load(gamma + f) + load(beta + f));
}

// dx = dy + LayerNorm'(dn) of up to kLanes rows, or the affine map's, and what they add to dgamma and dbeta, which have
// whole vectors, as dn has.
inline void normalise_backward(const float* const* x, const Statistics& s, bool affine, int64_t rows, int64_t F,
                               const float* gamma, const float* const* dn, const float* const* dy, float* const* dx,
                               float* dgamma, float* dbeta) {
    const float scale = 1.0f / F;
    Vector of_mean[kLanes], of_variance[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
        of_mean[i] = of_variance[i] = Vector{};
        for (int64_t f = 0; i < rows && f < F; f += kLanes) {
            const Vector xhat = (load(x[i] + f, F - f) - s.mean[i]) * s.rstd[i];
            const Vector d = only(load(dn[i] + f), F - f);
            const Vector product = only(d * xhat, F - f);
            store(dgamma + f, load(dgamma + f) + product);
            store(dbeta + f, load(dbeta + f) + d);
            of_mean[i] += d * load(gamma + f);
            of_variance[i] += product * load(gamma + f);
        }
    }
    float m[kLanes], v[kLanes];
    store(m, affine ? Vector{} : sums(of_mean) * scale);
    store(v, affine ? Vector{} : sums(of_variance) * scale);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t f = 0; f < F; f += kLanes) {
            const Vector xhat = (load(x[i] + f, F - f) - s.mean[i]) * s.rstd[i];
            const Vector dxhat = load(dn[i] + f) * load(gamma + f);
            store(dx[i] + f, load(dy[i] + f, F - f) + s.rstd[i] * (dxhat - m[i] - xhat * v[i]), F - f);
        }
}

}  // namespace
