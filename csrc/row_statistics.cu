// Mean and reciprocal standard deviation over the channels: equation (1) of docs/maths.md.
//
// Two passes: deviations from the mean are squared, and the mean is corrected by the mean of the deviations, since rstd
// multiplies its rounding error, by a thousand in a row without variance. Where channels are contiguous a warp takes a
// row, in chunks that fit registers, merged by equation (10). Else a block takes 32 rows, a lane each: tokens that are
// contiguous (flatten(2).transpose(1, 2)) are read in whole lines.
#include "rows.cuh"

namespace mixer_kernels {
namespace {

constexpr int kRowWarps = 4;
constexpr int kVectors = 4;  // of 8 channels, to a lane
constexpr int kChunk = 32 * 8 * kVectors;

__device__ __forceinline__ float rstd_of(float m2, int C, float eps) { return 1.0f / sqrtf(m2 / C + eps); }

__global__ void __launch_bounds__(32 * kRowWarps)
    row_statistics_kernel(const mk_input x, const mk_size size, float eps, float* mean_out, float* rstd_out) {
    const int lane = threadIdx.x % 32, C = size.C;
    const int64_t rows = size.B * size.S, step = int64_t{gridDim.x} * kRowWarps;
    for (int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32; row < rows; row += step) {
        const int64_t start = row_offset(x, size, row);
        float mean = 0.0f, m2 = 0.0f, seen = 0.0f;
        for (int c0 = 0; c0 < C; c0 += kChunk) {
            float v[kVectors][8];
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int c = c0 + (i * 32 + lane) * 8;
                load8(x.data, x.type, start + c, 1, C - c, v[i]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += v[i][j];
            }
            const float count = static_cast<float>(C - c0 < kChunk ? C - c0 : kChunk);
            float chunk_mean = warp_sum(sum) / count;
            float chunk_m2 = 0.0f;
#pragma unroll
            for (int pass = 0; pass < 2; ++pass) {
                float deviations = 0.0f, squares = 0.0f;
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const float d = c0 + (i * 32 + lane) * 8 + j < C ? v[i][j] - chunk_mean : 0.0f;
                        deviations += d;
                        squares += d * d;
                    }
                }
                if (pass == 0) {
                    chunk_mean += warp_sum(deviations) / count;
                } else {
                    chunk_m2 = warp_sum(squares);
                }
            }
            const float delta = chunk_mean - mean, share = count / (seen + count);
            mean = seen == 0.0f ? chunk_mean : mean + delta * share;
            m2 += chunk_m2 + delta * delta * (seen * share);
            seen += count;
        }
        if (lane == 0) {
            mean_out[row] = mean;
            rstd_out[row] = rstd_of(m2, C, eps);
        }
    }
}

constexpr int kStridedWarps = 8;  // warp w takes channels w, w + 8, ...

// The sum over the block's warps, in their order; values [kStridedWarps][32].
__device__ __forceinline__ float sum_of_warps(float* values, float value) {
    const int lane = threadIdx.x % 32;
    values[threadIdx.x] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kStridedWarps; ++warp) sum += values[warp * 32 + lane];
    __syncthreads();
    return sum;
}

__global__ void __launch_bounds__(32 * kStridedWarps)
    row_statistics_strided_kernel(const mk_input x, const mk_size size, float eps, float* mean_out, float* rstd_out) {
    float* values = shared_memory<float>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, C = size.C;
    const int64_t rows = size.B * size.S, step = int64_t{gridDim.x} * 32;
    for (int64_t first = int64_t{blockIdx.x} * 32; first < rows; first += step) {
        const int64_t row = first + lane;
        const int64_t start = row_offset(x, size, row < rows ? row : rows - 1);
        float sum = 0.0f;
#pragma unroll 8
        for (int c = warp; c < C; c += kStridedWarps) sum += load_element(x.data, x.type, start + c * x.stride_c);
        float mean = sum_of_warps(values, sum) / C;
        float deviations = 0.0f, squares = 0.0f;
#pragma unroll 8
        for (int c = warp; c < C; c += kStridedWarps) {
            const float d = load_element(x.data, x.type, start + c * x.stride_c) - mean;
            deviations += d;
            squares += d * d;
        }
        deviations = sum_of_warps(values, deviations);
        squares = sum_of_warps(values, squares);
        const float correction = deviations / C;
        if (warp == 0 && row < rows) {
            mean_out[row] = mean + correction;
            rstd_out[row] = rstd_of(fmaxf(squares - deviations * correction, 0.0f), C, eps);
        }
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_row_statistics(mk_input x, mk_size size, float eps, float* mean, float* rstd, mk_stream stream) {
    using namespace mixer_kernels;
    const int64_t rows = size.B * size.S;
    if (x.stride_c == 1 || size.C == 1) {
        const unsigned blocks = blocks_for(cdiv(rows, kRowWarps));
        return launch(row_statistics_kernel, blocks, 32 * kRowWarps, 0, stream, x, size, eps, mean, rstd);
    }
    const size_t shared = sizeof(float) * 32 * kStridedWarps;
    const unsigned blocks = blocks_for(cdiv(rows, 32));
    return launch(row_statistics_strided_kernel, blocks, 32 * kStridedWarps, shared, stream, x, size, eps, mean, rstd);
}
