// Kernels of sm_90 for the tests of the model: right ones, and with faults that it has to catch.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device/matrix.cuh"
#include "device/warpgroup.cuh"

namespace mixer_kernels {

// -------------------------------------------------------------------------------------------------------- a pipeline

// What is wrong with the product below.
enum Fault {
    NONE,
    WRONG_STRIDE,
    WRONG_PARITY,
    EXPECTS_LESS,
    EXPECTS_NOTHING,
    NO_FENCE,
    NO_INIT_FENCE,
    RELEASES_EARLY,
    READS_BEFORE_WAIT,
    WRITES_BEFORE_WAIT,
    NO_WGMMA_FENCE,
    NO_BARRIER_BEFORE_STORE,
    RETURNS_WITH_A_STORE,
    RETURNS_WITHOUT_COMMIT,
    RETURNS_WITH_A_PRODUCT,
    OVERWRITES_A_STORE,
    ONE_ARRIVAL_TOO_MANY,
    FORGETS_A_LOAD,
    NAMED_BARRIER_OF_TOO_MANY,
    MISALIGNED_TILE,
    UNMASKED_TAIL,
    FAULTS,
};

constexpr int TILE = 64, STAGES = 2, THREADS = 256;
constexpr int TILE_BYTES = TILE * TILE * 2, STAGE_BYTES = 2 * TILE_BYTES;
constexpr int BARRIERS = STAGES * STAGE_BYTES + TILE_BYTES;
constexpr int SHARED_BYTES = 1024 + BARRIERS + 16 * STAGES;

// d [M, N] = a [M, K] . b [N, K]': a producer and a consumer warpgroup, tiles of 64 x 64, blocks that take every
// gridDim.x-th of them.
__global__ void __launch_bounds__(THREADS, 1)
    pipeline(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
             const __grid_constant__ TensorMap d, int tiles_m, int tiles, int steps, Fault fault) {
#ifdef MK_HAS_SM90A
    const shared_address begin = address_of(shared_memory<char>());
    const shared_address stages = fault == MISALIGNED_TILE ? begin : (begin + 1023) & ~1023u;
    const shared_address out = stages + STAGES * STAGE_BYTES, barriers = stages + BARRIERS;
    const auto full = [&](int slot) { return barriers + 16 * slot; };
    const auto empty = [&](int slot) { return barriers + 16 * slot + 8; };
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = uniform(thread / 32);

    if (thread == 0) {
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full(slot), 1);
            barrier_init(empty(slot), 4);
        }
        if (fault != NO_INIT_FENCE) barrier_init_fence();
    }
    __syncthreads();

    if (warp >= 4) {
        decrease_registers<24>();
        if (warp > 4 || lane > 0) return;
        int use = 0;
        for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
            for (int step = 0; step < steps; ++step, ++use) {
                const int slot = use % STAGES, parity = use / STAGES % 2;
                barrier_wait(empty(slot), fault == WRONG_PARITY ? parity : parity ^ 1);
                const shared_address stage = stages + slot * STAGE_BYTES;
                if (fault == EXPECTS_NOTHING) {
                    barrier_arrive(full(slot));
                } else {
                    barrier_expect(full(slot), fault == EXPECTS_LESS ? TILE_BYTES : STAGE_BYTES);
                }
                load_tile(stage, a, full(slot), step * TILE, tile % tiles_m * TILE);
                if (fault == FORGETS_A_LOAD && step == 1) continue;
                load_tile(stage + TILE_BYTES, b, full(slot), step * TILE, tile / tiles_m * TILE);
            }
        }
        return;
    }
    increase_registers<240>();
    int use = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
        float sums[TILE / 2], early = 0.0f;
        for (int step = 0; step < steps; ++step, ++use) {
            const int slot = use % STAGES;
            barrier_wait(full(slot), use / STAGES % 2);
            const shared_address stage = stages + slot * STAGE_BYTES;
            if (fault == RELEASES_EARLY && lane == 0) barrier_arrive(empty(slot));
            keep(sums);
            if (fault != NO_WGMMA_FENCE) wgmma_fence();
            const uint64_t left = operand<Swizzle::bytes_128>(stage, 16, 1024);
            const uint64_t right =
                operand<Swizzle::bytes_128>(stage + TILE_BYTES, 16, fault == WRONG_STRIDE ? 512 : 1024);
            for (int k = 0; k < 4; ++k) {
                wgmma<bfloat16, TILE, Major::k, Major::k>(sums, operand_at(left, k * 32), operand_at(right, k * 32),
                                                          step + k > 0);
            }
            wgmma_commit();
            if (fault == READS_BEFORE_WAIT && step + 1 == steps) early = sums[0];
            if (fault == WRITES_BEFORE_WAIT && step + 1 == steps) sums[0] += 1.0f;
            if (fault == RETURNS_WITH_A_PRODUCT && step + 1 == steps) return;
            wgmma_wait<0>();
            keep(sums);
            if (fault == ONE_ARRIVAL_TOO_MANY && thread == 32) barrier_arrive(full(slot));
            if (fault != RELEASES_EARLY && lane == 0) barrier_arrive(empty(slot));
        }
        sums[0] += early;
        // Staged for TMA, which has to have read what was staged before.
        if (fault != OVERWRITES_A_STORE && thread == 0) store_wait_read<0>();
        named_barrier_sync(1, fault == NAMED_BARRIER_OF_TOO_MANY ? 160 : 128);
        for (int j = 0; j < TILE; j += 16) {
            uint32_t pairs[4];
            for (int i = 0; i < 4; ++i) pairs[i] = pack<bfloat16>(sums[j / 2 + 2 * i], sums[j / 2 + 2 * i + 1]);
            const int row = warp * 16 + lane % 16, chunk = j / 8 + lane / 16;
            store_matrices_x4(out + row * 128 + ((chunk ^ row % 8) << 4), pairs);
        }
        if (fault != NO_FENCE) fence_async_shared();
        if (fault != NO_BARRIER_BEFORE_STORE) named_barrier_sync(1, 128);
        if (thread == 0) {
            store_tile(d, out, tile / tiles_m * TILE, tile % tiles_m * TILE);
            if (fault != RETURNS_WITHOUT_COMMIT) store_commit();
        }
    }
    if (thread == 0 && fault != RETURNS_WITH_A_STORE && fault != OVERWRITES_A_STORE) store_wait_read<0>();
    if (thread == 0 && fault == OVERWRITES_A_STORE) store_wait<0>();
#endif
}

// --------------------------------------------------------------------------------------------------- smaller faults

enum SmallFault {
    NOTHING_WRONG,
    LAPS_A_PARITY,
    TOO_MANY_REGISTERS,
    REGISTERS_OF_ONE_WARP,
    NAMED_BARRIER_OF_A_LANE,
    NAMED_BARRIER_TWICE,
    NAMED_BARRIER_OF_TWO_SIZES,
    NO_BARRIER_MADE,
    BARRIER_OVERWRITTEN,
    BARRIER_MISALIGNED,
    BARRIER_MADE_TWICE,
    PARITY_OF_TWO,
    PLAIN_STORE_WITHOUT_FENCE,
    STORE_FROM_MISALIGNED,
    LOAD_OUTSIDE_OF_SHARED_MEMORY,
    WRONG_NUMBER_OF_AXES,
    NO_TENSOR_MAP,
    RETURNS_BEFORE_A_LOAD,
    PRODUCT_OF_ONE_WARP,
    PRODUCT_OF_OTHER_OPERANDS,
    PRODUCT_OUTSIDE_OF_SHARED_MEMORY,
    OPERAND_OFF_BY_8,
    SHARED_OPERAND_WITHOUT_FENCE,
    ADDRESS_OF_A_LOCAL,
    SMALL_FAULTS,
};

// map: of rows of 64 bfloat16, boxes of [8, 64].
__global__ void __launch_bounds__(384, 1)
    small_fault(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap none, SmallFault fault) {
#ifdef MK_HAS_SM90A
    char* bytes = shared_memory<char>();
    const shared_address begin = address_of(bytes), tile = (begin + 1023) & ~1023u, barrier = begin;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    if (thread == 0 && fault != NO_BARRIER_MADE) {
        barrier_init(fault == BARRIER_MISALIGNED ? barrier + 4 : barrier, 1);
        if (fault == BARRIER_MADE_TWICE) barrier_init(barrier, 1);
        barrier_init(barrier + 8, 1);
        barrier_init_fence();
        if (fault == BARRIER_OVERWRITTEN) bytes[3] = 0;
    }
    __syncthreads();

    switch (fault) {
        case LAPS_A_PARITY:  // a lane of a warp gives a slot back while the others may still look whether it is full
            for (int use = 0; use < 8; ++use) {
                if (thread == 32) {
                    barrier_wait(barrier + 8, use % 2 ^ 1);
                    barrier_arrive(barrier);
                }
                if (thread < 32) {
                    barrier_wait(barrier, use % 2);
                    if (thread == 0) barrier_arrive(barrier + 8);
                }
            }
            break;
        case TOO_MANY_REGISTERS:
            increase_registers<240>();
            break;
        case REGISTERS_OF_ONE_WARP:
            if (warp == 1) decrease_registers<24>();
            break;
        case NAMED_BARRIER_OF_A_LANE:
            if (thread < 80) named_barrier_sync(1, 96);
            if (thread >= 368) named_barrier_sync(1, 96);
            break;
        case NAMED_BARRIER_TWICE:
            if (warp == 0) named_barrier_arrive(3, 96);
            if (warp == 0) named_barrier_sync(3, 96);
            break;
        case NAMED_BARRIER_OF_TWO_SIZES:
            named_barrier_sync(3, warp == 0 ? 384 : 352);
            break;
        case PARITY_OF_TWO:
            barrier_wait(barrier, 2);
            break;
        case PLAIN_STORE_WITHOUT_FENCE:
            pointer_to<char>(tile)[thread] = 1;
            __syncthreads();
            if (thread > 0) break;
            store_tile(map, tile, 0, 0);
            store_commit();
            store_wait_read<0>();
            break;
        case STORE_FROM_MISALIGNED:
            if (thread == 0) store_tile(map, tile + 64, 0, 0);
            break;
        case LOAD_OUTSIDE_OF_SHARED_MEMORY:
            if (thread == 0) load_tile(tile + 8192, map, barrier, 0, 0);
            break;
        case WRONG_NUMBER_OF_AXES:
            if (thread == 0) load_tile(tile, map, barrier, 0, 0, 0);
            break;
        case NO_TENSOR_MAP:
            if (thread == 0) load_tile(tile, none, barrier, 0, 0);
            break;
        case RETURNS_BEFORE_A_LOAD:
            if (thread == 0) barrier_expect(barrier, 8 * 128);
            if (thread == 0) load_tile(tile, map, barrier, 0, 0);
            break;
        case PRODUCT_OF_ONE_WARP:
        case PRODUCT_OF_OTHER_OPERANDS:
        case PRODUCT_OUTSIDE_OF_SHARED_MEMORY:
        case OPERAND_OFF_BY_8:
        case SHARED_OPERAND_WITHOUT_FENCE: {
            if (thread >= (fault == PRODUCT_OF_ONE_WARP ? 32 : 128)) return;
            const uint32_t zeros[4] = {};
            float d[32] = {};
            if (fault == SHARED_OPERAND_WITHOUT_FENCE) {
                for (int row = warp * 16; row < 64; row += 64) {
                    store_matrices_x4(tile + (row + lane % 16) * 128 + lane / 16 * 16, zeros);
                }
                named_barrier_sync(1, 128);
            }
            const shared_address start = fault == PRODUCT_OUTSIDE_OF_SHARED_MEMORY ? tile + 8192
                                         : fault == OPERAND_OFF_BY_8               ? tile + 8
                                         : fault == PRODUCT_OF_OTHER_OPERANDS      ? tile + 32 * warp
                                                                                   : tile;
            wgmma_fence();
            wgmma<float16, 64, Major::k>(d, zeros, operand<Swizzle::bytes_128>(start, 16, 1024));
            wgmma_commit();
            wgmma_wait<0>();
            break;
        }
        case ADDRESS_OF_A_LOCAL:
            address_of(&fault);
            break;
        default:
            barrier_arrive(barrier);
    }
#endif
}

// ----------------------------------------------------------------------------------------------------------- clusters

enum ClusterFault { NO_CLUSTER_FAULT, RELEASES_ITS_OWN_ONLY, NO_SYNC_AT_THE_END, NO_SYNC_AT_THE_BEGIN, CLUSTER_FAULTS };

// out [rounds, blocks, blocks * 8, 64]: each block of the cluster loads 8 rows a round, for all of them; out is what
// each then has.
__global__ void __launch_bounds__(64)
    share(const __grid_constant__ TensorMap map, int rounds, ClusterFault fault, uint16_t* out) {
#ifdef MK_HAS_SM90A
    constexpr int bytes = 8 * 128;
    const int blocks = static_cast<int>(gridDim.x), rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
    const shared_address full = address_of(shared_memory<char>()), empty = full + 8;
    const shared_address tile = (empty + 8 + 1023) & ~1023u;
    if (thread == 0) {
        barrier_init(full, 1);
        barrier_init(empty, blocks);
        barrier_init_fence();
    }
    if (fault != NO_SYNC_AT_THE_BEGIN) cluster_sync();
    for (int round = 0; round < rounds; ++round) {
        if (thread == 32) {
            barrier_wait(empty, round % 2 ^ 1);
            barrier_expect(full, blocks * bytes);
            load_tile_multicast(tile + rank * bytes, map, full, static_cast<uint16_t>((1 << blocks) - 1), 0,
                                (round * blocks + rank) * 8);
        }
        if (thread < 32) {
            barrier_wait(full, round % 2);
            const uint16_t* in = pointer_to<uint16_t>(tile);
            uint16_t* to = out + (round * blocks + rank) * blocks * bytes / 2;
            for (int i = thread; i < blocks * bytes / 2; i += 32) to[i] = in[i];
            __syncwarp();
            if (thread < blocks) barrier_arrive_in(empty, fault == RELEASES_ITS_OWN_ONLY ? rank : thread);
        }
    }
    if (fault != NO_SYNC_AT_THE_END) cluster_sync();
#endif
}

}  // namespace mixer_kernels

using namespace mixer_kernels;

extern "C" {

int sample_faults() { return FAULTS; }

// Rows of a and b are `pitch` elements apart, of which only K are theirs.
int sample_pipeline(Fault fault, int blocks, const bfloat16* a, const bfloat16* b, bfloat16* d, int M, int N, int K,
                    int pitch) {
    const auto map = [](TensorMap* result, const void* base, int64_t rows, int64_t columns, int64_t stride) {
        const int64_t sizes[] = {columns, rows}, strides[] = {stride};
        const int box[] = {TILE, TILE};
        return make_tensor_map(result, base, MK_BFLOAT16, 2, sizes, strides, box, Swizzle::bytes_128);
    };
    TensorMap map_a, map_b, map_d;
    const int columns = fault == UNMASKED_TAIL ? pitch : K;
    int error = map(&map_a, a, M, columns, pitch);
    if (error == 0) error = map(&map_b, b, N, columns, pitch);
    if (error == 0) error = map(&map_d, d, M, N, N);
    if (error != 0) return error;
    const int tiles_m = (M + TILE - 1) / TILE, tiles = tiles_m * ((N + TILE - 1) / TILE);
    return launch(pipeline, blocks, THREADS, SHARED_BYTES, nullptr, map_a, map_b, map_d, tiles_m, tiles,
                  (K + TILE - 1) / TILE, fault);
}

int sample_small_faults() { return SMALL_FAULTS; }

int sample_small_fault(SmallFault fault, void* rows) {
    const int64_t sizes[] = {64, 8}, strides[] = {64};
    const int box[] = {64, 8};
    TensorMap map, none{};
    const int error = make_tensor_map(&map, rows, MK_BFLOAT16, 2, sizes, strides, box, Swizzle::bytes_128);
    return error != 0 ? error : launch(small_fault, 1, 384, 1024 + 8192, nullptr, map, none, fault);
}

int sample_cluster_faults() { return CLUSTER_FAULTS; }

// rows [rounds * blocks * 8, 64]
int sample_share(ClusterFault fault, int blocks, int cluster, int rounds, void* rows, uint16_t* out) {
    const int64_t sizes[] = {64, int64_t{rounds} * blocks * 8}, strides[] = {64};
    const int box[] = {64, 8};
    TensorMap map;
    const int error = make_tensor_map(&map, rows, MK_BFLOAT16, 2, sizes, strides, box, Swizzle::none);
    if (error != 0) return error;
    return launch_cluster(share, blocks, 64, cluster, 2048 + blocks * 1024, nullptr, map, rounds, fault, out);
}

}  // extern "C"

// For the sanitizers: runs the product with the fault whose number is the argument, on arrays of the exact size.
int main(int argc, char** argv) {
    const Fault fault = argc > 1 ? static_cast<Fault>(std::atoi(argv[1])) : NONE;
    const int M = 100, N = 72, K = 200;
    std::vector<uint4> a(M * K / 8), b(N * K / 8), d(M * N / 8);  // aligned
    const int error =
        sample_pipeline(fault, 2, reinterpret_cast<bfloat16*>(a.data()), reinterpret_cast<bfloat16*>(b.data()),
                        reinterpret_cast<bfloat16*>(d.data()), M, N, K, K);
    std::printf("%s\n", mk_error_string(error));
    return error != 0;
}
