// One mixer on the columns of a plane, forward and backward: equations (30), (31), (33) to (35) of docs/maths.md.
#pragma once

#include "arena.h"
#include "functions.h"
#include "kernels.h"
#include "noise.h"
#include "plane.h"
#include "product.h"
#ifdef MIXER_KERNELS_BF16
#include "product_bf16.h"
#endif

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

// A parameter in float32: where it is, or a copy.
inline const float* in_float32(Arena& arena, const void* parameter, int64_t count, bool bf16) {
    if (!bf16 || !parameter) return static_cast<const float*>(parameter);
    float* copy = arena.take(round_up(count, kLanes));
    for (int64_t i = 0; copy && i < count; i += kLanes)
        store(copy + i, load(static_cast<const Bf16*>(parameter) + i, count - i));
    return copy;
}

// How the matrices of a mixer are stored: as parameters, and packed.
struct Storage {
    bool bf16, pairs, backward;
};

// The matrices of a mixer as its products read them; those of backward are transposed. Packed as pairs they are words
// in the place of floats.
struct Matrices {
    Left w1, w2, w_gate, w1_back, w2_back, w_gate_back;

    // where they are
    static Matrices of(const Mixer& mixer, int64_t K) {
        const auto at = [](const void* parameter) { return static_cast<const float*>(parameter); };
        const int64_t H = mixer.hidden;
        return {by_rows(at(mixer.w1), K),    by_rows(at(mixer.w2), H),    by_rows(at(mixer.w_gate), K),
                transposed(at(mixer.w1), K), transposed(at(mixer.w2), H), transposed(at(mixer.w_gate), K)};
    }

    // where the arena has them packed
    static Matrices packed(Arena& arena, const Mixer& mixer, int64_t K, Storage storage) {
        Matrices matrices{};
        each(arena, mixer, K, storage, [&](Left Matrices::* matrix, const void*, int64_t, int64_t, float* place) {
            matrices.*matrix = {place, 0, 0};
        });
        return matrices;
    }

    // packs them there
    static void pack(Arena& arena, const Mixer& mixer, int64_t K, Storage storage) {
        each(arena, mixer, K, storage, [=](Left Matrices::* matrix, const void* from, int64_t M, int64_t N, float* to) {
            const bool back =
                matrix == &Matrices::w1_back || matrix == &Matrices::w2_back || matrix == &Matrices::w_gate_back;
            if (storage.bf16)
                pack_one(static_cast<const Bf16*>(from), M, N, back, storage.pairs, to);
            else
                pack_one(static_cast<const float*>(from), M, N, back, storage.pairs, to);
        });
    }

  private:
    // `use(matrix, parameter, rows, columns, place)` for each that is needed
    template <class USE>
    static void each(Arena& arena, const Mixer& mixer, int64_t K, Storage storage, USE use) {
        const int64_t H = mixer.hidden;
        const auto one = [&](Left Matrices::* matrix, const void* parameter, int64_t M, int64_t N) {
            use(matrix, parameter, M, N, arena.take(floats_of(M, N, storage.pairs)));
        };
        one(&Matrices::w1, mixer.w1, H, K);
        one(&Matrices::w2, mixer.w2, K, H);
        if (mixer.w_gate) one(&Matrices::w_gate, mixer.w_gate, K, K);
        if (!storage.backward) return;
        one(&Matrices::w1_back, mixer.w1, K, H);
        one(&Matrices::w2_back, mixer.w2, H, K);
        if (mixer.w_gate) one(&Matrices::w_gate_back, mixer.w_gate, K, K);
    }

    static int64_t floats_of(int64_t M, int64_t N, [[maybe_unused]] bool pairs) {
#ifdef MIXER_KERNELS_BF16
        if (pairs) return packed_words(M, N);
#endif
        return M * N;
    }

    template <class T>
    static void pack_one(const T* from, int64_t M, int64_t N, bool back, [[maybe_unused]] bool pairs, float* to) {
#ifdef MIXER_KERNELS_BF16
        if (pairs) return pack_pairs(from, M, N, reinterpret_cast<uint32_t*>(to));
#endif
        const int64_t row = back ? 1 : N, column = back ? M : 1;
        ::pack(M, N, [=](int64_t m, int64_t n) { return widened(from[m * row + n * column]); }, to);
    }
};

// A mixer at work on blocks of columns.
struct Mlp {
    int64_t hidden_units;
    bool gated;
    const float *b1, *b2, *b_gate;
    Matrices matrices;
    Shape shape;
    bool pairs;  // products of bfloat16
    bool gate_first, sigmoid, tanh;
    int64_t columns;  // to a block, whole vectors
    int64_t stride;   // of a block's planes
    // [H] and [K] rows of a block; backward's are null in a forward pass
    float *hidden, *gate, *slope, *value, *logits, *mask, *across;
    uint32_t* words;  // what a product of pairs reads

    Mlp(Arena& arena, const Mixer& mixer, const Matrices& matrices, Shape shape, Storage storage, bool gate_first,
        bool sigmoid, bool tanh, int64_t most_columns)
        : hidden_units(mixer.hidden),
          gated(mixer.w_gate != nullptr),
          b1(in_float32(arena, mixer.b1, mixer.hidden, storage.bf16)),
          b2(in_float32(arena, mixer.b2, shape.K, storage.bf16)),
          b_gate(in_float32(arena, mixer.b_gate, shape.K, storage.bf16)),
          matrices(matrices),
          shape(shape),
          pairs(storage.pairs),
          gate_first(gate_first),
          sigmoid(sigmoid),
          tanh(tanh) {
        constexpr int64_t kPanel = kBlockVectors * kLanes, kFloats = 32768;  // in the L2 cache, with x
        constexpr int64_t kLeast = 96;  // or weights, from a slower cache, would be the most that is read
        const int64_t H = mixer.hidden, K = shape.K;
        columns = kFloats / (2 * H + 6 * K) / kPanel * kPanel;
        columns = least(largest(columns, round_up(kLeast, kPanel)), round_up(most_columns, kLanes));
        stride = plane_stride(columns);
        hidden = arena.take(H * stride);
        gate = arena.take(K * stride);
        words = nullptr;
#ifdef MIXER_KERNELS_BF16
        if (pairs) words = reinterpret_cast<uint32_t*>(arena.take(words_of(largest(H, K)) * stride));
#endif
        slope = value = logits = mask = across = nullptr;
        if (!storage.backward) return;
        slope = arena.take(H * stride);
        value = arena.take(K * stride);
        logits = arena.take(K * stride);
        mask = arena.take(K * stride);
        across = arena.take(columns * round_up(K, kLanes));
    }

    // n becomes the branch, on columns [first, first + count) of a plane.
    void forward(float* n, int64_t n_stride, int64_t first, int64_t count, const Dropout& dropout) const {
        const int64_t H = hidden_units, K = shape.K;
        n += first;
        if (gated && gate_first) {
            probabilities(n, n_stride, count);
            multiply(K, count, gate, stride, n, n_stride);
        }
        linear(matrices.w1, H, count, K, n, n_stride, b1, hidden, stride);
        if (tanh)
            second<true>(count, n, n_stride, first, dropout);
        else
            second<false>(count, n, n_stride, first, dropout);
        if (dropout.on()) drop(K, count, n, n_stride, dropout, first, kBranch, nullptr);
        if (gated && !gate_first) {
            probabilities(n, n_stride, count);
            multiply(K, count, gate, stride, n, n_stride);
        }
    }

    // g, the gradient of the branch, becomes that of n; `sums` may be null.
    void backward(float* n, float* g, int64_t n_stride, int64_t first, int64_t count, const Dropout& dropout,
                  const Sums* sums) const {
        const int64_t H = hidden_units, K = shape.K;
        n += first;
        g += first;
        const float* in = n;  // of fc1
        int64_t in_stride = n_stride;
        if (gated && gate_first) {
            probabilities(n, n_stride, count);
            for (int64_t k = 0; k < K; ++k)
                for (int64_t c = 0; c < count; c += kLanes)
                    store(value + k * stride + c, load(n + k * n_stride + c) * load(gate + k * stride + c));
            in = value;
            in_stride = stride;
        }
        product(H, count, K, matrices.w1, in, in_stride, b1, false, hidden, stride);
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
        if (gated && !gate_first) {
            product(K, count, H, matrices.w2, hidden, stride, b2, false, value, stride);
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
        if (gated && gate_first) gate_backward(n, n_stride, g, n_stride, count, sums);
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

    // n = w2 . GELU(hidden) + b2
    template <bool Tanh>
    void second(int64_t count, float* n, int64_t n_stride, int64_t first, const Dropout& dropout) const {
        const int64_t H = hidden_units, K = shape.K;
#ifdef MIXER_KERNELS_BF16
        if (pairs && !dropout.on()) {
            round_to_pairs(H, count, hidden, stride, words, stride, [](Vector z) { return gelu_to_round<Tanh>(z); });
            return product_of_words(matrices.w2, K, count, H, b2, n, n_stride);
        }
#endif
        each(H, count, hidden, stride, [](Vector z) { return gelu<Tanh>(z); });
        if (dropout.on()) drop(H, count, hidden, stride, dropout, first, kHidden, nullptr);
        linear(matrices.w2, K, count, H, hidden, stride, b2, n, n_stride);
    }

    // c [M, count] = matrix . b + bias
    void linear(const Left& matrix, int64_t M, int64_t count, int64_t N, const float* b, int64_t stride_b,
                const float* bias, float* c, int64_t stride_c) const {
#ifdef MIXER_KERNELS_BF16
        if (pairs) {
            round_to_pairs(N, count, b, stride_b, words, stride, [](Vector v) { return v; });
            return product_of_words(matrix, M, count, N, bias, c, stride_c);
        }
#endif
        product(M, count, N, matrix, b, stride_b, bias, false, c, stride_c);
    }

#ifdef MIXER_KERNELS_BF16
    void product_of_words(const Left& matrix, int64_t M, int64_t count, int64_t N, const float* bias, float* c,
                          int64_t stride_c) const {
        product_of_pairs(M, count, N, reinterpret_cast<const uint32_t*>(matrix.data), words, stride, bias, c, stride_c);
    }
#endif

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
        linear(matrices.w_gate, K, count, K, v, v_stride, b_gate, gate, stride);
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
        for (int64_t h = 0; h < hidden_units; ++h)
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
