// Prints dot products of pairs of bfloat16, of bf16.h in the include path: numbers of all magnitudes, denormals among
// them, infinities and NaN.
#include <stdio.h>

#include "bf16.h"

int main() {
    uint32_t state = 1;
    const auto word = [&] { return state = state * 1664525u + 1013904223u, state ^ state >> 13; };
    for (int i = 0; i < 4000; ++i) {
        Unsigned a, b, sum;
        for (int lane = 0; lane < kLanes; ++lane) {
            // every fourth time numbers whose products and sums are normal
            const uint32_t mask = i % 4 ? 0xFFFFFFFFu : 0x87FF87FFu, ones = i % 4 ? 0u : 0x38003800u;
            a[lane] = (word() & mask) | ones, b[lane] = (word() & mask) | ones, sum[lane] = (word() & mask) | ones;
        }
        const Vector result = dot((Vector)sum, a, b);
        for (int lane = 0; lane < kLanes; ++lane) printf("%a ", result[lane] == result[lane] ? result[lane] : 0.5f);
        puts("");
    }
}
