// LayerNorm backward with the residual, both halves' last step: equations (17) to (19) of docs/maths.md.
//
// A block takes every so many steps of 16 rows. First a warp a row sums up m and v of equation (18); then a thread owns
// 8 channels, reads the rows again, from cache, and writes dx and n. Its sums for dgamma, dbeta and the column sums of
// dy stay in shared memory, or where C is too long for that in the block's part of `sums`. No atomics: each sum has one
// owner and one order.
#include "rows.cuh"

namespace mixer_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 16;                 // to a step
constexpr size_t kMostShared = 48 << 10;  // without asking for more

// Threads along the channels, 8 to a thread; further sets of them take other rows of a step.
int threads_along_channels(int C) {
    int threads = 32;
    while (threads < kThreads && threads * 8 < C) threads *= 2;
    return threads;
}

struct Moments {
    float m, v;
};

// Equation (18) for one row, in all lanes of a warp.
__device__ __forceinline__ Moments moments_of(const mk_norm_backward_arguments& p, int64_t row, float mean,
                                              float rstd) {
    const int lane = threadIdx.x % 32, C = p.size.C;
    const int64_t start = row_offset(p.x, p.size, row);
    float m = 0.0f, v = 0.0f;
    for (int c = lane * 8; c < C; c += 32 * 8) {
        float x[8], dn[8], gamma[8];
        load8(p.x.data, p.x.type, start + c * p.x.stride_c, p.x.stride_c, C - c, x);
        load8(p.dn, p.type, row * C + c, 1, C - c, dn);
        if (p.norm.gamma != nullptr) load8(p.norm.gamma, MK_FLOAT32, c, 1, C - c, gamma);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float dxhat = p.norm.gamma != nullptr ? dn[j] * gamma[j] : dn[j];  // dn is 0 past C
            m += dxhat;
            v += dxhat * (x[j] - mean) * rstd;
        }
    }
    return {warp_sum(m) / C, warp_sum(v) / C};
}

__global__ void __launch_bounds__(kThreads, 2)
    norm_bwd_kernel(const mk_norm_backward_arguments p, int along_channels, bool totals_in_shared) {
    const int C = p.size.C;
    Moments* moments = shared_memory<Moments>();  // [kRows]
    float* part = p.sums + int64_t{blockIdx.x} * 3 * C;
    float* totals = totals_in_shared ? reinterpret_cast<float*>(moments + kRows) : part;  // [sets, 3, C]
    const int sets = kThreads / along_channels;
    const int set = threadIdx.x / along_channels, first_c = threadIdx.x % along_channels * 8;
    float* own = totals + int64_t{set} * 3 * C;
    for (int c = first_c; c < C; c += along_channels * 8) {
        for (int j = c; j < C && j < c + 8; ++j) own[j] = own[C + j] = own[2 * int64_t{C} + j] = 0.0f;
    }

    const int64_t rows = p.size.B * p.size.S, step = int64_t{gridDim.x} * kRows;
    for (int64_t first = int64_t{blockIdx.x} * kRows; first < rows; first += step) {
        const int count = static_cast<int>(rows - first < kRows ? rows - first : kRows);
        __syncthreads();  // the moments of the last step were read
        for (int r = threadIdx.x / 32; r < count; r += kWarps) {
            const Moments of_row = moments_of(p, first + r, p.norm.mean[first + r], p.norm.rstd[first + r]);
            if (threadIdx.x % 32 == 0) moments[r] = of_row;
        }
        __syncthreads();
        for (int c = first_c; c < C; c += along_channels * 8) {
            const int valid = C - c;
            float gamma[8], beta[8], dgamma[8], dbeta[8], dy_sum[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                gamma[j] = 1.0f;
                beta[j] = dgamma[j] = dbeta[j] = dy_sum[j] = 0.0f;
            }
            if (p.norm.gamma != nullptr) load8(p.norm.gamma, MK_FLOAT32, c, 1, valid, gamma);
            if (p.norm.beta != nullptr && p.n != nullptr) load8(p.norm.beta, MK_FLOAT32, c, 1, valid, beta);
            for (int r = set; r < count; r += sets) {
                const int64_t row = first + r, offset = row * C + c;
                const float mean = p.norm.mean[row], rstd = p.norm.rstd[row];
                float xhat[8], dn[8], dy[8];
                load8(p.x.data, p.x.type, row_offset(p.x, p.size, row) + c * p.x.stride_c, p.x.stride_c, valid, xhat);
                load8(p.dn, p.type, offset, 1, valid, dn);
                load8(p.dy, p.x.type, offset, 1, valid, dy);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    xhat[j] = (xhat[j] - mean) * rstd;
                    dgamma[j] += dn[j] * xhat[j];
                    dbeta[j] += dn[j];
                    dy_sum[j] += dy[j];
                    dy[j] += rstd * (dn[j] * gamma[j] - moments[r].m - xhat[j] * moments[r].v);
                    xhat[j] = xhat[j] * gamma[j] + beta[j];
                }
                store8(p.dx, p.x.type, offset, valid, dy);
                if (p.n != nullptr) store8(p.n, p.type, offset, valid, xhat);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (j < valid) {
                    own[c + j] += dgamma[j];
                    own[int64_t{C} + c + j] += dbeta[j];
                    own[2 * int64_t{C} + c + j] += dy_sum[j];
                }
            }
        }
    }
    if (totals_in_shared) {
        __syncthreads();
        for (int i = threadIdx.x; i < 3 * C; i += kThreads) {
            float sum = 0.0f;
            for (int other = 0; other < sets; ++other) sum += totals[other * 3 * C + i];
            part[i] = sum;
        }
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_norm_backward_parts(mk_size size, int multiprocessors) {
    const int64_t steps = mixer_kernels::cdiv(size.B * size.S, mixer_kernels::kRows);
    const int blocks = multiprocessors > 0 ? 2 * multiprocessors : 2;  // what launch bounds let be resident at once
    return static_cast<int>(steps < blocks ? steps : blocks);
}

extern "C" int mk_norm_backward(const mk_norm_backward_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const int C = arguments->size.C, along_channels = threads_along_channels(C);
    const size_t moments = kRows * sizeof(Moments);
    const size_t totals = sizeof(float) * 3 * C * (kThreads / along_channels);
    const bool in_shared = moments + totals <= kMostShared;
    return launch(norm_bwd_kernel, arguments->parts, kThreads, in_shared ? moments + totals : moments, stream,
                  *arguments, along_channels, in_shared);
}
