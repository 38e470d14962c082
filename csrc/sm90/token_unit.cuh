// What the token-mixing kernels of sm_90a share: who does what, and a tile of x in shared memory.
//
// A unit of work is 64 channels of one image with all of its tokens. The warpgroups of a block are consumers, which
// take a unit each and share the weights, and one that starts the copies for them. Weights stream through rings of
// slots in steps of hidden units.
//
// Channels lie on the rows of every product, so that nothing is transposed: x [S, C] and the weights, as W1' [S, D_S]
// and W2 [S, D_S], are read as they lie in memory, in tiles of [tokens, 64] with the 128-byte swizzle of TMA and wgmma.
#pragma once

#include "../device/matrix.cuh"
#include "../device/noise.cuh"
#include "../device/warpgroup.cuh"
#include "launchers.h"

namespace mixer_kernels {

constexpr int kUnitChannels = 64;  // the rows of wgmma
constexpr int kStepHidden = MK_SM90_HIDDEN_MULTIPLE;
constexpr int kRowBytes = 128;    // a token of a tile: 64 channels or 64 hidden units
constexpr int kAtomBytes = 1024;  // of the swizzle, which tiles are aligned to
constexpr int kConsumerThreads = 128, kConsumerWarps = kConsumerThreads / 32;

// ------------------------------------------------------------------------------------------------------------- work

// 64 channels of an image with all of its tokens.
struct TokenUnit {
    int image, c0;
    bool exists;  // the last units of the last turn do not

    // Stochastic depth's factor of the image's branch: 0 where there are no products to form.
    __device__ __forceinline__ float branch_factor(const Noise& noise) const {
        return exists ? noise.kept_image(image) : 0.0f;
    }
};

// A persistent grid over the units, numbered image by image. In each turn a block takes `share` of them, one for each
// of its first consumers: fewer than it has consumers where they would leave multiprocessors idle. The blocks of a
// cluster take their turns together.
struct TokenSchedule {
    int groups, units, share, cluster, blocks;

    TokenSchedule(const mk_size& size, int consumers, int blocks_in_cluster, const mk_device& device)
        : groups((size.C + kUnitChannels - 1) / kUnitChannels),
          units(static_cast<int>(size.B) * groups),
          share(1),
          cluster(blocks_in_cluster) {
        const int multiprocessors = device.multiprocessors > 0 ? device.multiprocessors : 132;  // of H100 and H200
        while (share < consumers && units > share * multiprocessors) ++share;
        const int at_once = share * cluster;
        blocks = cluster * min((units + at_once - 1) / at_once, max(multiprocessors / cluster, 1));
    }
    __device__ __forceinline__ TokenUnit unit(int number) const {
        return {number / groups, number % groups * kUnitChannels, number < units};
    }
};

// The n-th turn of this block.
class TokenTurn {
  public:
    __device__ __forceinline__ TokenTurn(const TokenSchedule& schedule, uint32_t n)
        : schedule_(schedule), first_(static_cast<int>(n * schedule.blocks + blockIdx.x) * schedule.share) {}
    // For all blocks of a cluster or for none.
    __device__ __forceinline__ bool exists() const { return first_of_cluster() < schedule_.units; }
    __device__ __forceinline__ TokenUnit unit(int consumer) const {
        TokenUnit unit = schedule_.unit(first_ + consumer);
        unit.exists &= consumer < schedule_.share;
        return unit;
    }
    // Whether weights come: unless stochastic depth drops all of the cluster's units.
    __device__ __forceinline__ bool works(const Noise& noise) const {
        if (!noise.drop_path()) return true;
        const int first = first_of_cluster();
#pragma unroll 1
        for (int i = 0; i < schedule_.cluster * schedule_.share; ++i) {
            if (schedule_.unit(first + i).branch_factor(noise) > 0.0f) return true;
        }
        return false;
    }

  private:
    __device__ __forceinline__ int first_of_cluster() const { return first_ - cluster_rank() * schedule_.share; }

    const TokenSchedule& schedule_;
    const int first_;
};

// Slots for items that come one after the other: the n-th lies in slot n % SLOTS until all warps that read it have
// released it. Barriers: 16 bytes a slot.
template <int SLOTS>
struct Ring {
    static constexpr int kBarrierBytes = 16 * SLOTS;
    shared_address barriers;

    __device__ __forceinline__ void init(int readers) const {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), readers);
        }
    }
    __device__ __forceinline__ static int slot(uint32_t n) { return static_cast<int>(n % SLOTS); }
    __device__ __forceinline__ shared_address full(uint32_t n) const { return barriers + 16 * slot(n); }
    __device__ __forceinline__ shared_address empty(uint32_t n) const { return full(n) + 8; }
    __device__ __forceinline__ void wait_full(uint32_t n) const { barrier_wait(full(n), n / SLOTS % 2); }
    __device__ __forceinline__ void wait_empty(uint32_t n) const { barrier_wait(empty(n), (n / SLOTS + 1) % 2); }
};

// ------------------------------------------------------------------------------------------------------------ tiles

// The places of a consumer's thread: its warp has 16 of the unit's channels, as the rows of fragments (matrix.cuh).
// Asked for where they are used, they take no registers from accumulators meanwhile.
struct TokenLane {
    __device__ __forceinline__ static int thread() {  // of the consumer
#ifdef MIXER_KERNELS_ON_HOST
        return static_cast<int>(threadIdx.x) % kConsumerThreads;
#else
        int thread;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));  // volatile: else read once and kept
        return thread % kConsumerThreads;
#endif
    }
    __device__ __forceinline__ static int pair() { return thread() % 4 * 2; }
    // Of the unit; the lane's rows are this channel and the 8th after it.
    __device__ __forceinline__ static int channel() {
        const int t = thread();
        return t / 32 * 16 + t % 32 / 4;
    }
    // Where the lane points for a fragment of the tile's first 16 tokens, of the 16 k-th: 16 k * kRowBytes further.
    // Transposed, load_matrices_x4 gives matrix A, channels by tokens, and load_matrices_x2 its first 8 tokens.
    __device__ __forceinline__ static shared_address matrix_row(shared_address tile) {
        const int t = thread(), token = t % 32 / 16 * 8 + t % 8, chunk = t / 32 * 2 + t / 8 % 2;
        return tile + token * kRowBytes + (chunk ^ token % 8) * 16;
    }
};

// Operand of the 16 tokens from 16 k on, summed over them: of the channels or hidden units that fill a row of the tile,
// whose bytes are the swizzle's. Major::mn.
template <Swizzle S = Swizzle::bytes_128>
__device__ __forceinline__ uint64_t operand_over_tokens(shared_address tile, int k) {
    constexpr int row = static_cast<int>(S), atom = 8 * row;
    return operand_at(operand<S>(tile, atom, atom), k * 16 * row);
}

// Operand of the 16 hidden units from 16 k on, summed over them: of the tokens. Major::k.
template <Swizzle S = Swizzle::bytes_128>
__device__ __forceinline__ uint64_t operand_over_hidden(shared_address tile, int k) {
    return operand_at(operand<S>(tile, 16, 8 * static_cast<int>(S)), k * 32);
}

// Accumulators of a warpgroup's row of channels and two neighbouring columns j, j + 1 of 8: matrix A of the 16.
template <class T>
__device__ __forceinline__ void as_matrix_a(uint32_t (&a)[4], const float* accumulators) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<T>(accumulators[2 * i], accumulators[2 * i + 1]);
}

// Initial accumulators of a bias that lies on the columns.
template <int N>
__device__ __forceinline__ void set_bias(float (&d)[N], const float* bias, int pair) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + pair);
        d[4 * j] = d[4 * j + 2] = b.x;
        d[4 * j + 1] = d[4 * j + 3] = b.y;
    }
}

// -------------------------------------------------------------------------------------------------- normalised tiles

// What a thread brings of LayerNorm for a unit: (mean, rstd) of the tokens that it is to write to shared memory, and
// the affine of its two channels. Outside of the tensor 0, so that n is finite there.
template <int TOKENS>
struct UnitNorm {
    static constexpr int kTokens = (TOKENS + kConsumerThreads - 1) / kConsumerThreads;
    float2 statistics[kTokens];
    float gamma[2], beta[2];

    __device__ __forceinline__ void load(const mk_norm& norm, const mk_size& size, const TokenUnit& unit) {
        const int thread = TokenLane::thread(), channel = TokenLane::channel();
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int s = thread + i * kConsumerThreads;
            const int64_t row = static_cast<int64_t>(unit.image) * size.S + s;
            statistics[i] = {0.0f, 0.0f};
            if (unit.exists && s < size.S) statistics[i] = {norm.mean[row], norm.rstd[row]};
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int c = unit.c0 + channel + 8 * i;
            const bool inside = unit.exists && c < size.C;
            gamma[i] = inside ? norm.gamma ? norm.gamma[c] : 1.0f : 0.0f;
            beta[i] = inside && norm.beta ? norm.beta[c] : 0.0f;
        }
    }
    // shared [TOKENS]
    __device__ __forceinline__ void store_statistics(float2* shared) const {
        const int thread = TokenLane::thread();
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int s = thread + i * kConsumerThreads;
            if (TOKENS % kConsumerThreads == 0 || s < TOKENS) shared[s] = statistics[i];
        }
    }
    // Matrix A of x becomes that of n, equation (2); shared points at its 16 tokens from the lane's
    // pair on.
    template <class T>
    __device__ __forceinline__ void apply(uint32_t (&a)[4], const float2* shared) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 two = *reinterpret_cast<const float4*>(shared + i / 2 * 8);
            const float2 x = unpack<T>(a[i]);
            a[i] = pack<T>((x.x - two.x) * two.y * gamma[i % 2] + beta[i % 2],
                           (x.y - two.z) * two.w * gamma[i % 2] + beta[i % 2]);
        }
    }
};

// x of the consumer's unit, [TOKENS, 64 channels] in shared memory, becomes n. All of the consumer's threads, after its
// statistics are there; wgmma may read the tile after their fence_async_shared and a barrier.
template <class T, int TOKENS>
__device__ __forceinline__ void normalise_tile(shared_address tile, const UnitNorm<TOKENS>& norm,
                                               const float2* statistics) {
    constexpr int kBatch = 4;  // fragments under way at once
    static_assert(TOKENS % 16 == 0);
    const shared_address row = TokenLane::matrix_row(tile);
    statistics += TokenLane::pair();
#pragma unroll
    for (int k0 = 0; k0 < TOKENS / 16; k0 += kBatch) {
        uint32_t a[kBatch][4];
#pragma unroll
        for (int k = k0; k < k0 + kBatch && k < TOKENS / 16; ++k) {
            load_matrices_x4_transposed(a[k - k0], row + k * 16 * kRowBytes);
        }
        __syncwarp();
#pragma unroll
        for (int k = k0; k < k0 + kBatch && k < TOKENS / 16; ++k) {
            norm.template apply<T>(a[k - k0], statistics + 16 * k);
            store_matrices_x4_transposed(row + k * 16 * kRowBytes, a[k - k0]);
        }
    }
}

// ------------------------------------------------------------------------------------------------------- tensor maps

// Boxes of `tokens` tokens and 64 channels of one image of x [B, S, C].
inline int map_tokens(TensorMap* map, const mk_input& x, const mk_size& size, int tokens) {
    const int64_t sizes[] = {size.C, size.S, size.B};
    // The stride of an axis of length 1 is not used, but TMA wants a legal one.
    const int64_t stride_s = size.S > 1 ? x.stride_s : size.C, stride_b = size.B > 1 ? x.stride_b : size.C;
    const int64_t strides[] = {stride_s, stride_b};
    const int box[] = {kUnitChannels, tokens, 1};
    return make_tensor_map(map, x.data, x.type, 3, sizes, strides, box, Swizzle::bytes_128);
}

inline int map_tokens(TensorMap* map, const void* u, mk_type type, const mk_size& size, int tokens) {
    return map_tokens(map, mk_input{u, type, int64_t{size.S} * size.C, size.C, 1}, size, tokens);
}

// Boxes of `rows` rows and 64 hidden units of a weight [S_pad, D].
inline int map_weight(TensorMap* map, const void* weight, mk_type type, int S_pad, int D, int rows) {
    const int64_t sizes[] = {D, S_pad}, strides[] = {D};
    const int box[] = {kStepHidden, rows};
    return make_tensor_map(map, weight, type, 2, sizes, strides, box, Swizzle::bytes_128);
}

// Of b1, which forward reads by TMA.
inline bool takes_bias(const float* bias) { return bias != nullptr && reinterpret_cast<uintptr_t>(bias) % 16 == 0; }

// Boxes of 64 hidden units of a bias [D].
inline int map_bias(TensorMap* map, const float* bias, int D) {
    const int64_t sizes[] = {D, 1}, strides[] = {D};
    const int box[] = {kStepHidden, 1};
    return make_tensor_map(map, bias, MK_FLOAT32, 2, sizes, strides, box, Swizzle::none);
}

}  // namespace mixer_kernels
