// Token mixing in one kernel, for up to 256 tokens: equations (2) to (5) of docs/maths.md.
//
// A warp takes 16 channels of one image through the whole half: FlashAttention with the rows of W1 as keys, the columns
// of W2 as values and GELU in place of softmax. n (matrix A) and o (accumulators) stay in registers, the hidden
// activation passes from one product to the next in registers, W1 and W2 stream through shared memory:
//
//     n = LN(x[:, channels])'                        [16, S]
//     for each 16 rows of W1 and columns of W2:
//         a = GELU(n . W1[rows]' + b1[rows])         [16, 16]
//         o += a . W2[:, columns]'                   [16, S]
//     u[:, channels] = x[:, channels] + o' + b2
//
// The first product is a step of 32 (16) hidden units ahead of the second, so that GELU is computed while the tensor
// cores work; the rows of W1 of a turn lie beside the columns of W2 of the step before. Tokens are padded to tiles of
// 16 for the first product and of 8 for the second: 196 cost 208 and 200.
#include "device/gelu.cuh"
#include "token_tile.cuh"

namespace mixer_kernels {
namespace {

constexpr int kStages = 3;

template <class T, int TILES>
struct ForwardTile : Tokens<TILES> {
    using Tokens<TILES>::kPadded;
    static constexpr int kGroups = kPadded > 208 ? 1 : 2, kHidden = kGroups * kGroup;                 // to a step
    static constexpr int kW1 = kHidden * (kPadded + kPadding), kW2 = kPadded * (kHidden + kPadding);  // elements
    static constexpr int kB1 = kHidden * static_cast<int>(sizeof(float) / sizeof(T));
    static constexpr int kStage = kW1 + kW2 + kB1;
    using Hidden = float[kGroups][2][4];  // a warp's of a step, as accumulators

    // x lies where the second stage will, for the first is on its way while x is read.
    static constexpr size_t shared_bytes(int channels) {
        const int x = kPadded * (channels + kPadding), ring = (kStages - 1) * kStage;
        return sizeof(T) * (kStage + (x > ring ? x : ring));
    }
};

template <class T, int TILES>
__global__ void __launch_bounds__(256, Tokens<TILES>::kBlocks)
    token_mixing_fwd_kernel(const mk_token_mixing_arguments p, const Stream x, const Noise noise, const GeluForm form) {
    using Tile = ForwardTile<T, TILES>;
    using Hidden = typename Tile::Hidden;
    T* ring = shared_memory<T>();
    const TokenBlock block(p.size.C);
    const int S = p.size.S, lane = block.lane;
    const float keep = noise.kept_image(block.image);
    const int steps = keep > 0.0f ? p.D / Tile::kHidden : 0;  // a dropped image takes none

    const auto stage_of = [&](int turn) { return ring + turn % kStages * Tile::kStage; };
    const auto copy_turn = [&](int turn) {
        T* stage = stage_of(turn);
        const int64_t d = int64_t{turn} * Tile::kHidden;
        if (turn < steps) {
            copy_weight<Tile::kHidden, Tile::kPadded>(stage, static_cast<const T*>(p.w1) + d * Tile::kPadded,
                                                      Tile::kPadded);
            if (threadIdx.x < Tile::kHidden / 4) {
                copy_async_16(reinterpret_cast<float*>(stage + Tile::kW1 + Tile::kW2) + 4 * threadIdx.x,
                              p.b1 + d + 4 * threadIdx.x, 16);
            }
        }
        if (turn > 0 && turn <= steps) {
            copy_weight<Tile::kPadded, Tile::kHidden>(stage + Tile::kW1,
                                                      static_cast<const T*>(p.w2) + d - Tile::kHidden, p.D);
        }
        copy_async_commit();
    };

    copy_turn(0);
    T* x_tile = ring + Tile::kStage;
    fill_tile<Tile::kPadded>(x_tile, NormalisedReader<T>(x, p.x, p.norm, p.size, block.image), p.size, block,
                             x.stride_c == 1);
    copy_async_wait<0>();
    __syncthreads();
    uint32_t n[Tile::kTiles16][4];
#pragma unroll
    for (int k = 0; k < Tile::kTiles16; ++k) {
        load_channels_by_tokens(n[k], x_tile, block, k * 16);
    }
    __syncthreads();
#pragma unroll
    for (int turn = 1; turn < kStages; ++turn) copy_turn(turn);

    float o[2 * Tile::kTiles16][4] = {};
    const int channel = block.c0 + block.warp * kWarpChannels + lane / 4;

    // z = n . W1' + b1 of a group of the turn's W1.
    const auto first_product = [&](float (&z)[2][4], const T* w1, int group) {
        const float* b1 = reinterpret_cast<const float*>(w1 + Tile::kW1 + Tile::kW2) + group * kGroup + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float2 bias = *reinterpret_cast<const float2*>(b1 + j * 8);
            z[j][0] = z[j][2] = bias.x;
            z[j][1] = z[j][3] = bias.y;
        }
#pragma unroll
        for (int k = 0; k < Tile::kTiles16; ++k) {
            uint32_t b[4];
            load_columns(b, w1, Tile::kPadded + kPadding, group * kGroup, k * 16, lane);
            multiply_add<T>(z[0], n[k], b[0], b[1]);
            multiply_add<T>(z[1], n[k], b[2], b[3]);
        }
    };
    // o += GELU(z) . W2' of a group of the turn's W2.
    const auto second_product = [&](float (&z)[2][4], const T* stage, int turn, int group) {
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i / 4][i % 4] = gelu(z[i / 4][i % 4], form);
        if (noise.dropout()) {
            const KeptFactors<8> kept([&](int i) {
                const int d = (turn - 1) * Tile::kHidden + group * kGroup + i / 4 * 8 + lane % 4 * 2 + i % 2;
                return noise.kept_hidden(d, channel + i % 4 / 2 * 8, block.image);
            });
#pragma unroll
            for (int i = 0; i < 8; ++i) z[i / 4][i % 4] *= kept[i];
        }
        uint32_t a[4];
        as_matrix_a<T>(a, z[0], z[1]);
        const T* w2 = stage + Tile::kW1;
#pragma unroll
        for (int m = 0; m < Tile::kTiles16; ++m) {
            uint32_t b[4];
            load_columns(b, w2, Tile::kHidden + kPadding, m * 16, group * kGroup, lane);
            multiply_add<T>(o[2 * m], a, b[0], b[1]);
            if (2 * m + 1 < TILES) multiply_add<T>(o[2 * m + 1], a, b[2], b[3]);
        }
    };

    if (steps > 0) {
        Hidden z;
#pragma unroll
        for (int group = 0; group < Tile::kGroups; ++group) first_product(z[group], ring, group);
#pragma unroll 1
        for (int turn = 1; turn < steps; ++turn) {
            copy_async_wait<kStages - 2>();
            __syncthreads();
            copy_turn(turn + kStages - 1);
            const T* stage = stage_of(turn);
            Hidden next;
#pragma unroll
            for (int group = 0; group < Tile::kGroups; ++group) first_product(next[group], stage, group);
#pragma unroll
            for (int group = 0; group < Tile::kGroups; ++group) second_product(z[group], stage, turn, group);
#pragma unroll
            for (int i = 0; i < Tile::kGroups * 8; ++i) z[i / 8][i / 4 % 2][i % 4] = next[i / 8][i / 4 % 2][i % 4];
        }
        copy_async_wait<kStages - 2>();
        __syncthreads();
#pragma unroll
        for (int group = 0; group < Tile::kGroups; ++group) second_product(z[group], stage_of(steps), steps, group);
    }
    copy_async_wait<0>();
    __syncthreads();

    float* staging = reinterpret_cast<float*>(ring) + block.warp * kStagingFloats;
    const int c = block.c0 + block.warp * kWarpChannels + lane % 2 * 8, valid = min(p.size.C - c, 8);
    const auto offset = [&](int s) { return block.image * p.x.stride_b + s * p.x.stride_s + c * p.x.stride_c; };
    constexpr int kBatch = 4;  // of 16 tokens whose loads are under way together
#pragma unroll
    for (int batch = 0; batch < Tile::kTiles16; batch += kBatch) {
        Chunk fetched[kBatch];
        float b2[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int s = (batch + i) * 16 + lane / 2;
            if (s < S && valid > 0) {
                fetched[i] = x.fetch(offset(s), valid);
                b2[i] = p.b2[s];
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int m = batch + i, s = m * 16 + lane / 2;
            if (m == Tile::kTiles16) break;
            float v[8], residual[8];
            transpose_through(staging, o[2 * m], o[2 * m + 1], lane, v);
            if (s >= S || valid <= 0) continue;
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] += b2[i];
            if (noise.dropout()) {
                const KeptFactors<8> kept([&](int j) { return noise.kept_branch(c + j, s, block.image); });
#pragma unroll
                for (int j = 0; j < 8; ++j) v[j] *= kept[j];
            }
            x.read<T>(fetched[i], offset(s), valid, residual);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = residual[j] + keep * v[j];
            write8<T>(p.u, x.is_float32, (block.image * S + s) * p.size.C + c, valid, v);
        }
    }
}

template <class T, int TILES>
int launch_forward(const mk_token_mixing_arguments& p, mk_stream stream) {
    const int warps = warps_for(p.size, p.device, ForwardTile<T, TILES>::shared_bytes);
    const int channels = warps * kWarpChannels;
    const int64_t blocks = p.size.B * ((p.size.C + channels - 1) / channels);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch(token_mixing_fwd_kernel<T, TILES>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                  ForwardTile<T, TILES>::shared_bytes(channels), stream, p, Stream(p.x), Noise(p.noise),
                  GeluForm(p.tanh != 0));
}

template <class T>
int dispatch(const mk_token_mixing_arguments& p, mk_stream stream) {
    return with_token_tiles(p.size.S, [&](auto tiles) { return launch_forward<T, decltype(tiles)::value>(p, stream); });
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_padded_tokens(int S) {
    using namespace mixer_kernels;
    return S > kMostTokens ? 0
                           : with_token_tiles(S, [](auto tiles) { return Tokens<decltype(tiles)::value>::kPadded; });
}

extern "C" int mk_token_mixing_forward(const mk_token_mixing_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_token_mixing_arguments& p = *arguments;
    if (p.S_pad != mk_padded_tokens(p.size.S) || p.D % MK_HIDDEN_MULTIPLE != 0) return cudaErrorInvalidValue;
    return p.type == MK_BFLOAT16  ? dispatch<bfloat16>(p, stream)
           : p.type == MK_FLOAT16 ? dispatch<float16>(p, stream)
                                  : static_cast<int>(cudaErrorInvalidValue);
}
