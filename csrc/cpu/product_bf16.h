// Matrix products of bfloat16 with sums in float32: C [M, N] = A [M, K] . B [K, N] + bias.
//
// Elements 2k and 2k + 1 of a sum lie side by side, as a pair in a word of 32 bits: those of A in its rows, those of B
// in a plane of half as many rows. Zeros stand behind an odd K, and from there to the end of a tile.
#pragma once

#include "product.h"

namespace {

inline Unsigned pairs_of(Vector low, Vector high) {
#if defined(__AVX512BF16__) && MIXER_KERNELS_LANES == 16
    const Unsigned place = (Unsigned)counted(std::make_integer_sequence<int, kLanes>());
    const __m512i one_after_the_other = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Unsigned)_mm512_permutexvar_epi16((__m512i)(place | (place + 16) << 16), one_after_the_other);
#else
    return __builtin_convertvector(narrowed(low), Unsigned) | __builtin_convertvector(narrowed(high), Unsigned) << 16;
#endif
}

#ifdef MIXER_KERNELS_AMX
constexpr int64_t kTile = 16;  // rows; words or floats of a row
#else
constexpr int64_t kTile = 1;
#endif

// In a row of A or a column of B; in all of A as it is packed.
inline int64_t words_of(int64_t K) { return round_up(divided_up(K, 2), kTile); }
inline int64_t packed_words(int64_t M, int64_t K) { return round_up(M, kTile) * words_of(K); }

// B's K rows of whole vectors become a plane of pairs, of what `function` makes of them.
template <class FUNCTION>
inline void round_to_pairs(int64_t K, int64_t count, const float* b, int64_t stride_b, uint32_t* pairs, int64_t stride,
                           FUNCTION function) {
    for (int64_t k = 0; k < 2 * words_of(K); k += 2)
        for (int64_t c = 0; c < count; c += kLanes) {
            const float* low = b + k * stride_b + c;
            store(pairs + k / 2 * stride + c, pairs_of(k < K ? function(load(low)) : Vector{},
                                                       k + 1 < K ? function(load(low + stride_b)) : Vector{}));
        }
}

// `use(m, first, words, number)` for the words of each row of A, up to kLanes / 2 at a time.
template <class T, class USE>
inline void each_word(const T* a, int64_t M, int64_t K, USE use) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; k += kLanes) {
            const Halves halves = narrowed(load(a + m * K + k, K - k));
            uint32_t words[kLanes / 2];
            memcpy(words, &halves, sizeof(words));
            use(m, k / 2, words, least(kLanes / 2, divided_up(K - k, 2)));
        }
}

#ifdef MIXER_KERNELS_AMX

// A's rows in tiles, those of 16 rows one after the other.
template <class T>
inline void pack_pairs(const T* a, int64_t M, int64_t K, uint32_t* to) {
    memset(to, 0, 4 * packed_words(M, K));
    each_word(a, M, K, [=](int64_t m, int64_t first, const uint32_t* words, int64_t number) {
        for (int64_t w = first; w < first + number; ++w)
            to[m / kTile * kTile * words_of(K) + w / kTile * kTile * kTile + m % kTile * kTile + w % kTile] =
                words[w - first];
    });
}

// One tile of C or two, side by side, or two and two: sums in tiles 0 to 3, A's in 4 and 5, B's in 6 and 7.
template <bool TwoRows, bool TwoColumns>
inline void tiles(int64_t words, const uint32_t* a, const uint32_t* b, int64_t stride_b, float* c) {
    zero_tile<0>();
    if constexpr (TwoColumns) zero_tile<1>();
    if constexpr (TwoRows) zero_tile<2>();
    if constexpr (TwoRows && TwoColumns) zero_tile<3>();
    for (int64_t k = 0; k < words; k += kTile) {
        load_tile<4>(a + k * kTile, kTile);
        load_tile<6>(b + k * stride_b, stride_b);
        dot_tiles<0, 4, 6>();
        if constexpr (TwoColumns) {
            load_tile<7>(b + k * stride_b + kTile, stride_b);
            dot_tiles<1, 4, 7>();
        }
        if constexpr (TwoRows) {
            load_tile<5>(a + (words + k) * kTile, kTile);
            dot_tiles<2, 5, 6>();
            if constexpr (TwoColumns) dot_tiles<3, 5, 7>();
        }
    }
    constexpr int64_t kRow = 2 * kTile;
    store_tile<0>(c, kRow);
    if constexpr (TwoColumns) store_tile<1>(c + kTile, kRow);
    if constexpr (TwoRows) store_tile<2>(c + kTile * kRow, kRow);
    if constexpr (TwoRows && TwoColumns) store_tile<3>(c + kTile * kRow + kTile, kRow);
}

// A is packed. Whole tiles of B are read, whole vectors of C written: up to 15 columns behind N.
inline void product_of_pairs(int64_t M, int64_t N, int64_t K, const uint32_t* a, const uint32_t* b, int64_t stride_b,
                             const float* bias, float* c, int64_t stride_c) {
    constexpr int64_t kTwo = 2 * kTile;
    alignas(64) float sums[kTwo * kTwo];
    for (int64_t n = 0; n < N; n += kTwo)
        for (int64_t m = 0; m < M; m += kTwo) {
            const bool two_rows = M - m > kTile, two_columns = N - n > kTile;
            const auto multiply = two_rows ? (two_columns ? tiles<true, true> : tiles<true, false>)
                                           : (two_columns ? tiles<false, true> : tiles<false, false>);
            multiply(words_of(K), a + m * words_of(K), b + n, stride_b, sums);
            for (int64_t r = 0; r < least(M - m, kTwo); ++r)
                for (int64_t v = 0; v < least(N - n, kTwo); v += kLanes)
                    store(c + (m + r) * stride_c + n + v, load(sums + r * kTwo + v) + (bias ? bias[m + r] : 0.0f));
        }
}

#else

// In the order in which blocks read A.
template <class T>
inline void pack_pairs(const T* a, int64_t M, int64_t K, uint32_t* to) {
    for (int64_t m = 0; m < M;) {
        const int64_t rows = rows_of_block(M - m);
        each_word(a + m * K, rows, K, [=](int64_t r, int64_t first, const uint32_t* words, int64_t number) {
            for (int64_t w = 0; w < number; ++w) to[(first + w) * rows + r] = words[w];
        });
        to += rows * words_of(K);
        m += rows;
    }
}

// A is packed. Whole vectors of B and C are read and written: up to kLanes - 1 columns behind N.
inline void product_of_pairs(int64_t M, int64_t N, int64_t K, const uint32_t* a, const uint32_t* b, int64_t stride_b,
                             const float* bias, float* c, int64_t stride_c) {
    product(M, N, words_of(K), LeftOf<uint32_t>{a, 0, 0}, b, stride_b, bias, false, c, stride_c);
}

#endif

}  // namespace
