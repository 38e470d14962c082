// The blocks of token_mixing_kernel.cuh: their shared memory and the producer.
#pragma once

#include "token_unit.cuh"

namespace mixer_kernels {

// K: tokens of the first product, which sums over them, a multiple of 16. N: tokens of the second, a multiple of 8.
// CLUSTER: blocks that each load a share of a step's weights for all of them, to halve what comes from L2.
template <class T_, int K_, int N_, int CONSUMERS, int SLOTS, bool SHARED_A = false, int CLUSTER = 1>
struct TokenForward {
    using T = T_;
    static constexpr int K = K_, N = N_, kConsumers = CONSUMERS, kCluster = CLUSTER;
    static constexpr bool kSharedA = SHARED_A;
    static constexpr int kThreads = (CONSUMERS + 1) * kConsumerThreads;
    // Of the registers that the block has at launch, 168 (with three consumers 128) for each of its threads.
    [[maybe_unused]] static constexpr int kProducerRegisters = 40, kConsumerRegisters = CONSUMERS == 3 ? 152 : 232;

    using Items = Ring<SLOTS>;             // W1(0), W1(1), W2(0), W1(2), ...; W2(last), or x of each consumer then
    using Tiles = Ring<kSharedA ? 1 : 2>;  // x, for each consumer
    static constexpr int kTiles = kSharedA ? 1 : 2;
    static constexpr int kTileBytes = K * kRowBytes;
    static constexpr int kW1Rows = K / CLUSTER, kW2Rows = CLUSTER > 1 ? kW1Rows : N;  // that a block loads
    static constexpr int kW1Bytes = CLUSTER * kW1Rows * kRowBytes, kW2Bytes = CLUSTER * kW2Rows * kRowBytes;
    static constexpr int kB1Bytes = kStepHidden * 4;
    static_assert(K % 16 == 0 && N % 8 == 0 && N <= K && K <= 256 && kTileBytes % kAtomBytes == 0);
    static_assert(K % CLUSTER == 0 && (CLUSTER == 1 || kW1Rows * kRowBytes % kAtomBytes == 0));

    // Shared memory, from a multiple of 1024 bytes on.
    static constexpr int kSlotAt = kConsumers * kTiles * kTileBytes;
    static constexpr int kB1At = kSlotAt + SLOTS * kTileBytes;
    static constexpr int kB2At = kB1At + SLOTS * kB1Bytes;
    static constexpr int kStatisticsAt = kB2At + K * 4;
    static constexpr int kBarriersAt = kStatisticsAt + kConsumers * K * 8;
    static constexpr int kBytes = kBarriersAt + Items::kBarrierBytes + kConsumers * Tiles::kBarrierBytes;
    static constexpr size_t kSharedBytes = kBytes + kAtomBytes;
    static_assert(kSharedBytes <= 227 << 10);

    shared_address base;

    __device__ __forceinline__ TokenForward() {
        base = (address_of(shared_memory<char>()) + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
    }
    __device__ __forceinline__ Items items() const { return {base + kBarriersAt}; }
    __device__ __forceinline__ Tiles tiles(int consumer) const {
        return {base + kBarriersAt + Items::kBarrierBytes + consumer * Tiles::kBarrierBytes};
    }
    __device__ __forceinline__ shared_address tile(int consumer, uint32_t n) const {
        return base + (consumer * kTiles + Tiles::slot(n)) * kTileBytes;
    }
    __device__ __forceinline__ shared_address slot(uint32_t n) const {
        return base + kSlotAt + Items::slot(n) * kTileBytes;
    }
    __device__ __forceinline__ shared_address b1(uint32_t n) const { return base + kB1At + Items::slot(n) * kB1Bytes; }
    __device__ __forceinline__ float* b2() const { return pointer_to<float>(base + kB2At); }
    __device__ __forceinline__ float2* statistics(int consumer) const {
        return pointer_to<float2>(base + kStatisticsAt) + consumer * K;
    }
};

struct TokenForwardMaps {
    TensorMap x, u, w1t, w2, b1;
};

template <class F>
__device__ __forceinline__ void produce(const F& shared, const TokenForwardMaps& maps, const TokenSchedule& schedule,
                                        const Noise& noise, int steps) {
    const auto items = shared.items();
    uint32_t item = 0;
    const auto next_slot = [&](int bytes) {
        items.wait_empty(item);
        barrier_expect(items.full(item), bytes);
    };
    const auto load_weight = [&](const TensorMap& map, int step, int rows) {
        if constexpr (F::kCluster == 1) {
            load_tile(shared.slot(item), map, items.full(item), step * kStepHidden, 0);
        } else {
            const int first = cluster_rank() * rows;
            load_tile_multicast(shared.slot(item) + first * kRowBytes, map, items.full(item), (1 << F::kCluster) - 1,
                                step * kStepHidden, first);
        }
    };
    const auto load_w1 = [&](int step) {
        next_slot(F::kW1Bytes + F::kB1Bytes);
        load_weight(maps.w1t, step, F::kW1Rows);
        load_tile(shared.b1(item), maps.b1, items.full(item), step * kStepHidden, 0);
        ++item;
    };
    const auto load_w2 = [&](int step) {
        next_slot(F::kW2Bytes);
        load_weight(maps.w2, step, F::kW2Rows);
        ++item;
    };
    const auto load_tiles = [&](uint32_t n) {
        const TokenTurn turn(schedule, n);
#pragma unroll 1
        for (int i = 0; i < F::kConsumers; ++i) {
            const TokenUnit unit = turn.unit(i);
            if (!unit.exists) return;
            const auto tiles = shared.tiles(i);
            tiles.wait_empty(n);
            barrier_expect(tiles.full(n), F::kTileBytes);
            load_tile(shared.tile(i, n), maps.x, tiles.full(n), unit.c0, 0, unit.image);
        }
    };
    const auto load_residuals = [&](const TokenTurn& turn) {
#pragma unroll 1
        for (int i = 0; i < F::kConsumers; ++i, ++item) {
            const TokenUnit unit = turn.unit(i);
            const bool wanted = unit.branch_factor(noise) > 0.0f;
            next_slot(wanted ? F::kTileBytes : 0);
            if (wanted) load_tile(shared.slot(item), maps.x, items.full(item), unit.c0, 0, unit.image);
        }
    };

    for (const TensorMap* map : {&maps.x, &maps.w1t, &maps.b1, &maps.w2, &maps.u}) prefetch(*map);
    load_tiles(0);
    for (uint32_t n = 0; TokenTurn(schedule, n).exists(); ++n) {
        const TokenTurn turn(schedule, n);
        const bool works = turn.works(noise);
        if (works) load_w1(0);
        for (int step = 0; works && step < steps; ++step) {
            if (step + 1 < steps) load_w1(step + 1);
            load_w2(step);
            if (!F::kSharedA && step == 0) load_tiles(n + 1);
        }
        if (F::kSharedA && works) load_residuals(turn);
        if (F::kSharedA || !works) load_tiles(n + 1);
    }
}

}  // namespace mixer_kernels
