// Dropout and stochastic depth: counter-based random numbers, equations (11) and (12) of docs/maths.md.
//
// A factor is a function of the seed and of where it is used, the same as in every other backend with kernels: Philox
// 4x32-10 (Salmon et al. 2011) counted by (coordinate, coordinate, image, site).
#pragma once

#include "../mixer_kernels.h"
#include "platform.cuh"

namespace mixer_kernels {

__device__ __forceinline__ uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

// The noise of one half of a block, as kernels take it.
class Noise {
  public:
    explicit Noise(const mk_noise& noise)
        : seed_(noise.seed),
          dropout_p_(noise.dropout_p),
          dropout_scale_(scale(noise.dropout_p)),
          path_p_(noise.drop_path_p),
          path_scale_(scale(noise.drop_path_p)) {}

    __device__ __forceinline__ bool dropout() const { return dropout_p_ > 0.0f; }
    __device__ __forceinline__ bool drop_path() const { return path_p_ > 0.0f; }

    // Dropout's factor of hidden unit d of a channel (token mixing) or of a token (channel mixing).
    __device__ __forceinline__ float kept_hidden(int d, int position, int64_t image) const {
        return dropout() ? kept(d, position, image, kHidden, dropout_p_, dropout_scale_) : 1.0f;
    }

    // Dropout's factor of channel c of token s in the branch's output.
    __device__ __forceinline__ float kept_branch(int c, int s, int64_t image) const {
        return dropout() ? kept(c, s, image, kBranch, dropout_p_, dropout_scale_) : 1.0f;
    }

    // Stochastic depth's factor of the whole branch of an image.
    __device__ __forceinline__ float kept_image(int64_t image) const {
        return drop_path() ? kept(0, 0, image, kImage, path_p_, path_scale_) : 1.0f;
    }

  private:
    enum Site : uint32_t { kHidden = 0, kBranch = 1, kImage = 2 };

    static float scale(float p) { return p < 1.0f ? 1.0f / (1.0f - p) : 0.0f; }  // with p = 1 nothing is kept

    __device__ __forceinline__ float kept(int i, int j, int64_t image, Site site, float p, float scale) const {
        const uint32_t bits = philox(static_cast<uint64_t>(*seed_), i, j, static_cast<uint32_t>(image), site);
        const int32_t folded =
            static_cast<int32_t>(bits) < 0 ? ~static_cast<int32_t>(bits) : static_cast<int32_t>(bits);
        // The largest factor that keeps the product of the largest integer below 1 in float32.
        return static_cast<float>(folded) * 4.6566127342e-10f >= p ? scale : 0.0f;
    }

    const int64_t* seed_;
    float dropout_p_, dropout_scale_, path_p_, path_scale_;
};

// Dropout's factors of N elements, kept(i) for each. A loop that is not unrolled: Philox is long.
template <int N>
class KeptFactors {
  public:
    template <class KEPT>
    __device__ __forceinline__ explicit KeptFactors(KEPT kept) {
#pragma unroll 1
        for (int i = 0; i < N; ++i) {
            const float factor = kept(i);
            if (factor != 0.0f) {
                mask_ |= 1u << i;
                scale_ = factor;
            }
        }
    }

    __device__ __forceinline__ float operator[](int i) const { return (mask_ >> i & 1) != 0 ? scale_ : 0.0f; }

  private:
    static_assert(N <= 32, "a bit for each element");
    uint32_t mask_ = 0;
    float scale_ = 0.0f;
};

}  // namespace mixer_kernels
