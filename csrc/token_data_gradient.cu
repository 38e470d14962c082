// Token mixing backward for up to 256 tokens: the gradient of n, and what the weight gradients need.
//
// The forward kernel's shape: a warp owns 16 channels of one image. z is recomputed from x, which is cheaper than
// loading it; da, dz and dn follow in one loop over the hidden axis, equations (14) and (15) of docs/maths.md:
//
//     z  = n . W1' + b1                     a  = GELU(z)
//     da = g . W2                           dz = da * GELU'(z)
//     dn += dz . W1
//
// n and dn stay in registers, g lies in shared memory. The rows of W1 serve twice: as columns of the first product and
// as the depth of the last. a and dz leave for the weight gradients as [B, D_S, C].
#include "device/gelu.cuh"
#include "token_tile.cuh"

namespace mixer_kernels {
namespace {

constexpr int kStages = 2;
constexpr int kHiddenPitch = 24;                           // elements to a row of a warp's 16 hidden units of a or dz
constexpr int kHiddenStaging = 2 * kGroup * kHiddenPitch;  // elements: of a and of dz

template <class T, int TILES>
struct BackwardTile : Tokens<TILES> {
    using Tokens<TILES>::kPadded;
    static constexpr int kGroups = kPadded > 208 ? 1 : 2, kHidden = kGroups * kGroup;  // to a step
    static constexpr int kWeight = kHidden * (kPadded + kPadding);  // elements of W1 or W2' to a step
    static constexpr int kStage = 2 * kWeight + kHidden * static_cast<int>(sizeof(float) / sizeof(T));  // and b1
    using Hidden = float[kGroups][2][4];  // a warp's of a step, as accumulators
    // Tiles of 16 tokens of n that stay in registers; the rest stays in shared memory, behind g. For more than 208
    // tokens registers are few: loads ahead of products are too.
    static constexpr int kKept = kPadded > 208 ? 8 : Tokens<TILES>::kTiles16, kRest = kPadded - 16 * kKept;
    static constexpr int kUnrolled = kRest > 0 ? 4 : kKept;

    static constexpr size_t shared_bytes(int channels) {
        return sizeof(T) * ((kPadded + kRest) * (channels + kPadding) + kStages * kStage) +
               staging_bytes * (channels / kWarpChannels);
    }
    static constexpr size_t staging_bytes = sizeof(T) * kHiddenStaging;
    static_assert(staging_bytes >= sizeof(float) * kStagingFloats, "dn leaves through it too");
};

// 8 channels of 16-bit numbers.
template <class T>
__device__ __forceinline__ void store_packed(void* tensor, int64_t offset, int valid, uint4 packed) {
    T* const to = static_cast<T*>(tensor) + offset;
    if (valid >= 8 && aligned_16(to)) {
        *reinterpret_cast<uint4*>(to) = packed;
        return;
    }
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < valid) to[i] = T{static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16)};
    }
}

// tile [hidden units, channels] = matrix A, 16 channels by 16 hidden units.
template <class T>
__device__ __forceinline__ void stage_transposed(T* tile, const uint32_t (&a)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int d = lane % 4 * 2 + i % 2 + i / 4 * 8, channel = lane / 4 + i / 2 % 2 * 8;
        tile[d * kHiddenPitch + channel] = T{static_cast<uint16_t>(a[i / 2] >> i % 2 * 16)};
    }
}

template <class T, int TILES>
__global__ void __launch_bounds__(256, Tokens<TILES>::kBlocks)
    token_mixing_bwd_kernel(const mk_token_data_gradient_arguments p, const Stream x, const Stream g, const Noise noise,
                            const GeluForm form) {
    using Tile = BackwardTile<T, TILES>;
    using Hidden = typename Tile::Hidden;
    constexpr int kPitch = Tile::kPadded + kPadding;
    const TokenBlock block(p.size.C);
    const int S = p.size.S, lane = block.lane;
    // A dropped image takes no step: its dn is 0, and the weight gradients do not read its a and dz.
    const int steps = noise.kept_image(block.image) > 0.0f ? p.D / Tile::kHidden : 0;

    T* g_tile = shared_memory<T>();
    T* n_tile = g_tile + Tile::kRest * block.pitch();  // g comes over what is kept of it in registers
    T* ring = n_tile + Tile::kPadded * block.pitch();
    T* staging = ring + kStages * Tile::kStage + block.warp * kHiddenStaging;

    const auto copy_step = [&](int step) {
        if (step < steps) {
            T* stage = ring + step % kStages * Tile::kStage;
            const int64_t d = int64_t{step} * Tile::kHidden, offset = d * Tile::kPadded;
            copy_weight<Tile::kHidden, Tile::kPadded>(stage, static_cast<const T*>(p.w1) + offset, Tile::kPadded);
            copy_weight<Tile::kHidden, Tile::kPadded>(stage + Tile::kWeight, static_cast<const T*>(p.w2t) + offset,
                                                      Tile::kPadded);
            if (threadIdx.x < Tile::kHidden / 4) {
                copy_async_16(reinterpret_cast<float*>(stage + 2 * Tile::kWeight) + 4 * threadIdx.x,
                              p.b1 + d + 4 * threadIdx.x, 16);
            }
        }
        copy_async_commit();
    };

    copy_step(0);
    fill_tile<Tile::kPadded>(n_tile, NormalisedReader<T>(x, p.x, p.norm, p.size, block.image), p.size, block,
                             x.stride_c == 1);
    __syncthreads();
    uint32_t n[Tile::kKept][4];
#pragma unroll
    for (int k = 0; k < Tile::kKept; ++k) load_channels_by_tokens(n[k], n_tile, block, k * 16);
    __syncthreads();
    fill_tile<Tile::kPadded>(g_tile, GradientReader<T>(g, p.size, block.image), p.size, block, true);

    float dn[2 * Tile::kTiles16][4] = {};
    const int channel = block.c0 + block.warp * kWarpChannels + lane / 4;
    // Where a lane's 8 channels of its row of a and dz start, of the first hidden units.
    const int c = block.c0 + block.warp * kWarpChannels + lane % 2 * 8, valid = min(p.size.C - c, 8);
    const int64_t hidden = (block.image * p.D_S + lane / 2) * p.size.C + c;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<0>();
        __syncthreads();
        copy_step(step + 1);
        const T* w1 = ring + step % kStages * Tile::kStage;
        const T* w2t = w1 + Tile::kWeight;
        const float* b1 = reinterpret_cast<const float*>(w2t + Tile::kWeight) + lane % 4 * 2;

        Hidden z, da = {};
        // z = n . W1' + b1 of a group.
        const auto multiply_n = [&](float (&of_group)[2][4], int group) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 bias = *reinterpret_cast<const float2*>(b1 + group * kGroup + j * 8);
                of_group[j][0] = of_group[j][2] = bias.x;
                of_group[j][1] = of_group[j][3] = bias.y;
            }
#pragma unroll
            for (int k = 0; k < Tile::kTiles16; ++k) {
                uint32_t rest[4], b[4];
                if (k >= Tile::kKept) load_channels_by_tokens(rest, n_tile, block, k * 16);
                const auto& a = k < Tile::kKept ? n[k % Tile::kKept] : rest;
                load_columns(b, w1, kPitch, group * kGroup, k * 16, lane);
                multiply_add<T>(of_group[0], a, b[0], b[1]);
                multiply_add<T>(of_group[1], a, b[2], b[3]);
            }
        };
#pragma unroll(Tile::kUnrolled)
        for (int k = 0; k < Tile::kTiles16; ++k) {
            uint32_t a[4];
            load_channels_by_tokens(a, g_tile, block, k * 16);
#pragma unroll
            for (int group = 0; group < Tile::kGroups; ++group) {
                uint32_t b[4];
                load_columns(b, w2t, kPitch, group * kGroup, k * 16, lane);
                multiply_add<T>(da[group][0], a, b[0], b[1]);
                multiply_add<T>(da[group][1], a, b[2], b[3]);
            }
        }
        multiply_n(z[0], 0);
        // GELU of a group is computed while the other group's z, or its share of dn, is multiplied. One branch for all.
        const auto finish = [&](auto gelu_and_slope) {
#pragma unroll
            for (int group = 0; group < Tile::kGroups; ++group) {
                if (group == 0 && Tile::kGroups > 1) multiply_n(z[1], 1);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const GeluGradient gelu = gelu_and_slope(z[group][i / 4][i % 4], form);
                    z[group][i / 4][i % 4] = gelu.a;
                    da[group][i / 4][i % 4] *= gelu.slope;
                }
                const int first = step * Tile::kHidden + group * kGroup;
                if (noise.dropout()) {
                    const KeptFactors<8> kept([&](int i) {
                        const int d = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
                        return noise.kept_hidden(d, channel + i % 4 / 2 * 8, block.image);
                    });
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        z[group][i / 4][i % 4] *= kept[i];
                        da[group][i / 4][i % 4] *= kept[i];
                    }
                }
                uint32_t a[4], dz[4];
                as_matrix_a<T>(a, z[group][0], z[group][1]);
                as_matrix_a<T>(dz, da[group][0], da[group][1]);
                __syncwarp();
                stage_transposed(staging, a, lane);
                stage_transposed(staging + kGroup * kHiddenPitch, dz, lane);
                __syncwarp();
                const T* staged = staging + lane / 2 * kHiddenPitch + lane % 2 * 8;
                const int d = first + lane / 2;
                if (d < p.D_S && valid > 0) {
                    const int64_t offset = hidden + int64_t{first} * p.size.C;
                    if (p.a) store_packed<T>(p.a, offset, valid, *reinterpret_cast<const uint4*>(staged));
                    if (p.dz)
                        store_packed<T>(p.dz, offset, valid,
                                        *reinterpret_cast<const uint4*>(staged + kGroup * kHiddenPitch));
                }
#pragma unroll
                for (int m = 0; m < Tile::kTiles16; ++m) {
                    uint32_t b[4];
                    load_columns_transposed(b, w1, kPitch, m * 16, group * kGroup, lane);
                    multiply_add<T>(dn[2 * m], dz, b[0], b[1]);
                    if (2 * m + 1 < TILES) multiply_add<T>(dn[2 * m + 1], dz, b[2], b[3]);
                }
            }
        };
        if (form.is_tanh) {
            finish([](float v, const GeluForm& f) { return gelu_and_slope_tanh(v, f); });
        } else {
            finish([](float v, const GeluForm& f) { return gelu_and_slope_erf(v, f); });
        }
    }
    copy_async_wait<0>();

    const TokenBlock end = block.again(p.size.C);
    const int of_dn = end.c0 + end.warp * kWarpChannels + end.lane % 2 * 8, left = p.size.C - of_dn;
    T* const results =
        g_tile + (Tile::kPadded + Tile::kRest) * end.pitch() + kStages * Tile::kStage + end.warp * kHiddenStaging;
#pragma unroll
    for (int m = 0; m < Tile::kTiles16; ++m) {
        float v[8];
        transpose_through(reinterpret_cast<float*>(results), dn[2 * m], dn[2 * m + 1], end.lane, v);
        const int s = m * 16 + end.lane / 2;
        if (s < S && left > 0) store8(p.dn, p.type, (end.image * S + s) * p.size.C + of_dn, min(left, 8), v);
    }
}

template <class T, int TILES>
int launch_backward(const mk_token_data_gradient_arguments& p, mk_stream stream) {
    const int warps = warps_for(p.size, p.device, BackwardTile<T, TILES>::shared_bytes);
    const int channels = warps * kWarpChannels;
    const int64_t blocks = p.size.B * ((p.size.C + channels - 1) / channels);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch(token_mixing_bwd_kernel<T, TILES>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                  BackwardTile<T, TILES>::shared_bytes(channels), stream, p, Stream(p.x),
                  Stream(p.g, p.type, int64_t{p.size.S} * p.size.C, p.size.C, 1), Noise(p.noise),
                  GeluForm(p.tanh != 0));
}

template <class T>
int dispatch(const mk_token_data_gradient_arguments& p, mk_stream stream) {
    return with_token_tiles(p.size.S,
                            [&](auto tiles) { return launch_backward<T, decltype(tiles)::value>(p, stream); });
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_token_data_gradient(const mk_token_data_gradient_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_token_data_gradient_arguments& p = *arguments;
    if (p.S_pad != mk_padded_tokens(p.size.S) || p.D % MK_HIDDEN_MULTIPLE != 0) return cudaErrorInvalidValue;
    return p.type == MK_BFLOAT16  ? dispatch<bfloat16>(p, stream)
           : p.type == MK_FLOAT16 ? dispatch<float16>(p, stream)
                                  : static_cast<int>(cudaErrorInvalidValue);
}
