// In the place of csrc/cpu/bf16.h: what its instructions compute, element by element as their manual has it, in plain
// C++ for vectors of any length and machines without them.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "vectors.h"

namespace {

inline float without_denormal(float value) { return __builtin_fabsf(value) < 0x1p-126f ? 0.0f * value : value; }

// a b + sum, rounded once
inline float multiplied_and_added(uint32_t a, uint32_t b, float sum) {
    float factors[2];
    memcpy(&factors[0], &a, 4);
    memcpy(&factors[1], &b, 4);
    return without_denormal(__builtin_fmaf(without_denormal(factors[0]), without_denormal(factors[1]), sum));
}

inline float of_low(uint32_t a, uint32_t b, float sum) { return multiplied_and_added(a << 16, b << 16, sum); }
inline float of_high(uint32_t a, uint32_t b, float sum) {
    return multiplied_and_added(a & 0xFFFF0000u, b & 0xFFFF0000u, sum);
}

inline Vector dot(Vector sum, Unsigned a, Unsigned b) {
    for (int i = 0; i < kLanes; ++i) sum[i] = of_low(a[i], b[i], of_high(a[i], b[i], without_denormal(sum[i])));
    return sum;
}

#ifdef MIXER_KERNELS_AMX

thread_local bool tiles_in_use = false;
thread_local uint32_t tile_registers[8][16][16];

struct TilesInUse {
    TilesInUse() { tiles_in_use = true; }
    ~TilesInUse() { tiles_in_use = false; }
};

inline uint32_t (&tile(int number))[16][16] {
    if (!tiles_in_use) {
        puts("an instruction for tiles where a configuration of them is expected");
        exit(1);
    }
    return tile_registers[number];
}

template <int Tile>
inline void zero_tile() {
    memset(tile(Tile), 0, sizeof(tile(Tile)));
}

template <int Tile>
inline void load_tile(const uint32_t* from, int64_t stride) {
    for (int row = 0; row < 16; ++row) memcpy(tile(Tile)[row], from + row * stride, 64);
}

template <int Tile>
inline void store_tile(float* to, int64_t stride) {
    for (int row = 0; row < 16; ++row) memcpy(to + row * stride, tile(Tile)[row], 64);
}

// The sums over the low and over the high halves are apart until the end.
template <int Sums, int A, int B>
inline void dot_tiles() {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float low = 0.0f, high = 0.0f, sum;
            for (int k = 0; k < 16; ++k) {
                low = of_low(tile(A)[m][k], tile(B)[k][n], low);
                high = of_high(tile(A)[m][k], tile(B)[k][n], high);
            }
            memcpy(&sum, &tile(Sums)[m][n], 4);
            sum = without_denormal(without_denormal(sum) + without_denormal(low + high));
            memcpy(&tile(Sums)[m][n], &sum, 4);
        }
}

#endif

}  // namespace
