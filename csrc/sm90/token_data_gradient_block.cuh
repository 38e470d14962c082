// The blocks of token_data_gradient.cu: their shared memory and the warps that copy.
#pragma once

#include "token_unit.cuh"

namespace mixer_kernels {
namespace token_gradient {

constexpr int kStagedHidden = 32;  // hidden units of a and dz that leave at a time
constexpr int kStagedBytes = kStagedHidden * kRowBytes;

// HIDDEN: units of a chunk.
template <class T_, int TOKENS, int HIDDEN, int CONSUMERS, int W1_SLOTS, int W2_SLOTS>
struct Block {
    using T = T_;
    static constexpr int kTokens = TOKENS, kHidden = HIDDEN, kConsumers = CONSUMERS;
    static constexpr int kThreads = (CONSUMERS + 1) * kConsumerThreads;
    // All that the block has at launch, 65536 / threads to a thread in units of 8, go to the consumers but for what the
    // copying warps keep.
    static constexpr int kCopyRegisters = 24, kConsumerRegisters = CONSUMERS == 3 ? 160 : 240;
    static_assert(CONSUMERS < kConsumerWarps);  // a copying warp each, and one for the weights
    static constexpr Swizzle kSwizzle = HIDDEN == 64 ? Swizzle::bytes_128 : Swizzle::bytes_64;
    static constexpr int kStagedParts = HIDDEN / kStagedHidden;

    using Single = Ring<1>;
    using W1 = Ring<W1_SLOTS>;
    using W2 = Ring<W2_SLOTS>;

    // Shared memory, from a multiple of 1024 bytes on.
    static constexpr int kInputBytes = TOKENS * kRowBytes, kWeightBytes = TOKENS * HIDDEN * 2;
    static constexpr int kStagedAt = kConsumers * 2 * kInputBytes;
    static constexpr int kW1At = kStagedAt + kConsumers * 2 * kStagedBytes;
    static constexpr int kW2At = kW1At + W1_SLOTS * kWeightBytes;
    static constexpr int kBarriersAt = kW2At + W2_SLOTS * kWeightBytes;
    static constexpr int kOwnBarrierBytes = 3 * 16;  // of a consumer
    static constexpr int kBytes = kBarriersAt + kConsumers * kOwnBarrierBytes + W1::kBarrierBytes + W2::kBarrierBytes;
    static constexpr size_t kSharedBytes = kBytes + kAtomBytes;
    static_assert(HIDDEN % kStagedHidden == 0 && MK_SM90_HIDDEN_MULTIPLE % HIDDEN == 0);
    static_assert(kInputBytes % kAtomBytes == 0 && kWeightBytes % kAtomBytes == 0 && kStagedBytes % kAtomBytes == 0);
    static_assert(kSharedBytes <= 227 << 10);

    shared_address base;

    __device__ __forceinline__ Block() {
        base = (address_of(shared_memory<char>()) + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
    }
    __device__ __forceinline__ shared_address x(int consumer) const { return base + consumer * 2 * kInputBytes; }
    __device__ __forceinline__ shared_address g(int consumer) const { return x(consumer) + kInputBytes; }
    __device__ __forceinline__ shared_address staged_a(int consumer) const {
        return base + kStagedAt + consumer * 2 * kStagedBytes;
    }
    __device__ __forceinline__ shared_address staged_dz(int consumer) const {
        return staged_a(consumer) + kStagedBytes;
    }
    __device__ __forceinline__ shared_address w1(uint32_t n) const { return base + kW1At + W1::slot(n) * kWeightBytes; }
    __device__ __forceinline__ shared_address w2(uint32_t n) const { return base + kW2At + W2::slot(n) * kWeightBytes; }

    __device__ __forceinline__ Single x_ring(int consumer) const { return {own_barriers(consumer)}; }
    __device__ __forceinline__ Single g_ring(int consumer) const { return {own_barriers(consumer) + 16}; }
    __device__ __forceinline__ shared_address staged_full(int consumer) const { return own_barriers(consumer) + 32; }
    __device__ __forceinline__ shared_address staged_empty(int consumer) const { return own_barriers(consumer) + 40; }
    __device__ __forceinline__ W1 w1_ring() const { return {own_barriers(kConsumers)}; }
    __device__ __forceinline__ W2 w2_ring() const { return {own_barriers(kConsumers) + W1::kBarrierBytes}; }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kConsumers; ++i) {
            x_ring(i).init(kConsumerWarps);
            g_ring(i).init(kConsumerWarps);
            barrier_init(staged_full(i), kConsumerWarps);
            barrier_init(staged_empty(i), 1);
        }
        w1_ring().init(kConsumerWarps * kConsumers);
        w2_ring().init(kConsumerWarps * kConsumers);
        barrier_init_fence();
    }

  private:
    __device__ __forceinline__ shared_address own_barriers(int consumer) const {
        return base + kBarriersAt + consumer * kOwnBarrierBytes;
    }
};

struct Maps {
    TensorMap x, g, w1t, w2, dn, a, dz;
};

// ---------------------------------------------------------------------------------------------------------- copying

template <class G>
__device__ __forceinline__ void bring_weights(const G& shared, const Maps& maps, const TokenSchedule& schedule,
                                              const Noise& noise, int chunks) {
    const auto w1 = shared.w1_ring();
    const auto w2 = shared.w2_ring();
    uint32_t n = 0;
    prefetch(maps.w1t);
    prefetch(maps.w2);
    for (uint32_t i = 0; TokenTurn(schedule, i).exists(); ++i) {
        const int wanted = TokenTurn(schedule, i).works(noise) ? chunks : 0;
        for (int chunk = 0; chunk < wanted; ++chunk, ++n) {
            w1.wait_empty(n);
            barrier_expect(w1.full(n), G::kWeightBytes);
            load_tile(shared.w1(n), maps.w1t, w1.full(n), chunk * G::kHidden, 0);
            w2.wait_empty(n);
            barrier_expect(w2.full(n), G::kWeightBytes);
            load_tile(shared.w2(n), maps.w2, w2.full(n), chunk * G::kHidden, 0);
        }
    }
}

template <class G>
__device__ __forceinline__ void serve_consumer(const G& shared, const Maps& maps, const TokenSchedule& schedule,
                                               const Noise& noise, int chunks, int consumer, bool want_a,
                                               bool want_dz) {
    const auto x = shared.x_ring(consumer), g = shared.g_ring(consumer);
    const int parts = want_a || want_dz ? G::kStagedParts : 0;  // of a chunk
    uint32_t turn = 0;
    const auto next_unit = [&] {  // of those with products to form; one that does not exist is the last
        TokenUnit unit;
        do {
            unit = TokenTurn(schedule, turn++).unit(consumer);
        } while (unit.exists && unit.branch_factor(noise) == 0.0f);
        return unit;
    };
    const auto load_x = [&](const TokenUnit& unit, uint32_t n) {
        if (!unit.exists) return;
        x.wait_empty(n);
        barrier_expect(x.full(n), G::kInputBytes);
        load_tile(shared.x(consumer), maps.x, x.full(n), unit.c0, 0, unit.image);
    };
    const auto load_g = [&](const TokenUnit& unit, uint32_t n) {
        if (!unit.exists) return;
        barrier_expect(g.full(n), G::kInputBytes);
        load_tile(shared.g(consumer), maps.g, g.full(n), unit.c0, 0, unit.image);
    };
    int staged_parity = 0;
    const auto store_parts = [&](const TokenUnit& unit, int from, int to) {
        for (int part = from; part < to; ++part) {
            barrier_wait(shared.staged_full(consumer), staged_parity);
            const int d = part * kStagedHidden;
            if (want_a) store_tile(maps.a, shared.staged_a(consumer), unit.c0, d, unit.image);
            if (want_dz) store_tile(maps.dz, shared.staged_dz(consumer), unit.c0, d, unit.image);
            store_commit();
            store_wait_read<0>();
            barrier_arrive(shared.staged_empty(consumer));
            staged_parity ^= 1;
        }
    };

    prefetch(maps.x);
    prefetch(maps.g);
    TokenUnit unit = next_unit();
    load_x(unit, 0);
    load_g(unit, 0);
    for (uint32_t n = 0; unit.exists; ++n) {
        const TokenUnit next = next_unit();
        store_parts(unit, 0, parts * (chunks - 1));
        load_x(next, n + 1);  // the products with x end before the last chunk's GELU starts
        store_parts(unit, parts * (chunks - 1), parts * chunks);
        g.wait_empty(n + 1);  // dn is there
        store_tile(maps.dn, shared.g(consumer), unit.c0, 0, unit.image);
        store_commit();
        store_wait_read<0>();
        load_g(next, n + 1);
        unit = next;
    }
}

}  // namespace token_gradient
}  // namespace mixer_kernels
