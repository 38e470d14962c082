// Row statistics from those of each 64 channels, which the kernel that wrote the tensor left: equation (10) of
// docs/maths.md, in the order of the channels.
#include "../rows.cuh"
#include "launchers.h"

namespace mixer_kernels {
namespace {

constexpr int kGroup = 64;  // channels
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    merge_statistics_kernel(const float2* partial, int64_t rows, int C, float eps, float* mean_out, float* rstd_out) {
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows; row += step) {
        float mean = 0.0f, m2 = 0.0f, seen = 0.0f;
#pragma unroll 4
        for (int c0 = 0; c0 < C; c0 += kGroup) {
            const float2 part = partial[c0 / kGroup * rows + row];
            const float count = static_cast<float>(min(C - c0, kGroup));
            const float delta = part.x - mean, share = count / (seen + count);
            mean += delta * share;
            m2 += part.y + delta * (seen * share) * delta;
            seen += count;
        }
        mean_out[row] = mean;
        rstd_out[row] = 1.0f / sqrtf(m2 / C + eps);
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_merge_statistics(const float* partial, mk_size size, float eps, float* mean, float* rstd,
                                   mk_stream stream) {
    using namespace mixer_kernels;
    const int64_t rows = size.B * size.S;
    return launch(merge_statistics_kernel, blocks_for(cdiv(rows, kThreads)), kThreads, 0, stream,
                  reinterpret_cast<const float2*>(partial), rows, size.C, eps, mean, rstd);
}
