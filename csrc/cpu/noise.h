// Dropout: counter-based random numbers, equation (11) of docs/maths.md.
//
// A factor is a function of the seed and of where it is used, the same as in every other backend with kernels: Philox
// 4x32-10 (Salmon et al. 2011) counted by (coordinate, coordinate, image, site).
#pragma once

#include "vectors.h"

namespace {

// The high and the low halves of the products of 32-bit integers with one.
inline void multiply(Unsigned a, uint32_t factor, Unsigned& high, Unsigned& low) {
#if defined(__AVX2__) && MIXER_KERNELS_LANES == 8
    const __m256i odd = _mm256_srli_epi64((__m256i)a, 32), by = _mm256_set1_epi64x(factor);
    const __m256i evens = _mm256_mul_epu32((__m256i)a, by), odds = _mm256_mul_epu32(odd, by);
    low = (Unsigned)_mm256_blend_epi32(evens, _mm256_slli_epi64(odds, 32), 0xAA);
    high = (Unsigned)_mm256_blend_epi32(_mm256_srli_epi64(evens, 32), odds, 0xAA);
#elif defined(__AVX512F__) && MIXER_KERNELS_LANES == 16
    const __m512i odd = _mm512_srli_epi64((__m512i)a, 32), by = _mm512_set1_epi64(factor);
    const __m512i evens = _mm512_mul_epu32((__m512i)a, by), odds = _mm512_mul_epu32(odd, by);
    low = (Unsigned)_mm512_mask_blend_epi32(0xAAAA, evens, _mm512_slli_epi64(odds, 32));
    high = (Unsigned)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(evens, 32), odds);
#else
    typedef uint64_t Products __attribute__((vector_size(8 * kLanes)));
    const Products products = __builtin_convertvector(a, Products) * factor;
    low = __builtin_convertvector(products, Unsigned);
    high = __builtin_convertvector(products >> 32, Unsigned);
#endif
}

enum Site : uint32_t { kHidden = 0, kBranch = 1 };

struct Dropout {
    float p = 0.0f;
    uint64_t seed = 0;
    // Of each column: its row and image, the second and the third coordinate.
    const uint32_t* rows = nullptr;
    const uint32_t* images = nullptr;

    bool on() const { return p > 0.0f; }

    // The factors of element i of the columns from `column`.
    Vector kept(int64_t i, int64_t column, Site site) const {
        Unsigned c1, c2;
        memcpy(&c1, rows + column, sizeof(c1));
        memcpy(&c2, images + column, sizeof(c2));
        return factors(static_cast<uint32_t>(i) + Unsigned{}, c1, c2, site);
    }

    // The factors of the elements from i on of one row.
    Vector kept_of_row(int64_t i, int64_t row, int64_t image, Site site) const {
        const Unsigned elements = (Unsigned)counted(std::make_integer_sequence<int, kLanes>());
        return factors(static_cast<uint32_t>(i) + elements, static_cast<uint32_t>(row) + Unsigned{},
                       static_cast<uint32_t>(image) + Unsigned{}, site);
    }

  private:
    // Of the counter (c0, c1, c2, site).
    Vector factors(Unsigned c0, Unsigned c1, Unsigned c2, Site site) const {
        Unsigned c3 = static_cast<uint32_t>(site) + Unsigned{};
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            Unsigned high_a, low_a, high_b, low_b;
            multiply(c0, 0xD2511F53u, high_a, low_a);
            multiply(c2, 0xCD9E8D57u, high_b, low_b);
            c0 = high_b ^ c1 ^ k0;
            c2 = high_a ^ c3 ^ k1;
            c1 = low_b;
            c3 = low_a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const Integers bits = (Integers)c0;
        const Integers folded = bits < 0 ? ~bits : bits;
        // The largest factor that keeps the product of the largest integer below 1 in float32.
        const Vector uniform = __builtin_convertvector(folded, Vector) * 4.6566127342e-10f;
        return uniform >= p ? all(p < 1.0f ? 1.0f / (1.0f - p) : 0.0f) : Vector{};  // with p = 1 nothing is kept
    }
};

}  // namespace
