// The gradient of a branch from the gradient of the half's output, equation (12) of docs/maths.md.
//
// A half is x + branch: without dropout and stochastic depth both gradients are one tensor, and nobody calls this.
#include "device/noise.cuh"
#include "rows.cuh"

namespace mixer_kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) branch_gradient_kernel(const void* dy, mk_type dy_type, const mk_size size,
                                                                   const Noise noise, void* g, mk_type type) {
    const int groups = (size.C + 7) / 8;  // of 8 channels: a thread's share
    const int64_t shares = size.B * size.S * groups, step = int64_t{gridDim.x} * kThreads;
    for (int64_t share = int64_t{blockIdx.x} * kThreads + threadIdx.x; share < shares; share += step) {
        const int64_t row = share / groups, image = row / size.S;
        const int s = static_cast<int>(row % size.S), c = static_cast<int>(share % groups) * 8, valid = size.C - c;
        float v[8];
        load8(dy, dy_type, row * size.C + c, 1, valid, v);
        const float keep = noise.kept_image(image);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= keep * noise.kept_branch(c + j, s, image);
        store8(g, type, row * size.C + c, valid, v);
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_branch_gradient(const void* dy, mk_type dy_type, mk_size size, mk_noise noise, void* g, mk_type type,
                                  mk_stream stream) {
    using namespace mixer_kernels;
    const int64_t shares = size.B * size.S * cdiv(size.C, 8);
    return launch(branch_gradient_kernel, blocks_for(cdiv(shares, kThreads)), kThreads, 0, stream, dy, dy_type, size,
                  Noise(noise), g, type);
}
