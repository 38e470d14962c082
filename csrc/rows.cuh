// What kernels over the rows of x [B, S, C] share. Row r is token r % S of image r / S.
#pragma once

#include "device/numbers.cuh"
#include "device/platform.cuh"

namespace mixer_kernels {

__device__ __forceinline__ int64_t row_offset(const mk_input& x, const mk_size& size, int64_t row) {
    return row / size.S * x.stride_b + row % size.S * x.stride_s;
}

// The sum over the lanes of a warp, in all of them, always in the same order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `work` shares of a kernel that goes on to further shares in steps of its grid.
inline unsigned blocks_for(int64_t work) {
    constexpr int64_t most = 1 << 30;
    return static_cast<unsigned>(work < most ? work : most);
}

}  // namespace mixer_kernels
