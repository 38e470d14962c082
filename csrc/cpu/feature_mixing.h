// Feature mixing of TSMixer on a group of images: equations (36), (38) to (40) of docs/maths.md.
//
// Rows are those of memory: a token each. Weights are on the right of the products, their rows in whole vectors.
#pragma once

#include "activations.h"
#include "arena.h"
#include "joint_norm.h"
#include "noise.h"
#include "plane.h"
#include "product.h"

namespace {

using mixer_kernels::cpu::TsmixerCall;

inline int64_t whole(int64_t columns) { return round_up(columns, kLanes); }

// Where a task's sums for the gradients lie: those of transposed weights, in rows of whole vectors.
struct FeatureSums {
    float *w1, *b1, *w2, *b2, *w_skip, *b_skip, *gamma, *beta;

    FeatureSums(Arena& arena, const TsmixerCall& call) {
        const bool skip = call.parameters.w_skip != nullptr;
        const int64_t of_norm = call.S * (call.norm_first ? call.C : call.O);
        w1 = arena.take(call.C * whole(call.H));
        b1 = arena.take(whole(call.H));
        w2 = arena.take(call.H * whole(call.O));
        b2 = arena.take(whole(call.O));
        w_skip = arena.take(skip ? call.C * whole(call.O) : 0);
        b_skip = arena.take(whole(call.O));
        gamma = arena.take(of_norm);
        beta = arena.take(of_norm);
    }
};

// The weights, and their transposes, in rows of whole vectors, zeros behind.
struct FeatureWeights {
    const float *w1_turned, *w2_turned, *skip_turned, *w1, *w2, *skip;

    FeatureWeights(Arena& arena, const TsmixerCall& call, bool fill) {
        const auto& p = call.parameters;
        w1_turned = turned(p.w1, call.H, call.C, arena, fill);
        w2_turned = turned(p.w2, call.O, call.H, arena, fill);
        skip_turned = p.w_skip ? turned(p.w_skip, call.O, call.C, arena, fill) : nullptr;
        w1 = w2 = skip = nullptr;
        if (!call.dy) return;
        w1 = padded(p.w1, call.H, call.C, arena, fill);
        w2 = padded(p.w2, call.O, call.H, arena, fill);
        if (p.w_skip) skip = padded(p.w_skip, call.O, call.C, arena, fill);
    }

  private:
    static float* turned(const float* matrix, int64_t rows, int64_t columns, Arena& arena, bool fill) {
        float* to = arena.take(columns * whole(rows));
        for (int64_t r = 0; fill && r < rows; r += kLanes)
            for (int64_t c = 0; c < columns; c += kLanes) {
                Vector tile[kLanes];
                for (int i = 0; i < kLanes; ++i)
                    tile[i] = r + i < rows ? load(matrix + (r + i) * columns + c, columns - c) : Vector{};
                transpose(tile);
                for (int i = 0; i < kLanes && c + i < columns; ++i) store(to + (c + i) * whole(rows) + r, tile[i]);
            }
        return to;
    }

    static float* padded(const float* matrix, int64_t rows, int64_t columns, Arena& arena, bool fill) {
        float* to = arena.take(rows * whole(columns));
        for (int64_t r = 0; fill && r < rows; ++r)
            for (int64_t c = 0; c < columns; c += kLanes)
                store(to + r * whole(columns) + c, load(matrix + r * columns + c, columns - c));
        return to;
    }
};

class FeatureMixing {
  public:
    using Sums = FeatureSums;

    static int64_t images_of(const TsmixerCall& call) {
        constexpr int64_t kEnough = 48, kRows = 96;
        return call.S >= kEnough ? 1 : divided_up(kRows, call.S);
    }

    FeatureMixing(Arena& arena, const TsmixerCall& call, const FeatureWeights& weights, int64_t images)
        : call_(call),
          weights_(weights),
          norm_{call.S,  call.norm_first ? call.C : call.O, call.parameters.gamma, call.parameters.beta, call.affine,
                call.eps} {
        // Backward takes images whole, for the sums over them.
        constexpr int64_t kFloats = 24576, kRows = 24;
        const int64_t all = images * call.S, most = kFloats / (call.C + call.H + call.O) / kRows;
        rows_ = call.dy ? all : least(largest(most, 1) * kRows, all);
        const int64_t C = whole(call.C), H = whole(call.H), O = whole(call.O);
        n_ = arena.take(call.norm_first ? rows_ * C : 0);
        hidden_ = arena.take(rows_ * H);
        v_ = arena.take(rows_ * O);
        moments_ = reinterpret_cast<Moments*>(arena.take(2 * images));
        slope_ = g_ = d_ = dn_ = nullptr;
        if (!call.dy) return;
        slope_ = arena.take(rows_ * H);
        g_ = arena.take(rows_ * O);
        d_ = call.dropout_p > 0.0f ? arena.take(rows_ * O) : g_;
        dn_ = arena.take(rows_ * C);
    }

    // y of `count` images from number `first`.
    void forward(int64_t first, int64_t count) {
        const int64_t S = call_.S, O = call_.O, begin = first * S, end = (first + count) * S;
        take_moments(first, count);
        for (int64_t row = begin; row < end; row += rows_) {
            const int64_t rows = least(rows_, end - row);
            hidden(first, row, rows, nullptr);
            result(row, rows);
            to_memory(rows, O, v_, call_.y + row * O);
            if (call_.v) to_memory(rows, O, v_, call_.v + row * O);
        }
        if (call_.norm_first) return;
        for (int64_t k = first; k < first + count; ++k) {
            float* y = call_.y + k * S * O;
            norm_.apply(norm_.moments(y, O), y, O, y, O, 0, O);
        }
    }

    // dx, and what is added to the sums.
    void backward(int64_t first, int64_t count, const Sums& sums) {
        const int64_t S = call_.S, C = call_.C, H = call_.H, O = call_.O, row = first * S, rows = count * S;
        const float *x = call_.x + row * C, *n = call_.norm_first ? n_ : x, *dy = call_.dy + row * O;
        take_moments(first, count);
        hidden(first, row, rows, slope_);
        if (call_.norm_first) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < O; c += kLanes) store(g_ + r * whole(O) + c, load(dy + r * O + c, O - c));
        } else {
            if (!call_.kept_v) result(row, rows);
            const int64_t stride = call_.kept_v ? O : whole(O);
            for (int64_t k = 0; k < count; ++k) {
                const float* v = (call_.kept_v ? call_.kept_v + row * O : v_) + k * S * stride;
                norm_.backward(norm_.moments(v, stride), v, stride, dy + k * S * O, O, nullptr, 0,
                               g_ + k * S * whole(O), whole(O), sums.gamma, sums.beta);
            }
        }
        if (call_.dropout_p > 0.0f) {
            for (int64_t i = 0; i < rows * whole(O); i += kLanes) store(d_ + i, load(g_ + i));
            drop(row, rows, O, d_, nullptr, kBranch);
        }
        add_columns(rows, O, d_, sums.b2);
        add_columns(rows, O, g_, sums.b_skip);
        product(H, O, rows, transposed(hidden_, whole(H)), d_, whole(O), nullptr, true, sums.w2, whole(O));
        if (call_.parameters.w_skip)
            product(C, O, rows, transposed(x, C), g_, whole(O), nullptr, true, sums.w_skip, whole(O));
        // hidden becomes the gradient of z.
        product(rows, H, O, by_rows(d_, whole(O)), weights_.w2, whole(H), nullptr, false, hidden_, whole(H));
        for (int64_t i = 0; i < rows * whole(H); i += kLanes) store(hidden_ + i, load(hidden_ + i) * load(slope_ + i));
        add_columns(rows, H, hidden_, sums.b1);
        const int64_t n_stride = call_.norm_first ? whole(C) : C;
        product(C, H, rows, transposed(n, n_stride), hidden_, whole(H), nullptr, true, sums.w1, whole(H));
        product(rows, C, H, by_rows(hidden_, whole(H)), weights_.w1, whole(C), nullptr, false, dn_, whole(C));
        write_dx(first, count, sums);
    }

  private:
    void take_moments(int64_t first, int64_t count) {
        for (int64_t k = 0; call_.norm_first && k < count; ++k)
            moments_[k] = norm_.moments(call_.x + (first + k) * call_.S * call_.C, call_.C);
    }

    // hidden = dropout(act(n W1' + b1)) of rows from number `row` on; `slope` may be null.
    void hidden(int64_t first, int64_t row, int64_t rows, float* slope) {
        const int64_t S = call_.S, C = call_.C, H = call_.H;
        for (int64_t r = 0; call_.norm_first && r < rows; ++r)
            norm_.row(moments_[(row + r) / S - first], (row + r) % S, call_.x + (row + r) * C, n_ + r * whole(C), 0, C);
        const Left n = call_.norm_first ? by_rows(n_, whole(C)) : by_rows(call_.x + row * C, C);
        if (call_.kept_z) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < H; c += kLanes)
                    store(hidden_ + r * whole(H) + c, load(call_.kept_z + (row + r) * H + c, H - c));
        } else {
            start(rows, H, call_.parameters.b1, hidden_);
            product(rows, H, C, n, weights_.w1_turned, whole(H), nullptr, true, hidden_, whole(H));
        }
        if (call_.z) to_memory(rows, H, hidden_, call_.z + row * H);
        activate(call_.activation, rows, H, hidden_, slope, whole(H));
        if (call_.dropout_p > 0.0f) drop(row, rows, H, hidden_, slope, kHidden);
    }

    // v = skip(x) + dropout(hidden W2' + b2)
    void result(int64_t row, int64_t rows) {
        const int64_t C = call_.C, H = call_.H, O = call_.O;
        const auto& p = call_.parameters;
        start(rows, O, p.b2, v_);
        product(rows, O, H, by_rows(hidden_, whole(H)), weights_.w2_turned, whole(O), nullptr, true, v_, whole(O));
        if (call_.dropout_p > 0.0f) drop(row, rows, O, v_, nullptr, kBranch);
        const float* x = call_.x + row * C;
        if (p.w_skip) product(rows, O, C, by_rows(x, C), weights_.skip_turned, whole(O), nullptr, true, v_, whole(O));
        const float* more = p.w_skip ? p.b_skip : x;
        for (int64_t r = 0; more && r < rows; ++r)
            for (int64_t c = 0; c < O; c += kLanes) {
                float* to = v_ + r * whole(O) + c;
                store(to, load(to) + load(more + (p.w_skip ? 0 : r * C) + c, O - c));
            }
    }

    // The bias in each row, or zeros.
    static void start(int64_t rows, int64_t columns, const float* bias, float* to) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            const Vector value = bias ? load(bias + c, columns - c) : Vector{};
            for (int64_t r = 0; r < rows; ++r) store(to + r * whole(columns) + c, value);
        }
    }

    static void to_memory(int64_t rows, int64_t columns, const float* plane, float* to) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; c += kLanes)
                store(to + r * columns + c, load(plane + r * whole(columns) + c), columns - c);
    }

    // By the factors of dropout, and another plane by the same.
    void drop(int64_t row, int64_t rows, int64_t columns, float* plane, float* too, Site site) const {
        const Dropout dropout{call_.dropout_p, static_cast<uint64_t>(*call_.seed)};
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; c += kLanes) {
                const Vector kept = dropout.kept_of_row(c, (row + r) % call_.S, (row + r) / call_.S, site);
                const int64_t at = r * whole(columns) + c;
                store(plane + at, load(plane + at) * kept);
                if (too) store(too + at, load(too + at) * kept);
            }
    }

    static void add_columns(int64_t rows, int64_t columns, const float* plane, float* to) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            Vector total{};
            for (int64_t r = 0; r < rows; ++r) total += load(plane + r * whole(columns) + c);
            store(to + c, load(to + c) + total);
        }
    }

    // dx from dn and g, the gradient of v.
    void write_dx(int64_t first, int64_t count, const Sums& sums) {
        const int64_t S = call_.S, C = call_.C, O = call_.O, rows = count * S;
        float* dx = call_.dx + first * S * C;
        const bool skip = call_.parameters.w_skip != nullptr;
        const float* residual = g_;
        if (skip) {  // n is not needed any more
            float* to = call_.norm_first ? n_ : dn_;
            product(rows, C, O, by_rows(g_, whole(O)), weights_.skip, whole(C), nullptr, !call_.norm_first, to,
                    whole(C));
            residual = call_.norm_first ? n_ : nullptr;
        }
        for (int64_t k = 0; call_.norm_first && k < count; ++k) {
            const int64_t image = k * S * whole(C);
            norm_.backward(moments_[k], call_.x + (first + k) * S * C, C, dn_ + image, whole(C), residual + image,
                           whole(C), dx + k * S * C, C, sums.gamma, sums.beta);
        }
        for (int64_t r = 0; !call_.norm_first && r < rows; ++r)
            for (int64_t c = 0; c < C; c += kLanes) {
                Vector value = load(dn_ + r * whole(C) + c);
                if (residual) value += load(residual + r * whole(C) + c);
                store(dx + r * C + c, value, C - c);
            }
    }

    const TsmixerCall& call_;
    const FeatureWeights& weights_;
    JointNorm norm_;
    int64_t rows_;  // to a block
    float *n_, *hidden_, *v_, *slope_, *g_, *d_, *dn_;
    Moments* moments_;
};

}  // namespace
