// Token mixing in one kernel for sm_90a, for up to 256 tokens: equations (2) to (5) of docs/maths.md.
//
// A consumer takes 64 channels of one image through the whole half, as FlashAttention-3 takes its queries, with GELU in
// place of softmax; n (matrix A) and o (accumulators) stay in registers:
//
//     n = LN(x[:, channels])'                            [64, S]
//     for each 64 hidden units d:
//         a = GELU(n . W1[d, :]' + b1[d])                [64, 64]
//         o += a . W2[:, d]'                             [64, S]
//     u[:, channels] = x[:, channels] + o' + b2
//
// The second product of a step runs while GELU of the next step is computed. The residual is added in place in the tile
// of x, which leaves by TMA. Where n does not fit the registers beside o it goes back to the tile of x, the first
// product reads it there, and x comes a second time through the ring of weights.
#pragma once

#include "../device/gelu.cuh"
#include "token_mixing_block.cuh"

namespace mixer_kernels {
namespace {

// (mean, sum of squared deviations) over the unit's channels of each token of a finished tile, in two passes. The sum
// of 16-bit numbers of like size is exact in float32, so that the mean of a row without variance is, too.
template <class T>
__device__ __forceinline__ void write_statistics(float* partial, shared_address tile, const mk_size& size,
                                                 const TokenUnit& unit) {
    const int octets = min(size.C - unit.c0, kUnitChannels) / 8;
    const float channels = static_cast<float>(octets * 8);
    const int64_t rows = size.B * size.S;
    float2* out = reinterpret_cast<float2*>(partial) + unit.c0 / kUnitChannels * rows + int64_t{unit.image} * size.S;
    const auto accumulate = [&](uint4 packed, auto term, float (&sums)[4]) {
        float v[8];
        unpack8<T>(packed, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i % 4] += term(v[i]);
    };
    const auto total = [](const float (&sums)[4]) { return sums[0] + sums[1] + (sums[2] + sums[3]); };
    const auto value = [](float v) { return v; };
#pragma unroll 1
    for (int s = TokenLane::thread(); s < size.S; s += kConsumerThreads) {
        const uint4* row = pointer_to<const uint4>(tile + s * kRowBytes);
        float sums[4] = {}, squares[4] = {}, mean;
        const auto square = [&](float v) { return (v - mean) * (v - mean); };
        if (octets == 8) {
            uint4 packed[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) packed[i] = row[i ^ s % 8];
#pragma unroll
            for (int i = 0; i < 8; ++i) accumulate(packed[i], value, sums);
            mean = total(sums) / channels;
#pragma unroll
            for (int i = 0; i < 8; ++i) accumulate(packed[i], square, squares);
        } else {
#pragma unroll 1
            for (int i = 0; i < octets; ++i) accumulate(row[i ^ s % 8], value, sums);
            mean = total(sums) / channels;
#pragma unroll 1
            for (int i = 0; i < octets; ++i) accumulate(row[i ^ s % 8], square, squares);
        }
        out[s] = {mean, total(squares)};
    }
}

// u = x + factor * o in place of x; row: the lane's, of the first 16 tokens.
template <class F>
__device__ __forceinline__ void add_in_place(shared_address row, const float (&o)[F::N / 2], float factor) {
    using T = typename F::T;
    constexpr int kBlocks = F::N / 8, kBatch = 8;  // 8 tokens; as many blocks are under way at once
#pragma unroll
    for (int first = 0; first < kBlocks; first += kBatch) {
        uint32_t x[kBatch / 2][4];
#pragma unroll
        for (int j = first; j < first + kBatch && j < kBlocks; j += 2) {
            uint32_t (&r)[4] = x[(j - first) / 2];
            if (j + 1 < kBlocks) {
                load_matrices_x4_transposed(r, row + j * 8 * kRowBytes);
            } else {
                uint32_t two[2];
                load_matrices_x2_transposed(two, row + j * 8 * kRowBytes);
                r[0] = two[0], r[1] = two[1];
            }
        }
        __syncwarp();
#pragma unroll
        for (int j = first; j < first + kBatch && j < kBlocks; j += 2) {
            uint32_t (&r)[4] = x[(j - first) / 2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (j + i / 2 >= kBlocks) break;
                const float2 v = unpack<T>(r[i]);
                r[i] = pack<T>(v.x + factor * o[4 * j + 2 * i], v.y + factor * o[4 * j + 2 * i + 1]);
            }
            if (j + 1 < kBlocks) {
                store_matrices_x4_transposed(row + j * 8 * kRowBytes, r);
            } else {
                store_matrices_x2_transposed(row + j * 8 * kRowBytes, {r[0], r[1]});
            }
        }
    }
}

template <class F>
__device__ __forceinline__ void consume(const F& shared, const TokenForwardMaps& maps, const TokenSchedule& schedule,
                                        const mk_sm90_token_mixing_arguments& p, const Noise& noise, int consumer) {
    using T = typename F::T;
    constexpr int K = F::K, N = F::N, kZ = kStepHidden / 2;
    const auto items = shared.items();
    const auto tiles = shared.tiles(consumer);
    const int steps = p.D / kStepHidden, barrier = 1 + consumer;
    const bool serial = p.pipelined == 2;  // to measure what the overlap is worth
    uint32_t item = 0;

    const auto release = [&](shared_address empty) {
        if (TokenLane::thread() % 32 == 0) barrier_arrive(empty);
    };
    const auto wait_for = [&](uint32_t n) {
        items.wait_full(n);
        return shared.slot(n);
    };
    const auto release_item = [&](uint32_t n) {
        if constexpr (F::kCluster == 1) {
            release(items.empty(n));
        } else {
            const int lane = TokenLane::thread() % 32;
            if (lane < F::kCluster) barrier_arrive_in(items.empty(n), lane);
        }
    };
    const auto skip = [&](int count) {  // items that others read
        for (int i = 0; i < count; ++i, ++item) {
            items.wait_full(item);
            __syncwarp();  // a lane that still polled would miss the phase
            release_item(item);
        }
    };
    // What is on its way to global memory is released a while later, not to wait for it: the tile of x, or with n in
    // it the slot of the residual.
    bool held = false;
    uint32_t held_number = 0;
    const auto release_held = [&] {
        if (!held) return;
        if (TokenLane::thread() == 0) store_wait_read<0>();
        if constexpr (F::kCluster > 1) __syncwarp();
        if constexpr (F::kSharedA) {
            release_item(held_number);
        } else {
            release(tiles.empty(held_number));
        }
        held = false;
    };
    const auto store = [&](shared_address tile, const TokenUnit& unit) {
        if (TokenLane::thread() == 0) {
            store_tile(maps.u, tile, unit.c0, 0, unit.image);
            store_commit();
        }
        if (p.partial) write_statistics<T>(p.partial, tile, p.size, unit);
    };

    UnitNorm<K> norm;
    norm.load(p.norm, p.size, TokenTurn(schedule, 0).unit(consumer));

    for (uint32_t n = 0; TokenTurn(schedule, n).exists(); ++n) {
        const TokenTurn turn(schedule, n);
        const TokenUnit unit = turn.unit(consumer);
        const float factor = unit.branch_factor(noise);
        const shared_address tile = shared.tile(consumer, n);
        norm.store_statistics(shared.statistics(consumer));
        named_barrier_sync(barrier, kConsumerThreads);

        if (factor == 0.0f) {  // no branch: u is x
            release_held();
            if (unit.exists) {
                tiles.wait_full(n);
                store(tile, unit);
                if (TokenLane::thread() == 0) store_wait_read<0>();
                __syncwarp();
                release(tiles.empty(n));
            }
            if (turn.works(noise)) skip(2 * steps + (F::kSharedA ? F::kConsumers : 0));
            norm.load(p.norm, p.size, TokenTurn(schedule, n + 1).unit(consumer));
            continue;
        }

        float o[N / 2];
        set_bias(o, shared.b2(), TokenLane::pair());
        tiles.wait_full(n);
        uint32_t a[F::kSharedA ? 1 : K / 16][4];
        if constexpr (F::kSharedA) {
            normalise_tile<T, K>(tile, norm, shared.statistics(consumer));
            fence_async_shared();
            named_barrier_sync(barrier, kConsumerThreads);
        } else {
            const shared_address row = TokenLane::matrix_row(tile);
            const float2* statistics = shared.statistics(consumer) + TokenLane::pair();
#pragma unroll
            for (int k = 0; k < K / 16; ++k) load_matrices_x4_transposed(a[k], row + k * 16 * kRowBytes);
#pragma unroll
            for (int k = 0; k < K / 16; ++k) norm.template apply<T>(a[k], statistics + 16 * k);
        }

        float z[kZ];
        uint32_t h[kStepHidden / 16][4];
        const auto first_product = [&](uint32_t n1) {
            const shared_address w1 = wait_for(n1);
            set_bias(z, pointer_to<float>(shared.b1(n1)), TokenLane::pair());
            keep(z);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < K / 16; ++k) {
                if constexpr (F::kSharedA) {
                    wgmma<T, kStepHidden, Major::mn, Major::mn>(z, operand_over_tokens(tile, k),
                                                                operand_over_tokens(w1, k));
                } else {
                    wgmma<T, kStepHidden, Major::mn>(z, a[k], operand_over_tokens(w1, k));
                }
            }
            wgmma_commit();
        };
        const auto second_product = [&](uint32_t n2) {
            const shared_address w2 = wait_for(n2);
            keep(o);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kStepHidden / 16; ++k) wgmma<T, N, Major::k>(o, h[k], operand_over_hidden(w2, k));
            wgmma_commit();
        };
        // GELU in halves, of which ptxas makes blocks of their own: all at once they take too many registers.
        const auto activate = [&](int step) {
#pragma unroll
            for (int first = 0; first < kZ; first += kZ / 2) {
                if (p.tanh) {
#pragma unroll
                    for (int i = first; i < first + kZ / 2; ++i) z[i] = gelu(z[i], true);
                } else {
#pragma unroll
                    for (int i = first; i < first + kZ / 2; ++i) z[i] = gelu(z[i], false);
                }
                keep(z);
            }
            if (noise.dropout()) {
                const int d = step * kStepHidden + TokenLane::pair(), c = unit.c0 + TokenLane::channel();
                const KeptFactors<kZ> kept(
                    [&](int i) { return noise.kept_hidden(d + i / 4 * 8 + i % 2, c + i % 4 / 2 * 8, unit.image); });
#pragma unroll
                for (int i = 0; i < kZ; ++i) z[i] *= kept[i];
            }
        };
        const auto pack_hidden = [&] {
#pragma unroll
            for (int k = 0; k < kStepHidden / 16; ++k) as_matrix_a<T>(h[k], z + 8 * k);
        };

        first_product(item);
        release_held();
        wgmma_wait<0>();
        keep(z);
        release_item(item++);
        activate(0);
        pack_hidden();
#pragma unroll 1
        for (int step = 0; step + 1 < steps; ++step, item += 2) {
            first_product(item);
            second_product(item + 1);
            if (serial) wgmma_wait<0>();  // nothing left to overlap
            wgmma_wait<1>();
            keep(z);
            release_item(item);
            activate(step + 1);
            keep(z);
            // The next weights, here already: the end of the loop that waits ends a basic block, or ptxas would move
            // GELU below the next wait. h is still read: z is packed after it.
            wait_for(item + 2);
            wgmma_wait<0>();
            keep(o);
            release_item(item + 1);
            pack_hidden();
        }
        if (F::kSharedA) release(tiles.empty(n));
        second_product(item);
        wgmma_wait<0>();
        keep(o);
        release_item(item++);

        norm.load(p.norm, p.size, TokenTurn(schedule, n + 1).unit(consumer));  // arrives while this unit is finished
        if (noise.dropout()) {
#pragma unroll
            for (int first = 0; first < N / 2; first += 32) {
                const int s = first * 2 + TokenLane::pair(), c = unit.c0 + TokenLane::channel();
                const KeptFactors<32> kept(
                    [&](int i) { return noise.kept_branch(c + i % 4 / 2 * 8, s + i / 4 * 8 + i % 2, unit.image); });
#pragma unroll
                for (int i = 0; i < 32 && first + i < N / 2; ++i) o[first + i] *= kept[i];
            }
        }

        shared_address out = tile;
        held = true;
        held_number = n;
        if constexpr (F::kSharedA) {
            skip(consumer);
            out = wait_for(item);
            held_number = item++;
        }
        add_in_place<F>(TokenLane::matrix_row(out), o, factor);
        fence_async_shared();
        named_barrier_sync(barrier, kConsumerThreads);
        store(out, unit);
        if (F::kSharedA) skip(F::kConsumers - 1 - consumer);
    }
    if (TokenLane::thread() == 0) store_wait_read<0>();
}

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1)
    token_mixing_sm90_kernel(const __grid_constant__ TokenForwardMaps maps, const mk_sm90_token_mixing_arguments p,
                             const TokenSchedule schedule, const Noise noise) {
#ifdef MK_HAS_SM90A
    const F shared;
    const int group = uniform(threadIdx.x / kConsumerThreads);
    if (threadIdx.x == 0) {
        shared.items().init(F::kCluster * F::kConsumers * kConsumerWarps);
        for (int i = 0; i < F::kConsumers; ++i) shared.tiles(i).init(kConsumerWarps);
        barrier_init_fence();
    }
    for (int s = threadIdx.x; s < F::N; s += F::kThreads) shared.b2()[s] = p.b2[s];
    if constexpr (F::kCluster == 1) {
        __syncthreads();
    } else {
        cluster_sync();  // others arrive at this block's barriers
    }
    if (group == F::kConsumers) {
        decrease_registers<F::kProducerRegisters>();
        if (threadIdx.x % kConsumerThreads == 0) produce(shared, maps, schedule, noise, p.D / kStepHidden);
    } else {
        increase_registers<F::kConsumerRegisters>();
        consume(shared, maps, schedule, p, noise, group);
    }
    if constexpr (F::kCluster > 1) {
        __syncwarp();
        cluster_sync();
    }
#endif
}

template <class F>
int launch_forward(const mk_sm90_token_mixing_arguments& p, mk_stream stream) {
    TokenForwardMaps maps;
    int error = map_tokens(&maps.x, p.x, p.size, F::K);
    if (error == cudaSuccess) error = map_tokens(&maps.u, p.u, p.type, p.size, F::N);
    if (error == cudaSuccess) error = map_weight(&maps.w1t, p.w1t, p.type, p.S_pad, p.D, F::kW1Rows);
    if (error == cudaSuccess) error = map_weight(&maps.w2, p.w2, p.type, p.S_pad, p.D, F::kW2Rows);
    if (error == cudaSuccess) error = map_bias(&maps.b1, p.b1, p.D);
    if (error != cudaSuccess) return error;
    const TokenSchedule schedule(p.size, F::kConsumers, F::kCluster, p.device);
    return launch_cluster(token_mixing_sm90_kernel<F>, schedule.blocks, F::kThreads, F::kCluster, F::kSharedBytes,
                          stream, maps, p, schedule, Noise(p.noise));
}

template <class T, int K, int N, int CONSUMERS, int SLOTS, bool SHARED_A = false>
int choose_cluster(const mk_sm90_token_mixing_arguments& p, int default_cluster, mk_stream stream) {
    const int cluster = p.cluster != 0 ? p.cluster : default_cluster;
    return cluster == 2 ? launch_forward<TokenForward<T, K, N, CONSUMERS, SLOTS, SHARED_A, 2>>(p, stream)
                        : launch_forward<TokenForward<T, K, N, CONSUMERS, SLOTS, SHARED_A, 1>>(p, stream);
}

template <class T>
int dispatch(const mk_sm90_token_mixing_arguments& p, mk_stream stream) {
    switch (p.S_pad) {
        case 64:
            return p.consumers == 2 ? choose_cluster<T, 64, 64, 2, 8>(p, 1, stream)
                                    : choose_cluster<T, 64, 64, 3, 8>(p, 1, stream);
        case 208:
            return p.size.S <= 200 ? choose_cluster<T, 208, 200, 2, 4>(p, 2, stream)
                                   : choose_cluster<T, 208, 208, 2, 4>(p, 2, stream);
        case 256:
            return choose_cluster<T, 256, 256, 2, 4, true>(p, 2, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

// dispatch<float16>, which is compiled apart: each takes nvcc half a minute.
int token_mixing_float16(const mk_sm90_token_mixing_arguments& p, mk_stream stream);

}  // namespace mixer_kernels
