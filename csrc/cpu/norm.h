// LayerNorm of one row of F features, and its backward with the residual: equations (1), (2), (17) to (19) of
// docs/maths.md.
#pragma once

#include "vectors.h"

namespace {

struct Statistics {
    float mean, rstd;
};

// `out`, `gamma` and `beta` have whole vectors; what lies behind the features in `out` is not to be used.
inline Statistics normalise(const float* x, int64_t F, const float* gamma, const float* beta, float eps, float* out) {
    Vector total{};
    for (int64_t f = 0; f < F; f += kLanes) total += load(x + f, F - f);
    const float mean = sum(total) / F;
    Vector squares{}, deviations{};
    for (int64_t f = 0; f < F; f += kLanes) {
        const Vector d = only(load(x + f, F - f) - mean, F - f);
        squares += d * d;
        deviations += d;
    }
    // rstd multiplies the rounding error of the mean, by a thousand in a row without variance: the rest corrects it.
    const float rest = sum(deviations) / F;
    const Statistics s{mean + rest, 1.0f / __builtin_sqrtf(sum(squares) / F - rest * rest + eps)};
    for (int64_t f = 0; f < F; f += kLanes)
        store(out + f, (load(x + f, F - f) - s.mean) * s.rstd * load(gamma + f) + load(beta + f));
    return s;
}

// dx = dy + LayerNorm'(dn), and what the row adds to dgamma and dbeta, which have whole vectors, as dn has.
inline void normalise_backward(const float* x, Statistics s, int64_t F, const float* gamma, const float* dn,
                               const float* dy, float* dx, float* dgamma, float* dbeta) {
    Vector of_mean{}, of_variance{};
    for (int64_t f = 0; f < F; f += kLanes) {
        const Vector xhat = (load(x + f, F - f) - s.mean) * s.rstd;
        const Vector d = only(load(dn + f), F - f);
        store(dgamma + f, load(dgamma + f) + only(d * xhat, F - f));
        store(dbeta + f, load(dbeta + f) + d);
        const Vector dxhat = d * load(gamma + f);
        of_mean += dxhat;
        of_variance += only(dxhat * xhat, F - f);
    }
    const float m = sum(of_mean) / F, v = sum(of_variance) / F;
    for (int64_t f = 0; f < F; f += kLanes) {
        const Vector xhat = (load(x + f, F - f) - s.mean) * s.rstd;
        const Vector dxhat = only(load(dn + f), F - f) * load(gamma + f);
        store(dx + f, load(dy + f, F - f) + s.rstd * (dxhat - m - xhat * v), F - f);
    }
}

}  // namespace
