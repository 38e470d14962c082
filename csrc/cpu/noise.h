// Dropout: counter-based random numbers, equation (11) of docs/maths.md.
//
// A factor is a function of the seed and of where it is used, the same as in every other backend with kernels: Philox
// 4x32-10 (Salmon et al. 2011) counted by (coordinate, coordinate, image, site).
#pragma once

#include "vectors.h"

namespace {

typedef uint64_t Products __attribute__((vector_size(8 * kLanes)));

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
        Unsigned c0 = static_cast<uint32_t>(i) + Unsigned{}, c1, c2, c3 = static_cast<uint32_t>(site) + Unsigned{};
        memcpy(&c1, rows + column, sizeof(c1));
        memcpy(&c2, images + column, sizeof(c2));
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const Products a = __builtin_convertvector(c0, Products) * 0xD2511F53u;
            const Products b = __builtin_convertvector(c2, Products) * 0xCD9E8D57u;
            c0 = __builtin_convertvector(b >> 32, Unsigned) ^ c1 ^ k0;
            c2 = __builtin_convertvector(a >> 32, Unsigned) ^ c3 ^ k1;
            c1 = __builtin_convertvector(b, Unsigned);
            c3 = __builtin_convertvector(a, Unsigned);
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
