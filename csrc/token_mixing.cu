// Token mixing in one kernel, for up to 256 tokens: equations (2) to (5) of docs/maths.md.
//
// A warp takes 16 channels of one image through the whole half: FlashAttention with the rows of W1 as keys, the columns
// of W2 as values and GELU in place of softmax. n (matrix A) and o (accumulators) stay in registers, the hidden
// activation passes from one product to the next in registers, W1 and W2 stream through shared memory:
//
//     n = LN(x[:, channels])'                        [16, S]
//     for each 32 (16) rows of W1 and columns of W2:
//         a = GELU(n . W1[rows]' + b1[rows])         [16, 32]
//         o += a . W2[:, columns]'                   [16, S]
//     u[:, channels] = x[:, channels] + o' + b2
//
// Tiles of 16 (first product) and 8 tokens (second) past S are skipped at run time: 196 tokens cost 208 and 200.
#include "device/gelu.cuh"
#include "token_tile.cuh"

namespace mixer_kernels {
namespace {

constexpr int kStages = 3;

template <class T, int S_PAD>
struct ForwardTile {
    static constexpr int kHidden = S_PAD > 208 ? 16 : 32;  // hidden units to a step
    static constexpr int kW1 = kHidden * (S_PAD + kPadding), kW2 = S_PAD * (kHidden + kPadding);  // elements
    static constexpr int kStage = kW1 + kW2;

    // x lies where the second stage will, for the first is on its way while x is read.
    static constexpr size_t shared_bytes(int channels) {
        const int x = S_PAD * (channels + kPadding), ring = (kStages - 1) * kStage;
        return sizeof(T) * (kStage + (x > ring ? x : ring));
    }
};

template <class T, int S_PAD>
__global__ void __launch_bounds__(256, 1)
    token_mixing_fwd_kernel(const mk_token_mixing_arguments p, const Noise noise) {
    using Tile = ForwardTile<T, S_PAD>;
    constexpr int kHidden = Tile::kHidden;
    T* ring = shared_memory<T>();
    const TokenBlock block(p.size.C);
    const int S = p.size.S, lane = block.lane;
    const int rows = align16(S);
    const float keep = noise.kept_image(block.image);
    const int steps = keep > 0.0f ? p.D / kHidden : 0;  // a dropped image takes none

    const auto copy_step = [&](int step) {
        if (step < steps) {
            T* stage = ring + step % kStages * Tile::kStage;
            const int64_t d = int64_t{step} * kHidden;
            copy_weight<kHidden, S_PAD>(stage, static_cast<const T*>(p.w1) + d * S_PAD, S_PAD, kHidden, rows);
            copy_weight<S_PAD, kHidden>(stage + Tile::kW1, static_cast<const T*>(p.w2) + d, p.D, rows, kHidden);
        }
        copy_async_commit();
    };

    copy_step(0);
    T* x_tile = ring + Tile::kStage;
    load_normalised(x_tile, p.x, p.norm, p.size, block, rows);
    __syncthreads();
    uint32_t n[S_PAD / 16][4];
#pragma unroll
    for (int k = 0; k < S_PAD / 16; ++k) {
        if (k * 16 >= S) break;
        load_channels_by_tokens(n[k], x_tile, block, k * 16);
    }
    __syncthreads();
#pragma unroll
    for (int step = 1; step < kStages - 1; ++step) copy_step(step);

    float o[S_PAD / 8][4] = {};
    const int channel = block.c0 + block.warp * kWarpChannels + lane / 4;
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        copy_step(step + kStages - 1);
        const T* w1 = ring + step % kStages * Tile::kStage;
        const T* w2 = w1 + Tile::kW1;

        float z[kHidden / 8][4];
#pragma unroll
        for (int j = 0; j < kHidden / 8; ++j) {
            const float* b1 = p.b1 + step * kHidden + j * 8 + lane % 4 * 2;
            z[j][0] = z[j][2] = b1[0];
            z[j][1] = z[j][3] = b1[1];
        }
#pragma unroll
        for (int k = 0; k < S_PAD / 16; ++k) {
            if (k * 16 >= S) break;
#pragma unroll
            for (int j = 0; j < kHidden / 16; ++j) {
                uint32_t b[4];
                load_columns(b, w1, S_PAD + kPadding, j * 16, k * 16, lane);
                multiply_add<T>(z[2 * j], n[k], b[0], b[1]);
                multiply_add<T>(z[2 * j + 1], n[k], b[2], b[3]);
            }
        }

        uint32_t a[kHidden / 16][4];
#pragma unroll
        for (int j = 0; j < kHidden / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) z[j][i] = gelu(z[j][i], p.tanh);
        }
        if (noise.dropout()) {
            const KeptFactors<kHidden / 2> kept([&](int i) {
                const int d = step * kHidden + i / 4 * 8 + lane % 4 * 2 + i % 2;
                return noise.kept_hidden(d, channel + i % 4 / 2 * 8, block.image);
            });
#pragma unroll
            for (int i = 0; i < kHidden / 2; ++i) z[i / 4][i % 4] *= kept[i];
        }
#pragma unroll
        for (int j = 0; j < kHidden / 16; ++j) as_matrix_a<T>(a[j], z[2 * j], z[2 * j + 1]);

#pragma unroll
        for (int m = 0; m < S_PAD / 16; ++m) {
            if (m * 16 >= S) break;
#pragma unroll
            for (int j = 0; j < kHidden / 16; ++j) {
                uint32_t b[4];
                load_columns(b, w2, kHidden + kPadding, m * 16, j * 16, lane);
                multiply_add<T>(o[2 * m], a[j], b[0], b[1]);
                if (m * 16 + 8 < S) multiply_add<T>(o[2 * m + 1], a[j], b[2], b[3]);
            }
        }
    }
    copy_async_wait<0>();
    __syncthreads();

    float* staging = reinterpret_cast<float*>(ring) + block.warp * kStagingFloats;
    const int c = block.c0 + block.warp * kWarpChannels + lane % 2 * 8, valid = min(p.size.C - c, 8);
#pragma unroll
    for (int m = 0; m < S_PAD / 16; ++m) {
        if (m * 16 >= S) break;
        float v[8], x[8];
        transpose_through(staging, o[2 * m], o[2 * m + 1], lane, v);
        const int s = m * 16 + lane / 2;
        if (s >= S || valid <= 0) continue;
        load8(p.x.data, p.x.type, block.image * p.x.stride_b + s * p.x.stride_s + c * p.x.stride_c, p.x.stride_c, valid,
              x);
        const float b2 = p.b2[s];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += b2;
        if (noise.dropout()) {
            const KeptFactors<8> kept([&](int i) { return noise.kept_branch(c + i, s, block.image); });
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] *= kept[i];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = x[i] + keep * v[i];
        store8(p.u, p.x.type, (block.image * S + s) * p.size.C + c, valid, v);
    }
}

template <class T, int S_PAD>
int launch_forward(const mk_token_mixing_arguments& p, mk_stream stream) {
    const int warps = warps_for(p.size, p.device, ForwardTile<T, S_PAD>::shared_bytes);
    const int channels = warps * kWarpChannels;
    const int64_t blocks = p.size.B * ((p.size.C + channels - 1) / channels);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch(token_mixing_fwd_kernel<T, S_PAD>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                  ForwardTile<T, S_PAD>::shared_bytes(channels), stream, p, Noise(p.noise));
}

template <class T>
int dispatch(const mk_token_mixing_arguments& p, mk_stream stream) {
    switch (p.S_pad) {
        case 64:
            return launch_forward<T, 64>(p, stream);
        case 208:
            return launch_forward<T, 208>(p, stream);
        case 256:
            return launch_forward<T, 256>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_padded_tokens(int S) { return S <= 64 ? 64 : S <= 208 ? 208 : S <= 256 ? 256 : 0; }

extern "C" int mk_token_mixing_forward(const mk_token_mixing_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_token_mixing_arguments& p = *arguments;
    if (p.size.S > p.S_pad || p.D % MK_HIDDEN_MULTIPLE != 0) return cudaErrorInvalidValue;
    return p.type == MK_BFLOAT16  ? dispatch<bfloat16>(p, stream)
           : p.type == MK_FLOAT16 ? dispatch<float16>(p, stream)
                                  : static_cast<int>(cudaErrorInvalidValue);
}
