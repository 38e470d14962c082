// LayerNorm over the tokens and the channels of an image at once, or an affine map with a factor and an addend to each
// element; equations (36) and (39) of docs/maths.md.
#pragma once

#include "vectors.h"

namespace {

struct Moments {
    float mean = 0.0f, rstd = 1.0f;  // those of the affine map
};

// Of S rows of C values; where rows lie in memory each function is told. gamma and beta [S, C] may be null.
struct JointNorm {
    int64_t S, C;
    const float *gamma, *beta;
    bool affine;
    float eps;

    Moments moments(const float* x, int64_t stride) const {
        Moments m;
        if (affine) return m;
        const float scale = 1.0f / (S * C);
        m.mean = sum(added(x, stride, [](Vector v) { return v; })) * scale;
        // rstd multiplies the rounding error of the mean, by a thousand without variance: the rest corrects it.
        const float rest = sum(added(x, stride, [&](Vector v) { return v - m.mean; })) * scale;
        const float square = sum(added(x, stride,
                                       [&](Vector v) {
                                           const Vector d = v - m.mean;
                                           return d * d;
                                       })) *
                             scale;
        m.mean += rest;
        const float variance = square - (square < __builtin_inff() ? rest * rest : 0.0f);  // or infinity twice
        m.rstd = 1.0f / __builtin_sqrtf(variance + eps);
        return m;
    }

    void apply(Moments m, const float* x, int64_t stride, float* to, int64_t to_stride, int64_t first,
               int64_t count) const {
        for (int64_t s = 0; s < S; ++s) row(m, s, x + s * stride, to + s * to_stride, first, count);
    }

    // Row s, of its columns `count` from `first` on.
    void row(Moments m, int64_t s, const float* x, float* to, int64_t first, int64_t count) const {
        for (int64_t c = 0; c < count; c += kLanes) {
            const int64_t at = s * C + first + c, left = count - c;
            Vector v = (load(x + c, left) - m.mean) * m.rstd;
            if (gamma) v = v * load(gamma + at, left);
            if (beta) v = v + load(beta + at, left);
            store(to + c, v, left);
        }
    }

    // dx = more + Norm'(dn) of what had x and these moments; `more`, dgamma and dbeta [S, C] may be null.
    void backward(Moments m, const float* x, int64_t stride, const float* dn, int64_t dn_stride, const float* more,
                  int64_t more_stride, float* dx, int64_t dx_stride, float* dgamma, float* dbeta) const {
        Vector of_mean{}, of_variance{};
        for (int64_t s = 0; s < S; ++s) {
            Vector mean_of_row{}, variance_of_row{};
            for (int64_t c = 0; c < C; c += kLanes) {
                const int64_t at = s * C + c, left = C - c;
                const Vector d = load(dn + s * dn_stride + c, left);
                const Vector product = only(d * (load(x + s * stride + c, left) - m.mean) * m.rstd, left);
                const Vector factor = gamma ? load(gamma + at, left) : all(1.0f);
                mean_of_row += d * factor;
                variance_of_row += product * factor;
                if (dgamma) store(dgamma + at, load(dgamma + at, left) + product, left);
                if (dbeta) store(dbeta + at, load(dbeta + at, left) + d, left);
            }
            of_mean += mean_of_row;
            of_variance += variance_of_row;
        }
        const float scale = affine ? 0.0f : 1.0f / (S * C);
        const float a = affine ? 0.0f : sum(of_mean) * scale, b = affine ? 0.0f : sum(of_variance) * scale;
        for (int64_t s = 0; s < S; ++s)
            for (int64_t c = 0; c < C; c += kLanes) {
                const int64_t left = C - c;
                const Vector xhat = (load(x + s * stride + c, left) - m.mean) * m.rstd;
                Vector d = load(dn + s * dn_stride + c, left);
                if (gamma) d = d * load(gamma + s * C + c, left);
                Vector result = m.rstd * (d - a - xhat * b);
                if (more) result += load(more + s * more_stride + c, left);
                store(dx + s * dx_stride + c, result, left);
            }
    }

  private:
    // By rows, and four rows at a time, so that several sums are under way.
    template <class FUNCTION>
    Vector added(const float* x, int64_t stride, FUNCTION function) const {
        Vector total{};
        for (int64_t s = 0; s < S; s += 4) {
            Vector parts[4] = {};
            for (int64_t c = 0; c < C; c += kLanes)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    if (s + i < S) parts[i] += only(function(load(x + (s + i) * stride + c, C - c)), C - c);
            total += (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
        return total;
    }
};

}  // namespace
