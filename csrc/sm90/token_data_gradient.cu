// Token mixing backward for sm_90a and up to 256 tokens: the gradient of n, and what the weight gradients need.
//
// Equations (14) and (15) of docs/maths.md, in the units of work of the forward kernel (token_unit.cuh). For each chunk
// of hidden units a consumer forms
//
//     z  = n . W1' + b1       A: n in shared memory      B: a tile of W1', [tokens, hidden]
//     da = g . W2             A: g in shared memory      B: a tile of W2, [tokens, hidden]
//     a  = GELU(z),  dz = da * GELU'(z)                  both leave for the weight gradients
//     dn += dz . W1           A: dz from registers       B: the tile of W1' once more, its tokens as columns
//
// The first two products of a chunk are issued before the last one of the chunk before, which runs under GELU.
//
// The other warpgroup copies. Its warp 0 brings the weights, through two rings, since a tile of W1' stays one product
// longer than one of W2. Warp 1 + i serves consumer i: brings x and g, and takes a, dz and dn out of shared memory. n
// takes the place of x, and dn that of g, so that the next x can come while dn leaves.
#include "../device/gelu.cuh"
#include "token_data_gradient_block.cuh"

namespace mixer_kernels {
namespace token_gradient {  // with a name: of unnamed ones nvcc reports what it leaves out for other architectures

// -------------------------------------------------------------------------------------------------------- computing

// x becomes n = LN(x) in place, equation (2), but for padding, which stays 0. A thread has 8 channels of each 16th
// token.
template <class T, int TOKENS>
__device__ __forceinline__ void normalise(shared_address tile, const Ring<1>& ring, uint32_t n, const mk_norm& norm,
                                          const mk_size& size, const TokenUnit& unit, int thread) {
    constexpr int kOctets = kUnitChannels / 8, kStep = kConsumerThreads / kOctets;
    const int octet = thread % kOctets, first = thread / kOctets, c = unit.c0 + octet * 8;
    const int tokens = c < size.C ? size.S - first : 0;  // from the thread's first on
    float gamma[8], beta[8], mean[TOKENS / kStep], rstd[TOKENS / kStep];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        gamma[i] = norm.gamma != nullptr && tokens > 0 ? norm.gamma[c + i] : 1.0f;
        beta[i] = norm.beta != nullptr && tokens > 0 ? norm.beta[c + i] : 0.0f;
    }
    const int64_t row = int64_t{unit.image} * size.S + first;
#pragma unroll
    for (int i = 0; i < TOKENS / kStep; ++i) {
        mean[i] = i * kStep < tokens ? norm.mean[row + i * kStep] : 0.0f;
        rstd[i] = i * kStep < tokens ? norm.rstd[row + i * kStep] : 0.0f;
    }
    ring.wait_full(n);
    uint4* at = pointer_to<uint4>(tile + first * kRowBytes + (octet ^ first % 8) * 16);
#pragma unroll
    for (int i = 0; i < TOKENS / kStep; ++i, at += kStep * kRowBytes / sizeof(uint4)) {
        if (i * kStep >= tokens) break;
        float v[8];
        unpack8<T>(*at, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = (v[j] - mean[i]) * rstd[i] * gamma[j] + beta[j];
        *at = pack8<T>(v);
    }
}

template <class G>
class Consumer {
    using T = typename G::T;
    static constexpr int kTokens = G::kTokens, kHidden = G::kHidden;
    static constexpr int kStagedValues = kStagedHidden / 2;

  public:
    __device__ __forceinline__ Consumer(const G& shared, const mk_sm90_token_data_gradient_arguments& arguments,
                                        const Noise& noise, int consumer)
        : shared_(shared),
          p_(arguments),
          noise_(noise),
          consumer_(consumer),
          staging_(p_.a != nullptr || p_.dz != nullptr) {}

    __device__ __forceinline__ void run(const TokenSchedule& schedule) {
        const int chunks = p_.D / kHidden;
        for (uint32_t n = 0; TokenTurn(schedule, n).exists(); ++n) {
            const TokenTurn turn(schedule, n);
            unit_ = turn.unit(consumer_);
            if (unit_.branch_factor(noise_) > 0.0f) {
                compute(chunks);
                continue;
            }
            if (unit_.exists) clear();
            if (turn.works(noise_)) skip(chunks);
        }
    }

  private:
    __device__ __forceinline__ void clear() const {
        constexpr int kOctets = kUnitChannels / 8;
        const int thread = TokenLane::thread();
        const int c = unit_.c0 + thread % kOctets * 8;
        if (c >= p_.size.C) return;
        T* dn = static_cast<T*>(p_.dn) + int64_t{unit_.image} * p_.size.S * p_.size.C + c;
        for (int s = thread / kOctets; s < p_.size.S; s += kConsumerThreads / kOctets) {
            *reinterpret_cast<uint4*>(dn + int64_t{s} * p_.size.C) = make_uint4(0, 0, 0, 0);
        }
    }

    // Weights that came for other consumers.
    __device__ __forceinline__ void skip(int chunks) {
        for (int chunk = 0; chunk < chunks; ++chunk, ++weight_) {
            shared_.w1_ring().wait_full(weight_);
            shared_.w2_ring().wait_full(weight_);
            __syncwarp();  // a lane that still waited would miss the phase
            release(shared_.w1_ring().empty(weight_));
            release(shared_.w2_ring().empty(weight_));
        }
    }

    __device__ __forceinline__ void compute(int chunks) {
        const shared_address x = shared_.x(consumer_), g = shared_.g(consumer_);
        normalise<T, kTokens>(x, shared_.x_ring(consumer_), input_, p_.norm, p_.size, unit_, TokenLane::thread());
        fence_async_shared();
        named_barrier_sync(1 + consumer_, kConsumerThreads);

        float dn[kTokens / 2], z[kHidden / 2], da[kHidden / 2];
        uint32_t dz[kHidden / 16][4];
#pragma unroll
        for (float& v : dn) v = 0.0f;
        set_bias(z, p_.b1, TokenLane::pair());
        shared_.g_ring(consumer_).wait_full(input_);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            multiply_tokens(x, g, z, da, weight_ + chunk);
            if (chunk > 0) {
                multiply_hidden(dn, dz, weight_ + chunk - 1);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            keep(z);
            keep(da);
            release(shared_.w2_ring().empty(weight_ + chunk));
            if (chunk == chunks - 1) release(shared_.x_ring(consumer_).empty(input_));
            activate(z, da, chunk);
            if (chunk + 1 < chunks) set_bias(z, p_.b1 + (chunk + 1) * kHidden, TokenLane::pair());
            wgmma_wait<0>();
            keep(dn);
            if (chunk > 0) release(shared_.w1_ring().empty(weight_ + chunk - 1));
            pack_dz(dz, da);
        }
        weight_ += chunks - 1;
        multiply_hidden(dn, dz, weight_);
        wgmma_wait<0>();
        keep(dn);
        release(shared_.w1_ring().empty(weight_));
        ++weight_;

        named_barrier_sync(1 + consumer_, kConsumerThreads);  // nobody's product reads g any more
        const shared_address row = TokenLane::matrix_row(g);
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
            uint32_t r[4];
            as_matrix_a<T>(r, dn + 8 * k);
            store_matrices_x4_transposed(row + k * 16 * kRowBytes, r);
        }
        fence_async_shared();
        __syncwarp();
        release(shared_.g_ring(consumer_).empty(input_));
        ++input_;
    }

    // z += n . W1', da = g . W2 with the n-th tiles of weights.
    __device__ __forceinline__ void multiply_tokens(shared_address x, shared_address g, float (&z)[kHidden / 2],
                                                    float (&da)[kHidden / 2], uint32_t n) const {
        shared_.w1_ring().wait_full(n);
        keep(z);
        wgmma_fence();
        multiply_tokens(z, x, shared_.w1(n), true);
        shared_.w2_ring().wait_full(n);
        keep(da);
        wgmma_fence();
        multiply_tokens(da, g, shared_.w2(n), false);
        wgmma_commit();
    }

    static __device__ __forceinline__ void multiply_tokens(float (&d)[kHidden / 2], shared_address input,
                                                           shared_address weight, bool accumulate) {
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
            wgmma<T, kHidden, Major::mn, Major::mn>(d, operand_over_tokens(input, k),
                                                    operand_over_tokens<G::kSwizzle>(weight, k), accumulate || k > 0);
        }
    }

    // dn += dz . W1 with the n-th tile.
    __device__ __forceinline__ void multiply_hidden(float (&dn)[kTokens / 2], const uint32_t (&dz)[kHidden / 16][4],
                                                    uint32_t n) const {
        keep(dn);
        wgmma_fence();
        const shared_address w1 = shared_.w1(n);
#pragma unroll
        for (int k = 0; k < kHidden / 16; ++k) {
            wgmma<T, kTokens, Major::k>(dn, dz[k], operand_over_hidden<G::kSwizzle>(w1, k));
        }
        wgmma_commit();
    }

    // z becomes a, da becomes dz, and both go to where they leave from.
    __device__ __forceinline__ void activate(float (&z)[kHidden / 2], float (&da)[kHidden / 2], int chunk) {
#pragma unroll
        for (int part = 0; part < G::kStagedParts; ++part) {
            const int first = part * kStagedValues;
            if (p_.tanh) {
                apply_gelu<true>(z, da, first);
            } else {
                apply_gelu<false>(z, da, first);
            }
            if (noise_.dropout()) {
                const KeptFactors<kStagedValues> kept([&](int i) {
                    const int d = chunk * kHidden + part * kStagedHidden + i / 4 * 8 + TokenLane::pair() + i % 2;
                    return noise_.kept_hidden(d, unit_.c0 + TokenLane::channel() + i % 4 / 2 * 8, unit_.image);
                });
#pragma unroll
                for (int i = 0; i < kStagedValues; ++i) {
                    z[first + i] *= kept[i];
                    da[first + i] *= kept[i];
                }
            }
            if (staging_) stage(z + first, da + first);
        }
    }

    template <bool TANH>
    static __device__ __forceinline__ void apply_gelu(float (&z)[kHidden / 2], float (&da)[kHidden / 2], int first) {
#pragma unroll
        for (int i = first; i < first + kStagedValues; ++i) {
            const GeluGradient gelu = gelu_and_slope(z[i], TANH);
            z[i] = gelu.a;
            da[i] *= gelu.slope;
        }
    }

    __device__ __forceinline__ void stage(const float* a, const float* dz) {
        barrier_wait(shared_.staged_empty(consumer_), staged_parity_ ^ 1);
        const shared_address row = TokenLane::matrix_row(shared_.staged_a(consumer_));
#pragma unroll
        for (int k = 0; k < kStagedHidden / 16; ++k) {
            uint32_t r[4];
            as_matrix_a<T>(r, a + 8 * k);
            store_matrices_x4_transposed(row + k * 16 * kRowBytes, r);
            as_matrix_a<T>(r, dz + 8 * k);
            store_matrices_x4_transposed(row + kStagedBytes + k * 16 * kRowBytes, r);
        }
        fence_async_shared();
        __syncwarp();
        release(shared_.staged_full(consumer_));
        staged_parity_ ^= 1;
    }

    static __device__ __forceinline__ void pack_dz(uint32_t (&dz)[kHidden / 16][4], const float (&da)[kHidden / 2]) {
#pragma unroll
        for (int k = 0; k < kHidden / 16; ++k) as_matrix_a<T>(dz[k], da + 8 * k);
    }

    __device__ __forceinline__ void release(shared_address barrier) const {
        if (TokenLane::thread() % 32 == 0) barrier_arrive(barrier);
    }

    const G& shared_;
    const mk_sm90_token_data_gradient_arguments& p_;
    const Noise& noise_;
    const int consumer_;
    const bool staging_;
    TokenUnit unit_{};
    uint32_t input_ = 0, weight_ = 0;  // which x and g, which tiles of weights
    int staged_parity_ = 0;
};

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1)
    token_data_gradient_sm90_kernel(const __grid_constant__ Maps maps, const mk_sm90_token_data_gradient_arguments p,
                                    const TokenSchedule schedule, const Noise noise) {
#ifdef MK_HAS_SM90A
    const G shared;
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();

    const int warp = uniform(static_cast<int>(threadIdx.x) / 32), consumer = warp / kConsumerWarps;
    if (consumer == G::kConsumers) {
        decrease_registers<G::kCopyRegisters>();
        const int chunks = p.D / G::kHidden, served = warp % kConsumerWarps - 1;
        if (threadIdx.x % 32 != 0 || served >= G::kConsumers) return;
        if (served < 0) {
            bring_weights(shared, maps, schedule, noise, chunks);
        } else {
            serve_consumer(shared, maps, schedule, noise, chunks, served, p.a != nullptr, p.dz != nullptr);
        }
    } else {
        increase_registers<G::kConsumerRegisters>();
        Consumer<G>(shared, p, noise, consumer).run(schedule);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------- launching

template <class G>
int make_maps(Maps* maps, const mk_sm90_token_data_gradient_arguments& p) {
    const auto map_hidden = [&](TensorMap* map, const void* data) {
        const int64_t sizes[] = {p.size.C, p.D_S, p.size.B}, strides[] = {p.size.C, int64_t{p.D_S} * p.size.C};
        const int box[] = {kUnitChannels, kStagedHidden, 1};
        return make_tensor_map(map, data, p.type, 3, sizes, strides, box, Swizzle::bytes_128);
    };
    const auto map_weight = [&](TensorMap* map, const void* data) {
        const int64_t sizes[] = {p.D, p.S_pad}, strides[] = {p.D};
        const int box[] = {G::kHidden, G::kTokens};
        return make_tensor_map(map, data, p.type, 2, sizes, strides, box, G::kSwizzle);
    };
    int error = map_tokens(&maps->x, p.x, p.size, G::kTokens);
    if (error == cudaSuccess) error = map_tokens(&maps->g, p.g, p.type, p.size, G::kTokens);
    if (error == cudaSuccess) error = map_tokens(&maps->dn, p.dn, p.type, p.size, G::kTokens);
    if (error == cudaSuccess) error = map_weight(&maps->w1t, p.w1t);
    if (error == cudaSuccess) error = map_weight(&maps->w2, p.w2);
    if (error == cudaSuccess && p.a != nullptr) error = map_hidden(&maps->a, p.a);
    if (error == cudaSuccess && p.dz != nullptr) error = map_hidden(&maps->dz, p.dz);
    return error;
}

template <class G>
int launch_gradient(const mk_sm90_token_data_gradient_arguments& p, mk_stream stream) {
    Maps maps{};
    const int error = make_maps<G>(&maps, p);
    if (error != cudaSuccess) return error;
    const TokenSchedule schedule(p.size, G::kConsumers, 1, p.device);
    return launch(token_data_gradient_sm90_kernel<G>, schedule.blocks, G::kThreads, G::kSharedBytes, stream, maps, p,
                  schedule, Noise(p.noise));
}

template <class T>
int dispatch(const mk_sm90_token_data_gradient_arguments& p, mk_stream stream) {
    switch (p.S_pad) {
        case 64:
            return launch_gradient<Block<T, 64, 64, 3, 4, 3>>(p, stream);
        case 208:
            return launch_gradient<Block<T, 208, 64, 2, 3, 1>>(p, stream);
        case 256:
            return launch_gradient<Block<T, 256, 32, 2, 3, 2>>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace token_gradient
}  // namespace mixer_kernels

extern "C" int mk_sm90_token_data_gradient(const mk_sm90_token_data_gradient_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    using token_gradient::dispatch;
    const mk_sm90_token_data_gradient_arguments& p = *arguments;
    if (!mk_sm90_takes(p.x, p.size, p.type, 1) || p.size.S > p.S_pad || p.D <= 0 || p.D < p.D_S ||
        p.D % MK_SM90_HIDDEN_MULTIPLE != 0 || !takes_bias(p.b1)) {
        return cudaErrorInvalidValue;
    }
    if (p.size.B == 0) return cudaSuccess;
    return p.type == MK_BFLOAT16 ? dispatch<bfloat16>(p, stream) : dispatch<float16>(p, stream);
}
