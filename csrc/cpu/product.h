// Matrix products of small matrices: C [M, N] = A [M, K] . B [K, N] + bias, or + C.
//
// A is read by broadcasts: as it lies in memory, transposed or not, or packed in the order in which it is read. B and C
// have rows of whole vectors. The sum of an element is over k in order, whatever the sizes and wherever the element is.
// A and B have WORDs: floats, or with bf16.h pairs of bfloat16, of two k.
#pragma once

#include "vectors.h"
#ifdef MIXER_KERNELS_BF16
#include "bf16.h"
#endif

namespace {

// Registers of a block: with 32, or with 16.
constexpr int kBlockRows = kLanes == 16 ? 8 : 6;
constexpr int kBlockVectors = kLanes == 16 ? 3 : 2;

template <class WORD>
struct LeftOf {
    const WORD* data;
    int64_t row, column;  // strides; 0 where it is packed

    bool is_packed() const { return row == 0; }
};

typedef LeftOf<float> Left;

inline Vector plus_product(Vector sum, float a, Vector b) { return sum + all(a) * b; }
#ifdef MIXER_KERNELS_BF16
inline Vector plus_product(Vector sum, uint32_t a, Unsigned b) { return dot(sum, a + Unsigned{}, b); }
#endif

inline Left by_rows(const float* data, int64_t columns) { return {data, columns, 1}; }
inline Left transposed(const float* data, int64_t columns) { return {data, 1, columns}; }

// Rows of the next block, of `left` rows: the last two are alike, because a small block has too few sums under way.
inline int64_t rows_of_block(int64_t left) {
    return left <= kBlockRows || left >= 2 * kBlockRows ? least(left, kBlockRows) : (left + 1) / 2;
}

// A [M, K] in the order in which blocks read it; `word(m, k)` is one of its elements.
template <class WORD, class READ>
inline void pack(int64_t M, int64_t K, READ word, WORD* to) {
    for (int64_t m = 0; m < M;) {
        const int64_t rows = rows_of_block(M - m);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < K; ++k) to[k * rows + r] = word(m + r, k);
        to += rows * K;
        m += rows;
    }
}

template <int Rows, int Vectors, class WORD>
inline __attribute__((always_inline)) void block(int64_t K, LeftOf<WORD> a, const WORD* b, int64_t stride_b,
                                                 const float* bias, bool add, float* c, int64_t stride_c) {
    Vector sums[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v)
            sums[r][v] = add ? load(c + r * stride_c + v * kLanes) : all(bias ? bias[r] : 0.0f);
    const WORD* left = a.data;
    for (int64_t k = 0; k < K; ++k) {
        decltype(load(b)) right[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const WORD one = left[r * a.row];
#pragma GCC unroll 3
            for (int v = 0; v < Vectors; ++v) sums[r][v] = plus_product(sums[r][v], one, right[v]);
        }
        left += a.column;
        b += stride_b;
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) store(c + r * stride_c + v * kLanes, sums[r][v]);
}

template <int Rows, int Vectors, class WORD>
__attribute__((noinline)) void repeat_block(int64_t count, int64_t K, LeftOf<WORD> a, const WORD* b, int64_t stride_b,
                                            const float* bias, bool add, float* c, int64_t stride_c) {
    const int64_t next = Rows * (a.is_packed() ? K : a.row);
    if (a.is_packed()) a = {a.data, 1, Rows};
    for (int64_t i = 0; i < count; ++i) {
        block<Rows, Vectors>(K, a, b, stride_b, bias, add, c, stride_c);
        a.data += next;
        if (bias) bias += Rows;
        c += Rows * stride_c;
    }
}

template <int Vectors, class WORD, int Rows = kBlockRows>
inline void repeat_rows(int64_t rows, int64_t count, int64_t K, LeftOf<WORD> a, const WORD* b, int64_t stride_b,
                        const float* bias, bool add, float* c, int64_t stride_c) {
    if (rows == Rows) return repeat_block<Rows, Vectors>(count, K, a, b, stride_b, bias, add, c, stride_c);
    if constexpr (Rows > 1)
        repeat_rows<Vectors, WORD, Rows - 1>(rows, count, K, a, b, stride_b, bias, add, c, stride_c);
}

template <int Vectors, class WORD>
inline void blocks_down(int64_t M, int64_t K, LeftOf<WORD> a, const WORD* b, int64_t stride_b, const float* bias,
                        bool add, float* c, int64_t stride_c) {
    for (int64_t m = 0; m < M;) {
        const int64_t rows = rows_of_block(M - m);
        const int64_t count = largest((M - m) / kBlockRows - (M % kBlockRows > 0), 1), done = count * rows;
        repeat_rows<Vectors>(rows, count, K, a, b, stride_b, bias, add, c, stride_c);
        a.data += done * (a.is_packed() ? K : a.row);
        if (bias) bias += done;
        c += done * stride_c;
        m += done;
    }
}

// Whole vectors of B and C are read and written: up to kLanes - 1 columns behind N.
template <class WORD>
inline void product(int64_t M, int64_t N, int64_t K, LeftOf<WORD> a, const WORD* b, int64_t stride_b, const float* bias,
                    bool add, float* c, int64_t stride_c) {
    int64_t vectors = divided_up(N, kLanes);
    while (vectors > 0) {
        // Four as two and two: a block of one has too few sums under way.
        const int64_t width = kBlockVectors == 3 && vectors == 4 ? 2 : least(vectors, kBlockVectors);
        if (width == 1) blocks_down<1>(M, K, a, b, stride_b, bias, add, c, stride_c);
        if (width == 2) blocks_down<2>(M, K, a, b, stride_b, bias, add, c, stride_c);
        if constexpr (kBlockVectors == 3)
            if (width == 3) blocks_down<3>(M, K, a, b, stride_b, bias, add, c, stride_c);
        b += width * kLanes;
        c += width * kLanes;
        vectors -= width;
    }
}

}  // namespace
