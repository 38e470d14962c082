// A matrix product of sm_90a with the rest of a layer around it: D [M, N] = left [M, K] . right [N, K]'.
//
// A persistent block of three warpgroups. One thread of the last has TMA fill a ring of stages, 64 elements along K
// each; the other two, the consumers, multiply them by wgmma with the sums in registers, and finish and store tiles 64
// x 64 elements, a chunk, at a time:
//
//   producer    ring.empty -> TMA: left, right -> ring.full
//   consumers   ring.full -> wgmma -> ring.empty;  [TMA: chunk to be changed ->] epilogue -> stmatrix -> TMA: store
//
// Consumers share a tile of 128 rows, or take tiles in turns (ping-pong), so that one multiplies while the other
// finishes. The blocks of a cluster have tiles below each other and the same columns: each loads a part of `right` for
// all of them. TMA reads zeros past the ends of a matrix and writes nothing there.
#pragma once

#include "channel_schedule.h"
#include "product_results.cuh"
#include "product_tile.cuh"

namespace mixer_kernels {
namespace sm90 {

// ------------------------------------------------------------------------------------------------------------ producer

// By one warp, of which one lane does it: what is the same in all lanes takes no registers of theirs.
template <class EPILOGUE, class TILE>
__device__ __forceinline__ void produce(const Product<EPILOGUE>& p, shared_address ring, shared_address barriers,
                                        bool leads) {
    using L = Layout<EPILOGUE, TILE>;
    const Walk<TILE> walk(p);
    constexpr int half = TILE::kColumns / 2;
    const int from = p.cluster == 1 ? 0 : cluster_rank() * half;  // of a tile's columns
    if (leads) {
        prefetch(p.left);
        prefetch(p.right);
    }
    RingPlace<L::kStages> place;
#pragma unroll 1
    for (int tile = walk.first; tile < walk.count; tile += walk.stride) {
        const int steps = walk.steps(p, tile);
        const Corner corner = walk.corner(tile);
        const int column = corner.n + from;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, place.next()) {
            const shared_address full = barriers + place.stage * 16, left = ring + place.stage * L::kStage;
            const shared_address right = left + L::kLeft + from * kStepBytes;
            if (leads) {
                barrier_wait(full + 8, place.parity ^ 1);
                barrier_expect(full, L::kStage);
                load_tile(left, p.left, full, step * kStep, corner.m);
                if (p.cluster == 1) {
                    load_tile(right, p.right, full, step * kStep, column);
                } else {
                    load_tile_multicast(right, p.right, full, 3, step * kStep, column);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- consumers

// The tile's product, from the ring. One step is under way while the next is waited for.
template <class T, class EPILOGUE, class TILE, class PLACE, class RELEASE>
__device__ __forceinline__ int multiply(typename TILE::Accumulators& accumulators, int steps, PLACE& place,
                                        shared_address left_rows, shared_address right, shared_address barriers,
                                        RELEASE release) {
    using L = Layout<EPILOGUE, TILE>;
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        barrier_wait(barriers + place.stage * 16, place.parity);
        const uint64_t a = operand<Swizzle::bytes_128>(left_rows + place.stage * L::kStage, 16, 8 * kStepBytes);
        const uint64_t b = operand<Swizzle::bytes_128>(right + place.stage * L::kStage, 16, 8 * kStepBytes);
#pragma unroll
        for (int i = 0; i < TILE::kRowBlocks; ++i) keep(accumulators[i]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
            for (int i = 0; i < TILE::kRowBlocks; ++i) {
                wgmma<T, TILE::kColumns, Major::k, Major::k>(accumulators[i],
                                                             operand_at(a, i * kBlockRows * kStepBytes + 32 * k),
                                                             operand_at(b, 32 * k), (step | k) != 0);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(before);
        before = place.stage;
        place.next();
    }
    return before;
}

template <Form form, class EPILOGUE, class TILE>
__device__ __forceinline__ void finish(const typename TILE::Accumulators& accumulators, const Product<EPILOGUE>& p,
                                       Corner corner, char* terms, Results<EPILOGUE, TILE>& results) {
    const int lane = results.thread() % 32, row = results.thread() / 32 * 16 + lane / 4, column = lane % 4 * 2;
    const RowTerms* rows = reinterpret_cast<const RowTerms*>(terms) + row;
    const float* vectors = reinterpret_cast<const float*>(terms + Layout<EPILOGUE, TILE>::kRowTerms) + column;
    char* scratch = terms + Layout<EPILOGUE, TILE>::kTerms - EPILOGUE::kScratch;
#pragma unroll
    for (int i = 0; i < TILE::kRowBlocks; ++i) {
        Chunk<TILE> chunk;
        chunk.m = corner.m + results.first_row() + i * kBlockRows;
        chunk.column = column;
        chunk.rows[0] = rows[i * kBlockRows];
        chunk.rows[1] = rows[i * kBlockRows + 8];
#pragma unroll
        for (int j = 0; j < TILE::kChunksAcross; ++j) {
            chunk.n = corner.n + j * kChunk;
            chunk.vectors = vectors + j * kChunk;
            results.begin();
            p.epilogue.template finish<form>(accumulators[i] + j * kChunk / 2, chunk, p, corner,
                                             i * TILE::kChunksAcross + j, scratch, results);
        }
    }
}

template <class T, class EPILOGUE, class TILE>
__device__ __forceinline__ void consume(const Product<EPILOGUE>& p, char* aligned, shared_address shared, int consumer,
                                        int thread) {
    using L = Layout<EPILOGUE, TILE>;
    const Walk<TILE> walk(p);
    const shared_address barriers = shared + L::kBarriersAt;
    const int lane = thread % 32;
    char* const terms = aligned + L::kTermsAt + consumer * L::kTerms;
    Results<EPILOGUE, TILE> results(p, shared, consumer, thread);
    const bool releases = lane < p.cluster;  // a stage, to the block of the cluster that may fill it
    const auto release = [&](int stage) {
        if (releases) barrier_arrive_in(barriers + stage * 16 + 8, lane);
    };

    const int first = walk.first + (TILE::kPingPong ? consumer * walk.stride : 0);
    const int stride = (TILE::kPingPong ? 2 : 1) * walk.stride;
    RingPlace<L::kStages> place;
    if (TILE::kPingPong && consumer == 1 && walk.first < walk.count) place.skip(walk.steps(p, walk.first));
    Corner corner = walk.corner(first < walk.count ? first : 0);
    if (EPILOGUE::kLoads && first < walk.count) results.request_first(corner);
#pragma unroll 1
    for (int tile = first; tile < walk.count; tile += stride) {
        const int steps = walk.steps(p, tile);
        const Corner of_consumer{corner.m + results.first_row(), corner.n};
        Terms<EPILOGUE, TILE> loaded;
        loaded.load(p, of_consumer, thread);
        if constexpr (TILE::kPingPong) {
            // While the other multiplies. Waiting for the turn is what keeps this consumer from polling a barrier of
            // the ring two laps early, too.
            loaded.store(terms, thread);
            if (tile != walk.first) named_barrier_sync(kTurnBarrier + consumer, kConsumers * kWarpgroup);
        }
        typename TILE::Accumulators accumulators;
        const int last =
            multiply<T, EPILOGUE, TILE>(accumulators, steps, place, shared + results.first_row() * kStepBytes,
                                        shared + L::kLeft, barriers, release);
        if constexpr (TILE::kPingPong) {
            if (tile + walk.stride < walk.count) {  // all products are issued: the other's turn
                named_barrier_arrive(kTurnBarrier + (consumer ^ 1), kConsumers * kWarpgroup);
                place.skip(walk.steps(p, tile + walk.stride));
            }
        }
        const Corner next = walk.corner(tile + stride < walk.count ? tile + stride : 0);
        results.set_next(tile + stride < walk.count, next);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TILE::kRowBlocks; ++i) keep(accumulators[i]);
        if (steps > 0) {
            release(last);
        } else {
#pragma unroll
            for (int i = 0; i < TILE::kRowBlocks; ++i) {
#pragma unroll
                for (int j = 0; j < TILE::kColumns / 2; ++j) accumulators[i][j] = 0.0f;
                keep(accumulators[i]);  // makes this a branch, not a choice for each of them
            }
        }
        if constexpr (!TILE::kPingPong) loaded.store(terms, thread);
        results.sync();

        p.epilogue.in_form([&](auto form) { finish<form.value>(accumulators, p, corner, terms, results); });
        corner = next;
    }
    if (thread == 0) store_wait_read<0>();
}

// -------------------------------------------------------------------------------------------------------------- kernel

template <class T, class EPILOGUE, class TILE>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(const __grid_constant__ Product<EPILOGUE> p) {
#ifdef MK_HAS_SM90A
    using L = Layout<EPILOGUE, TILE>;
    char* const start = shared_memory<char>();
    char* const aligned = start + (0u - address_of(start)) % kSwizzleAlignment;
    const shared_address shared = address_of(aligned), barriers = shared + L::kBarriersAt;
    const int warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
    if (threadIdx.x == 0) {
        constexpr int warps = (TILE::kPingPong ? 1 : kConsumers) * kWarpgroup / 32;  // that read a stage
        for (int i = 0; i < L::kStages; ++i) {
            barrier_init(barriers + 16 * i, 1);
            barrier_init(barriers + 16 * i + 8, warps * p.cluster);
        }
        for (int i = 0; i < kConsumers * L::kSlots; ++i) barrier_init(barriers + (2 * L::kMostStages + i) * 8, 1);
        barrier_init_fence();
    }
    if (p.cluster == 1) {
        __syncthreads();
    } else {
        cluster_sync();
    }
    if (warpgroup == kConsumers) {
        decrease_registers<kProducerRegisters>();
        if (warp == kConsumers * 4) produce<EPILOGUE, TILE>(p, shared, barriers, threadIdx.x % 32 == 0);
    } else {
        increase_registers<kConsumerRegisters>();
        consume<T, EPILOGUE, TILE>(p, aligned, shared, warpgroup, threadIdx.x % kWarpgroup);
    }
    __syncwarp();
    if (p.cluster > 1) cluster_sync();  // the others may still arrive at this block's barriers
#endif
}

// ----------------------------------------------------------------------------------------------------------- launching

// The map of a row-major matrix in boxes of box_rows x 64.
inline int make_matrix_map(TensorMap* map, const void* data, mk_type type, int64_t rows, int64_t columns,
                           int64_t stride, int box_rows) {
    const int64_t sizes[] = {columns, rows};
    const int box[] = {kStep, box_rows};
    return make_tensor_map(map, data, type, 2, sizes, &stride, box, Swizzle::bytes_128);
}

inline bool is_sound(mk_size size, int hidden, mk_type type) {
    return size.B >= 0 && size.S > 0 && size.C > 0 && size.C % 8 == 0 && hidden > 0 && type != MK_FLOAT32;
}

// Whether x is a matrix [B * S, C] of the products' dtype, channels side by side.
inline bool are_rows(mk_input x, mk_size size, mk_type type) {
    return x.type == type && x.stride_c == 1 && (size.B == 1 || size.S == 1 || x.stride_b == x.stride_s * size.S);
}

// From one of its rows of so many columns to the next.
inline int64_t row_stride(mk_input x, mk_size size, int columns) {
    return size.S > 1 ? x.stride_s : size.B > 1 ? x.stride_b : (int64_t{columns} + 7) / 8 * 8;
}

inline int64_t padded_depth(int depth) { return (int64_t{depth} + MK_K_MULTIPLE - 1) / MK_K_MULTIPLE * MK_K_MULTIPLE; }

// Sizes of a product [B * S, columns] over the depth of left, and left's map.
template <class EPILOGUE>
int describe(Product<EPILOGUE>* p, mk_input left, mk_size size, mk_type type, int depth, int columns) {
    constexpr int64_t most = 0x7fffffff - 4 * kTileRows;
    if (!are_rows(left, size, type) || size.B > most / size.S || columns > most) return cudaErrorInvalidValue;
    p->M = static_cast<int>(size.B * size.S);
    p->N = columns;
    p->steps = static_cast<int>(padded_depth(depth) / kStep);
    p->S = size.S;
    return make_matrix_map(&p->left, left.data, type, p->M, depth, row_stride(left, size, depth), kTileRows);
}

// The map of a matrix [M, N] with rows `stride` elements apart, in chunks.
template <class EPILOGUE>
int make_chunk_map(TensorMap* map, const void* data, mk_type type, const Product<EPILOGUE>& p, int64_t stride) {
    return make_matrix_map(map, data, type, p.M, p.N, stride, kChunk);
}

struct Weight {  // [rows, columns] in the dtype of the products, zero-padded along K
    const void* data;
    int64_t rows, columns;
};

// Fills in what depends on the tile, and runs the product.
template <class T, class TILE, class EPILOGUE>
int launch_tile(const Product<EPILOGUE>& described, mk_type type, const Weight& right, int cluster, mk_device device,
                mk_stream stream) {
    Product<EPILOGUE> p = described;
    const int height = kTileRows * cluster;
    p.row_tiles = (p.M + height - 1) / height;
    p.column_tiles = (p.N + TILE::kColumns - 1) / TILE::kColumns;
    const int64_t count = int64_t{p.row_tiles} * p.column_tiles;
    const int multiprocessors = device.multiprocessors > 0 ? device.multiprocessors : MK_SM90_FEWEST_MULTIPROCESSORS;
    const int clusters = multiprocessors > cluster ? multiprocessors / cluster : 1;
    if (count > 0x7fffffff - 2 * clusters) return cudaErrorInvalidValue;
    p.cluster = cluster;
    const int error =
        make_matrix_map(&p.right, right.data, type, right.rows, right.columns, right.columns, TILE::kColumns / cluster);
    if (error != cudaSuccess) return error;
    const int blocks = static_cast<int>(count < clusters ? count : clusters) * cluster;
    return launch_cluster(product_kernel<T, EPILOGUE, TILE>, dim3(blocks), dim3(kThreads), cluster,
                          Layout<EPILOGUE, TILE>::kBytes, stream, p);
}

template <class T, class EPILOGUE>
int launch_product(const Product<EPILOGUE>& p, mk_type type, const Weight& right, mk_sm90_schedule schedule,
                   mk_device device, mk_stream stream) {
    if (schedule.cluster != 1 && schedule.cluster != 2) return cudaErrorInvalidValue;
    switch (schedule.tile) {
        case MK_SM90_WIDE:
            return launch_tile<T, WideTile>(p, type, right, schedule.cluster, device, stream);
        case MK_SM90_PING_PONG:
            return launch_tile<T, PingPongTile>(p, type, right, schedule.cluster, device, stream);
        case MK_SM90_WIDE_PING_PONG:
            return launch_tile<T, WidePingPongTile>(p, type, right, schedule.cluster, device, stream);
        case MK_SM90_NARROW:
            return launch_tile<T, NarrowTile>(p, type, right, schedule.cluster, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace sm90
}  // namespace mixer_kernels
