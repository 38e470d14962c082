// Small kernels for the tests of the model itself: what its instructions compute, and faults that it has to catch.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device/copy.cuh"
#include "device/gelu.cuh"
#include "device/matrix.cuh"

namespace mixer_kernels {

// ------------------------------------------------------------------------------------------------------- products

// What is wrong with a kernel below.
enum Fault {
    NONE,
    ROW_MASK_ONE_TOO_FAR,
    STORE_MASK_ONE_TOO_FAR,
    NO_WAIT,
    NO_BARRIER_AFTER_WAIT,
    NO_BARRIER_BEFORE_OVERWRITE,
    TAIL_NOT_ZEROED,
    BARRIER_IN_HALF_A_BLOCK,
    BARRIER_IN_TWO_PLACES,
    EARLY_RETURN,
    MISALIGNED_LDMATRIX,
    LDMATRIX_OUT_OF_BOUNDS,
    MISALIGNED_COPY,
    COPY_OUT_OF_BOUNDS,
    WRITE_OUT_OF_BOUNDS,
    TOO_MUCH_SHARED_MEMORY,
    DIVERGENT_WARP,
    NO_WARP_BARRIER,
    FAULTS,
};

constexpr int TILE = 32, STEP = 16, STAGES = 2, ROW = STEP + 8, THREADS = 64;
constexpr int TILE_ELEMENTS = TILE * ROW, STAGE_ELEMENTS = 2 * TILE_ELEMENTS;

// c [M, N] = a [M, K] . b [N, K]', K a multiple of 8.
__global__ void __launch_bounds__(THREADS) product(const bfloat16* __restrict__ a, const bfloat16* __restrict__ b,
                                                   float* __restrict__ c, int M, int N, int K, Fault fault) {
    bfloat16* stages = shared_memory<bfloat16>();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int m0 = static_cast<int>(blockIdx.x) * TILE, n0 = static_cast<int>(blockIdx.y) * TILE;

    const auto copy_rows = [&](bfloat16* tile, const bfloat16* from, int first, int rows, int k0) {
        const int row = first + thread % TILE, k = k0 + thread / TILE * 8;
        const bool inside = (fault == ROW_MASK_ONE_TOO_FAR ? row <= rows : row < rows) && k < K;
        if (fault == TAIL_NOT_ZEROED && !inside) return;
        const int64_t offset = inside ? static_cast<int64_t>(row) * K + k : 0;
        bfloat16* to = tile + thread % TILE * ROW + thread / TILE * 8;
        copy_async_16(fault == MISALIGNED_COPY      ? to + 4
                      : fault == COPY_OUT_OF_BOUNDS ? to + STAGES * STAGE_ELEMENTS
                                                    : to,
                      from + offset, inside ? 16 : 0);
    };
    const auto copy_stage = [&](int step) {
        bfloat16* stage = stages + step % STAGES * STAGE_ELEMENTS;
        copy_rows(stage, a, m0, M, step * STEP);
        copy_rows(stage + TILE_ELEMENTS, b, n0, N, step * STEP);
        copy_async_commit();
    };

    float sums[4][4] = {};
    const int steps = (K + STEP - 1) / STEP;
    copy_stage(0);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            copy_stage(step + 1);
        } else {
            copy_async_commit();
        }
        if (fault != NO_WAIT) copy_async_wait<1>();
        if (fault == BARRIER_IN_HALF_A_BLOCK) {
            if (warp == 0) __syncthreads();
        } else if (fault == BARRIER_IN_TWO_PLACES && warp == 1) {
            __syncthreads();
        } else if (fault != NO_BARRIER_AFTER_WAIT) {
            __syncthreads();
        }
        if (fault == EARLY_RETURN && thread == 17) return;
        const bfloat16* stage = stages + step % STAGES * STAGE_ELEMENTS;
        uint32_t left[4];
        const bfloat16* row = stage + (warp * 16 + lane % 16) * ROW + lane / 16 * 8;
        load_matrices_x4(left, fault == MISALIGNED_LDMATRIX      ? row + 1
                               : fault == LDMATRIX_OUT_OF_BOUNDS ? row + STAGES * STAGE_ELEMENTS
                                                                 : row);
        for (int n = 0; n < TILE; n += 8) {
            uint32_t right[2];
            load_matrices_x2(right, stage + TILE_ELEMENTS + (n + lane % 8) * ROW + lane / 8 % 2 * 8);
            multiply_add<bfloat16>(sums[n / 8], left, right[0], right[1]);
        }
        if (fault != NO_BARRIER_BEFORE_OVERWRITE) __syncthreads();
    }
    for (int i = 0; i < 16; ++i) {
        const int m = m0 + warp * 16 + lane / 4 + i / 2 % 2 * 8, n = n0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const bool inside = m < M && (fault == STORE_MASK_ONE_TOO_FAR ? n <= N : n < N);
        if (inside) c[static_cast<int64_t>(m) * N + n] = sums[i / 4][i % 4];
    }
}

// out [32]: each lane's number, handed to its right neighbour through shared memory.
__global__ void neighbours(const float* __restrict__ in, float* __restrict__ out, Fault fault) {
    float* numbers = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x);
    numbers[fault == WRITE_OUT_OF_BOUNDS ? lane + 1 : lane] = in[lane];
    if (fault == DIVERGENT_WARP && lane < 16) __shfl_sync(~0u, 0, 0);
    if (fault != NO_WARP_BARRIER) __syncwarp();
    out[lane] = numbers[(lane + 31) % 32];
}

// --------------------------------------------------------------------------------------------------- instructions

template <class T>
__global__ void probe_mma(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t left[4];
    float sums[4];
    for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i];
    for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
    multiply_add<T>(sums, left, b[lane * 2], b[lane * 2 + 1]);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

// rows [32, 8]: what lane l points at is row l.
__global__ void probe_ldmatrix(const uint16_t* rows, int matrices, int transposed, uint32_t* r) {
    uint16_t* copy = shared_memory<uint16_t>();
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 8; ++i) copy[lane * 8 + i] = rows[lane * 8 + i];
    __syncwarp();
    uint32_t four[4] = {}, two[2] = {};
    if (matrices == 4) {
        transposed ? load_matrices_x4_transposed(four, copy + lane * 8) : load_matrices_x4(four, copy + lane * 8);
    } else {
        transposed ? load_matrices_x2_transposed(two, copy + lane * 8) : load_matrices_x2(two, copy + lane * 8);
    }
    for (int i = 0; i < matrices; ++i) r[lane * matrices + i] = matrices == 4 ? four[i] : two[i % 2];
}

// out [2, 32]: xor and indexed shuffles.
__global__ void probe_shuffles(const float* in, int lanes, int width, float* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const float value = in[lane];
    out[lane] = __shfl_xor_sync(~0u, value, lanes, width);
    out[32 + lane] = __shfl_sync(~0u, value, lanes, width);
}

__global__ void probe_load8(const void* in, mk_type type, int64_t offset, int64_t stride, int valid, float* out) {
    float v[8];
    load8(in, type, offset, stride, valid, v);
    for (int i = 0; i < 8; ++i) out[i] = v[i];
}

__global__ void probe_store8(void* out, mk_type type, int64_t offset, int valid, const float* in) {
    float v[8];
    for (int i = 0; i < 8; ++i) v[i] = in[i];
    store8(out, type, offset, valid, v);
}

// Each way of GELU, and where a way has it the slope: out [5][count].
__global__ void probe_gelu(const float* z, bool tanh_form, const GeluForm form, float* out, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += 32) {
        const GeluGradient both = gelu_and_slope(z[i], tanh_form);
        const GeluGradient of_form = tanh_form ? gelu_and_slope_tanh(z[i], form) : gelu_and_slope_erf(z[i], form);
        const float values[] = {gelu(z[i], tanh_form), gelu(z[i], form), both.a, both.slope, of_form.slope};
        for (int way = 0; way < 5; ++way) out[way * count + i] = values[way];
    }
}

__global__ void probe_convert(const void* in, mk_type from, void* out, mk_type to, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) store_element(out, to, i, load_element(in, from, i));
}

// order [blocks * threads]: when each thread of each block ran, up to the first barrier.
__global__ void probe_order(int* counter, int* order) { order[blockIdx.x * blockDim.x + threadIdx.x] = (*counter)++; }

}  // namespace mixer_kernels

using namespace mixer_kernels;

extern "C" {

int sample_faults() { return FAULTS; }

int sample_product(Fault fault, const bfloat16* a, const bfloat16* b, float* c, int M, int N, int K) {
    const size_t bytes = fault == TOO_MUCH_SHARED_MEMORY ? (227 << 10) + 1 : STAGES * STAGE_ELEMENTS * sizeof(bfloat16);
    return launch(product, dim3((M + TILE - 1) / TILE, (N + TILE - 1) / TILE), THREADS, bytes, nullptr, a, b, c, M, N,
                  K, fault);
}

int sample_neighbours(Fault fault, const float* in, float* out) {
    return launch(neighbours, 1, 32, 32 * sizeof(float), nullptr, in, out, fault);
}

int sample_mma(mk_type type, const uint32_t* a, const uint32_t* b, float* d) {
    return launch(type == MK_BFLOAT16 ? probe_mma<bfloat16> : probe_mma<float16>, 1, 32, 0, nullptr, a, b, d);
}

int sample_ldmatrix(const uint16_t* rows, int matrices, int transposed, uint32_t* r) {
    return launch(probe_ldmatrix, 1, 32, 32 * 16, nullptr, rows, matrices, transposed, r);
}

int sample_shuffles(const float* in, int lanes, int width, float* out) {
    return launch(probe_shuffles, 1, 32, 0, nullptr, in, lanes, width, out);
}

int sample_load8(const void* in, mk_type type, int64_t offset, int64_t stride, int valid, float* out) {
    return launch(probe_load8, 1, 1, 0, nullptr, in, type, offset, stride, valid, out);
}

int sample_store8(void* out, mk_type type, int64_t offset, int valid, const float* in) {
    return launch(probe_store8, 1, 1, 0, nullptr, out, type, offset, valid, in);
}

int sample_convert(const void* in, mk_type from, void* out, mk_type to, int64_t count) {
    return launch(probe_convert, 1, 32, 0, nullptr, in, from, out, to, count);
}

int sample_gelu(const float* z, int tanh_form, float* out, int64_t count) {
    return launch(probe_gelu, 1, 32, 0, nullptr, z, tanh_form != 0, GeluForm(tanh_form != 0), out, count);
}

int sample_order(int blocks, int threads, int* counter, int* order) {
    return launch(probe_order, blocks, threads, 0, nullptr, counter, order);
}

}  // extern "C"

// For the sanitizers: runs a kernel with the fault whose number is the argument, on arrays of the exact size.
int main(int argc, char** argv) {
    const Fault fault = argc > 1 ? static_cast<Fault>(std::atoi(argv[1])) : NONE;
    const int M = 33, N = 35, K = 40;
    std::vector<bfloat16> a(M * K, {0x3f80}), b(N * K, {0x3f80});
    std::vector<float> c(M * N), in(32, 1.0f), out(32);
    int error = sample_product(fault, a.data(), b.data(), c.data(), M, N, K);
    if (error == 0) error = sample_neighbours(fault, in.data(), out.data());
    std::printf("%s\n", mk_error_string(error));
    return error != 0;
}
