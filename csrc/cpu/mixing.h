// One mixer on the columns of a plane, forward and backward: equations (30), (31), (33) to (35) of docs/maths.md.
#pragma once

#include "arena.h"
#include "functions.h"
#include "kernels.h"
#include "noise.h"
#include "plane.h"
#include "product.h"

namespace {

using mixer_kernels::cpu::Mixer;

// Where a task's sums for the gradients of one mixer lie. w2's are those of its transpose.
struct Sums {
    float *w1, *w2, *w_gate, *b1, *b2, *b_gate, *gamma, *beta;

    static Sums at(Arena& arena, Shape shape, int64_t H, bool gated) {
        const int64_t K = round_up(shape.K, kLanes), F = round_up(shape.F, kLanes);
        return {arena.take(H * K), arena.take(H * K), arena.take(gated ? shape.K * K : 0),
                arena.take(H),     arena.take(K),     arena.take(K),
                arena.take(F),     arena.take(F)};
    }
};

// The matrices of a mixer as its products read them; those of backward are transposed.
struct Matrices {
    Left w1, w2, w_gate, w1_back, w2_back, w_gate_back;

    static Matrices of(const Mixer& mixer, int64_t K) {
        const int64_t H = mixer.hidden;
        return {by_rows(mixer.w1, K),    by_rows(mixer.w2, H),    by_rows(mixer.w_gate, K),
                transposed(mixer.w1, K), transposed(mixer.w2, H), transposed(mixer.w_gate, K)};
    }

    // `use(matrix, rows, columns, place)` for each that is needed, packed in the arena's memory.
    template <class USE>
    void each(Arena& arena, int64_t H, int64_t K, bool backward, USE use) {
        use(w1, H, K, arena.take(H * K));
        use(w2, K, H, arena.take(H * K));
        if (w_gate.data) use(w_gate, K, K, arena.take(K * K));
        if (!backward) return;
        use(w1_back, K, H, arena.take(H * K));
        use(w2_back, H, K, arena.take(H * K));
        if (w_gate.data) use(w_gate_back, K, K, arena.take(K * K));
    }
};

// A mixer at work on blocks of columns.
struct Mlp {
    Mixer mixer;
    Matrices matrices;
    Shape shape;
    bool gate_first, sigmoid, tanh;
    int64_t columns;  // to a block, whole vectors
    int64_t stride;   // of a block's planes
    // [H] and [K] rows of a block; backward's are null in a forward pass
    float *hidden, *gate, *slope, *value, *logits, *mask, *across;

    Mlp(Arena& arena, const Mixer& mixer, const Matrices& matrices, Shape shape, bool gate_first, bool sigmoid,
        bool tanh, int64_t most_columns, bool backward)
        : mixer(mixer), matrices(matrices), shape(shape), gate_first(gate_first), sigmoid(sigmoid), tanh(tanh) {
        constexpr int64_t kPanel = kBlockVectors * kLanes, kFloats = 32768;  // in the L2 cache, with x
        constexpr int64_t kLeast = 96;  // or weights, from a slower cache, would be the most that is read
        const int64_t H = mixer.hidden, K = shape.K;
        columns = kFloats / (2 * H + 6 * K) / kPanel * kPanel;
        columns = least(largest(columns, round_up(kLeast, kPanel)), round_up(most_columns, kLanes));
        stride = plane_stride(columns);
        hidden = arena.take(H * stride);
        gate = arena.take(K * stride);
        slope = value = logits = mask = across = nullptr;
        if (!backward) return;
        slope = arena.take(H * stride);
        value = arena.take(K * stride);
        logits = arena.take(K * stride);
        mask = arena.take(K * stride);
        across = arena.take(columns * round_up(K, kLanes));
    }

    bool gated() const { return mixer.w_gate != nullptr; }

    // n becomes the branch, on columns [first, first + count) of a plane.
    void forward(float* n, int64_t n_stride, int64_t first, int64_t count, const Dropout& dropout) const {
        const int64_t H = mixer.hidden, K = shape.K;
        n += first;
        if (gated() && gate_first) {
            probabilities(n, n_stride, count);
            multiply(K, count, gate, stride, n, n_stride);
        }
        product(H, count, K, matrices.w1, n, n_stride, mixer.b1, false, hidden, stride);
        if (tanh)
            each(H, count, hidden, stride, [](Vector z) { return gelu<true>(z); });
        else
            each(H, count, hidden, stride, [](Vector z) { return gelu<false>(z); });
        if (dropout.on()) drop(H, count, hidden, stride, dropout, first, kHidden, nullptr);
        product(K, count, H, matrices.w2, hidden, stride, mixer.b2, false, n, n_stride);
        if (dropout.on()) drop(K, count, n, n_stride, dropout, first, kBranch, nullptr);
        if (gated() && !gate_first) {
            probabilities(n, n_stride, count);
            multiply(K, count, gate, stride, n, n_stride);
        }
    }

    // g, the gradient of the branch, becomes that of n; `sums` may be null.
    void backward(float* n, float* g, int64_t n_stride, int64_t first, int64_t count, const Dropout& dropout,
                  const Sums* sums) const {
        const int64_t H = mixer.hidden, K = shape.K;
        n += first;
        g += first;
        const float* in = n;  // of fc1
        int64_t in_stride = n_stride;
        if (gated() && gate_first) {
            probabilities(n, n_stride, count);
            for (int64_t k = 0; k < K; ++k)
                for (int64_t c = 0; c < count; c += kLanes)
                    store(value + k * stride + c, load(n + k * n_stride + c) * load(gate + k * stride + c));
            in = value;
            in_stride = stride;
        }
        product(H, count, K, matrices.w1, in, in_stride, mixer.b1, false, hidden, stride);
        if (tanh)
            slopes<true>(count);
        else
            slopes<false>(count);
        if (dropout.on()) {
            drop(H, count, hidden, stride, dropout, first, kHidden, slope);
            for (int64_t k = 0; k < K; ++k)
                for (int64_t c = 0; c < count; c += kLanes)
                    store(mask + k * stride + c, dropout.kept(k, first + c, kBranch));
        }
        if (gated() && !gate_first) {
            product(K, count, H, matrices.w2, hidden, stride, mixer.b2, false, value, stride);
            if (dropout.on()) multiply(K, count, mask, stride, value, stride);
            probabilities(value, stride, count);
            gate_backward(value, stride, g, n_stride, count, sums);
        }
        if (dropout.on()) multiply(K, count, mask, stride, g, n_stride);

        if (sums) {  // of fc2
            add_rows(K, count, g, n_stride, sums->b2);
            turn(g, n_stride, K, count, across);
            add_product(H, count, hidden, stride, sums->w2);
        }
        // hidden becomes the gradient of z.
        product(H, count, K, matrices.w2_back, g, n_stride, nullptr, false, hidden, stride);
        multiply(H, count, slope, stride, hidden, stride);
        if (sums) {  // of fc1
            add_rows(H, count, hidden, stride, sums->b1);
            turn(in, in_stride, K, count, across);
            add_product(H, count, hidden, stride, sums->w1);
        }
        product(K, count, H, matrices.w1_back, hidden, stride, nullptr, false, g, n_stride);
        if (gated() && gate_first) gate_backward(n, n_stride, g, n_stride, count, sums);
    }

  private:
    template <class FUNCTION>
    static void each(int64_t rows, int64_t count, float* plane, int64_t stride, FUNCTION function) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < count; c += kLanes)
                store(plane + r * stride + c, function(load(plane + r * stride + c)));
    }

    static void multiply(int64_t rows, int64_t count, const float* factor, int64_t factor_stride, float* plane,
                         int64_t stride) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < count; c += kLanes)
                store(plane + r * stride + c, load(plane + r * stride + c) * load(factor + r * factor_stride + c));
    }

    // By the factors of dropout, and another plane by the same.
    static void drop(int64_t rows, int64_t count, float* plane, int64_t stride, const Dropout& dropout, int64_t first,
                     Site site, float* too) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < count; c += kLanes) {
                const Vector kept = dropout.kept(r, first + c, site);
                store(plane + r * stride + c, load(plane + r * stride + c) * kept);
                if (too) store(too + r * stride + c, load(too + r * stride + c) * kept);
            }
    }

    // gate = softmax(Wg . v + bg), down each column, or the sigmoid.
    void probabilities(const float* v, int64_t v_stride, int64_t count) const {
        const int64_t K = shape.K;
        product(K, count, K, matrices.w_gate, v, v_stride, mixer.b_gate, false, gate, stride);
        if (sigmoid) return each(K, count, gate, stride, [](Vector z) { return 1.0f / (1.0f + exp(-z)); });
        for (int64_t c = 0; c < count; c += kLanes) {
            float* column = gate + c;
            Vector most = load(column), total{};
            for (int64_t k = 1; k < K; ++k) most = greater(most, load(column + k * stride));
            for (int64_t k = 0; k < K; ++k) {
                const Vector e = exp_of_negative(load(column + k * stride) - most);
                total += e;
                store(column + k * stride, e);
            }
            const Vector scale = 1.0f / total;
            for (int64_t k = 0; k < K; ++k) store(column + k * stride, load(column + k * stride) * scale);
        }
    }

    // g, the gradient of v * gate, becomes that of v; the logits' is kept for the sums: equation (33).
    void gate_backward(const float* v, int64_t v_stride, float* g, int64_t g_stride, int64_t count,
                       const Sums* sums) const {
        const int64_t K = shape.K;
        for (int64_t c = 0; c < count; c += kLanes) {
            Vector total{};
            for (int64_t k = 0; k < K && !sigmoid; ++k)
                total += load(g + k * g_stride + c) * load(v + k * v_stride + c) * load(gate + k * stride + c);
            for (int64_t k = 0; k < K; ++k) {
                const Vector one = load(g + k * g_stride + c), p = load(gate + k * stride + c);
                const Vector of_gate = one * load(v + k * v_stride + c);
                store(logits + k * stride + c, p * (sigmoid ? (1.0f - p) * of_gate : of_gate - total));
                store(g + k * g_stride + c, one * p);
            }
        }
        product(K, count, K, matrices.w_gate_back, logits, stride, nullptr, true, g, g_stride);
        if (!sums) return;
        add_rows(K, count, logits, stride, sums->b_gate);
        turn(v, v_stride, K, count, across);
        add_product(K, count, logits, stride, sums->w_gate);
    }

    template <bool Tanh>
    void slopes(int64_t count) const {
        for (int64_t h = 0; h < mixer.hidden; ++h)
            for (int64_t c = 0; c < count; c += kLanes) {
                Vector z = load(hidden + h * stride + c);
                store(slope + h * stride + c, gelu_and_slope<Tanh>(z));
                store(hidden + h * stride + c, z);
            }
    }

    // to [rows, K] += plane . across
    void add_product(int64_t rows, int64_t count, const float* plane, int64_t stride, float* to) const {
        const int64_t width = round_up(shape.K, kLanes);
        product(rows, shape.K, count, by_rows(plane, stride), across, width, nullptr, true, to, width);
    }
};

}  // namespace
