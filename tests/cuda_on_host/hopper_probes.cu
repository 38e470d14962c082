// One instruction of sm_90 a kernel, for the tests of the model: what each computes.

#include "device/matrix.cuh"
#include "device/warpgroup.cuh"

namespace mixer_kernels {

// bytes: what the box at (i0, i1[, i2]) is in shared memory, from `offset` bytes past a multiple of 1024. Of two
// LOADS of it the second is not waited for.
template <int LOADS>
__global__ void probe_load(const __grid_constant__ TensorMap map, int rank, int i0, int i1, int i2, int offset,
                           int box_bytes, char* bytes) {
#ifdef MK_HAS_SM90A
    const shared_address begin = address_of(shared_memory<char>()), barrier = begin;
    const shared_address tile = ((begin + 16 + 1023) & ~1023u) + offset;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        prefetch(map);
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    __syncthreads();
    for (int load = 0; load < LOADS; ++load) {
        if (thread == 0) {
            barrier_expect(barrier, box_bytes);
            rank == 2 ? load_tile(tile, map, barrier, i0, i1) : load_tile(tile, map, barrier, i0, i1, i2);
        }
        if (load == 0) barrier_wait(barrier, 0);
        __syncwarp();  // nobody may still look at the phase that the next load ends
    }
    for (int i = thread; i < box_bytes; i += 32) bytes[i] = pointer_to<char>(tile)[i];
    if (LOADS == 2) barrier_wait(barrier, 1);
#endif
}

// The other way round.
__global__ void probe_store(const __grid_constant__ TensorMap map, int rank, int i0, int i1, int i2, int offset,
                            int box_bytes, const char* bytes) {
#ifdef MK_HAS_SM90A
    const shared_address tile = ((address_of(shared_memory<char>()) + 1023) & ~1023u) + offset;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < box_bytes; i += 32) pointer_to<char>(tile)[i] = bytes[i];
    fence_async_shared();
    __syncwarp();
    if (thread == 0) {
        rank == 2 ? store_tile(map, tile, i0, i1) : store_tile(map, tile, i0, i1, i2);
        store_commit();
        store_wait_read<0>();
    }
#endif
}

struct Placed {  // an operand's bytes, and its descriptor
    const char* bytes;
    int count, start, leading, stride, swizzle;
};

__device__ uint64_t describe(Placed operand_, shared_address at) {
    at += operand_.start;
    switch (operand_.swizzle) {
        case 128:
            return operand<Swizzle::bytes_128>(at, operand_.leading, operand_.stride);
        case 64:
            return operand<Swizzle::bytes_64>(at, operand_.leading, operand_.stride);
        case 32:
            return operand<Swizzle::bytes_32>(at, operand_.leading, operand_.stride);
        default:
            return operand<Swizzle::none>(at, operand_.leading, operand_.stride);
    }
}

// d [128, N / 2]: a thread's accumulators. A from registers [128, 4], or from shared memory where these are null.
template <class T, int N, Major A, Major B>
__global__ void probe_wgmma(Placed a, const uint32_t* registers, Placed b, bool accumulate, float* d) {
#ifdef MK_HAS_SM90A
    const shared_address place_a = (address_of(shared_memory<char>()) + 1023) & ~1023u, place_b = place_a + 16384;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < a.count; i += 128) pointer_to<char>(place_a)[i] = a.bytes[i];
    for (int i = thread; i < b.count; i += 128) pointer_to<char>(place_b)[i] = b.bytes[i];
    fence_async_shared();
    __syncthreads();
    float sums[N / 2];
    uint32_t left[4] = {};
    for (int i = 0; i < N / 2; ++i) sums[i] = d[thread * (N / 2) + i];
    for (int i = 0; i < 4 && registers != nullptr; ++i) left[i] = registers[thread * 4 + i];
    wgmma_fence();
    if (registers != nullptr) {
        wgmma<T, N, B>(sums, left, describe(b, place_b), accumulate);
    } else {
        wgmma<T, N, A, B>(sums, describe(a, place_a), describe(b, place_b), accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) d[thread * (N / 2) + i] = sums[i];
#endif
}

// rows [8 * matrices, 8]: what lies where lane l points.
__global__ void probe_stmatrix(const uint32_t* r, int matrices, int transposed, uint16_t* rows) {
#ifdef MK_HAS_SM90A
    uint16_t* copy = shared_memory<uint16_t>();
    const int lane = static_cast<int>(threadIdx.x);
    const shared_address row = address_of(copy + lane * 8);
    uint32_t four[4] = {}, two[2] = {};
    for (int i = 0; i < matrices; ++i) (matrices == 4 ? four[i] : two[i % 2]) = r[lane * matrices + i];
    if (matrices == 4) {
        transposed ? store_matrices_x4_transposed(row, four) : store_matrices_x4(row, four);
    } else {
        transposed ? store_matrices_x2_transposed(row, two) : store_matrices_x2(row, two);
    }
    __syncwarp();
    for (int i = 0; i < 8 && lane < 8 * matrices; ++i) rows[lane * 8 + i] = copy[lane * 8 + i];
#endif
}

// stamps [4, 3]: for each phase of an mbarrier when the two threads arrived and when a third had waited.
__global__ void probe_phases(int* counter, int* stamps) {
#ifdef MK_HAS_SM90A
    const shared_address barrier = address_of(shared_memory<char>());
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    if (thread == 0) {
        barrier_init(barrier, 2);
        barrier_init(barrier + 8, 1);
        barrier_wait(barrier, 1);  // the phase before the first
    }
    __syncthreads();
    if (thread % 32 != 0) return;
    for (int phase = 0; phase < 4; ++phase) {
        if (warp < 2) {
            barrier_wait(barrier + 8, phase % 2 ^ 1);
            stamps[phase * 3 + warp] = (*counter)++;
            barrier_arrive(barrier);
        } else {
            barrier_wait(barrier, phase % 2);
            stamps[phase * 3 + 2] = (*counter)++;
            barrier_arrive(barrier + 8);
        }
    }
#endif
}

}  // namespace mixer_kernels

using namespace mixer_kernels;

namespace {

struct SampleMap {
    void* base;
    mk_type type;
    int rank, swizzle;
    int64_t sizes[5], strides[4];
    int box[5];

    int box_bytes() const {
        int bytes = type == MK_FLOAT32 ? 4 : 2;
        for (int i = 0; i < rank; ++i) bytes *= box[i];
        return bytes;
    }
    int make(TensorMap* map) const {
        return make_tensor_map(map, base, type, rank, sizes, strides, box, static_cast<Swizzle>(swizzle));
    }
};

template <class BYTES>
int copy_box(void (*kernel)(TensorMap, int, int, int, int, int, int, BYTES), const SampleMap& m, int i0, int i1, int i2,
             int offset, BYTES bytes) {
    TensorMap map;
    const int error = m.make(&map);
    if (error != 0) return error;
    const int count = m.box_bytes();
    return launch(kernel, 1, 32, 2048 + offset + count, nullptr, map, m.rank, i0, i1, i2, offset, count, bytes);
}

template <class T, int N>
int run_wgmma(bool a_mn, bool b_mn, Placed a, const uint32_t* registers, Placed b, bool accumulate, float* d) {
    const auto kernel = a_mn ? (b_mn ? probe_wgmma<T, N, Major::mn, Major::mn> : probe_wgmma<T, N, Major::mn, Major::k>)
                             : (b_mn ? probe_wgmma<T, N, Major::k, Major::mn> : probe_wgmma<T, N, Major::k, Major::k>);
    return launch(kernel, 1, 128, 2048 + 16384 + b.count, nullptr, a, registers, b, accumulate, d);
}

template <class T>
int run_wgmma(int N, bool a_mn, bool b_mn, Placed a, const uint32_t* registers, Placed b, bool accumulate, float* d) {
    const auto run = N == 32    ? run_wgmma<T, 32>
                     : N == 64  ? run_wgmma<T, 64>
                     : N == 200 ? run_wgmma<T, 200>
                                : run_wgmma<T, 256>;
    return run(a_mn, b_mn, a, registers, b, accumulate, d);
}

}  // namespace

extern "C" {

int sample_load(const SampleMap* map, int i0, int i1, int i2, int offset, char* bytes) {
    return copy_box<char*>(probe_load<1>, *map, i0, i1, i2, offset, bytes);
}

int sample_load_twice(const SampleMap* map, int i0, int i1, int i2, int offset, char* bytes) {
    return copy_box<char*>(probe_load<2>, *map, i0, i1, i2, offset, bytes);
}

int sample_store(const SampleMap* map, int i0, int i1, int i2, int offset, const char* bytes) {
    return copy_box<const char*>(probe_store, *map, i0, i1, i2, offset, bytes);
}

// N: 32, 64, 200 or 256.
int sample_wgmma(mk_type type, int N, int a_mn, int b_mn, const Placed* a, const uint32_t* registers, const Placed* b,
                 int accumulate, float* d) {
    return (type == MK_FLOAT16 ? run_wgmma<float16> : run_wgmma<bfloat16>)(N, a_mn, b_mn, *a, registers, *b, accumulate,
                                                                           d);
}

int sample_stmatrix(const uint32_t* r, int matrices, int transposed, uint16_t* rows) {
    return launch(probe_stmatrix, 1, 32, 32 * 16, nullptr, r, matrices, transposed, rows);
}

int sample_phases(int* counter, int* stamps) { return launch(probe_phases, 1, 96, 16, nullptr, counter, stamps); }

}  // extern "C"
