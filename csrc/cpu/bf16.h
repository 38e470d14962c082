// The instructions that multiply bfloat16: dot products of pairs, by vectors and by the tiles of AMX.
//
// They are here alone. tests/cpu_kernels/bf16.h computes the same in plain C++, for machines that lack them.
#pragma once

#include "vectors.h"

namespace {

// sum + low(a) low(b) + high(a) high(b) of each pair, in float32; denormals count as zeros.
inline Vector dot(Vector sum, Unsigned a, Unsigned b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#ifdef MIXER_KERNELS_AMX

// 16 rows of 16 pairs, or of 16 floats, in one of eight registers. They are this thread's between the two ends of an
// object of this class: a configuration of someone else, whom the ABI lets expect none behind a call, is gone.
struct TilesInUse {
    TilesInUse() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } const all;
        asm volatile("ldtilecfg %0" ::"m"(all));
    }
    ~TilesInUse() { asm volatile("tilerelease"); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

template <int Tile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// Rows that are `stride` words apart.
template <int Tile>
inline void load_tile(const uint32_t* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void store_tile(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * stride), "i"(Tile) : "memory");
}

// Sums [m][n] += A [m][k] . B [k][n], k over 16 pairs.
template <int Sums, int A, int B>
inline void dot_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

#endif

}  // namespace
