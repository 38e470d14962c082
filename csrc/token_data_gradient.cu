// Token mixing backward for up to 256 tokens: the gradient of n, and what the weight gradients need.
//
// The forward kernel's shape: a warp owns 16 channels of one image. z is recomputed from x, which is cheaper than
// loading it; da, dz and dn follow in one loop over the hidden axis, equations (14) and (15) of docs/maths.md:
//
//     z  = n . W1' + b1                     a  = GELU(z)
//     da = g . W2                           dz = da * GELU'(z)
//     dn += dz . W1
//
// n and g lie in shared memory, dn in registers. The rows of W1 serve twice: as columns of the first product and as the
// depth of the last. a and dz leave for the weight gradients as [B, D_S, C].
#include "device/gelu.cuh"
#include "token_tile.cuh"

namespace mixer_kernels {
namespace {

constexpr int kStages = 2;
constexpr int kHidden = 16;  // hidden units to a step

template <class T, int S_PAD>
struct BackwardTile {
    static constexpr int kWeight = kHidden * (S_PAD + kPadding);  // elements of W1 or W2' to a step

    static constexpr size_t shared_bytes(int channels) {
        const int inputs = 2 * S_PAD * (channels + kPadding), ring = kStages * 2 * kWeight;
        return sizeof(T) * (inputs + ring) + sizeof(float) * (channels / kWarpChannels * kStagingFloats);
    }
};

template <class T, int S_PAD>
__global__ void __launch_bounds__(256, 1)
    token_mixing_bwd_kernel(const mk_token_data_gradient_arguments p, const Noise noise) {
    constexpr int kWeight = BackwardTile<T, S_PAD>::kWeight, kPitch = S_PAD + kPadding;
    const TokenBlock block(p.size.C);
    const int S = p.size.S, lane = block.lane;
    const int rows = align16(S);
    // A dropped image takes no step: its dn is 0, and the weight gradients do not read its a and dz.
    const int steps = noise.kept_image(block.image) > 0.0f ? p.D / kHidden : 0;

    T* n_tile = shared_memory<T>();
    T* g_tile = n_tile + S_PAD * block.pitch();
    T* ring = g_tile + S_PAD * block.pitch();
    float* staging = reinterpret_cast<float*>(ring + kStages * 2 * kWeight) + block.warp * kStagingFloats;

    const auto copy_step = [&](int step) {
        if (step < steps) {
            T* stage = ring + step % kStages * 2 * kWeight;
            const int64_t offset = int64_t{step} * kHidden * S_PAD;
            copy_weight<kHidden, S_PAD>(stage, static_cast<const T*>(p.w1) + offset, S_PAD, kHidden, rows);
            copy_weight<kHidden, S_PAD>(stage + kWeight, static_cast<const T*>(p.w2t) + offset, S_PAD, kHidden, rows);
        }
        copy_async_commit();
    };

    copy_step(0);
    load_normalised(n_tile, p.x, p.norm, p.size, block, rows);
    load_gradient(g_tile, p.g, p.type, p.size, block, rows);

    float dn[S_PAD / 8][4] = {};
    const int channel = block.c0 + block.warp * kWarpChannels + lane / 4;
    const int c = block.c0 + block.warp * kWarpChannels + lane % 2 * 8, valid = min(p.size.C - c, 8);
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<0>();
        __syncthreads();
        copy_step(step + 1);
        const T* w1 = ring + step % kStages * 2 * kWeight;
        const T* w2t = w1 + kWeight;

        float z[2][4], da[2][4] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float* b1 = p.b1 + step * kHidden + j * 8 + lane % 4 * 2;
            z[j][0] = z[j][2] = b1[0];
            z[j][1] = z[j][3] = b1[1];
        }
#pragma unroll 4
        for (int k = 0; k < rows; k += 16) {
            uint32_t a[4], b[4];
            load_channels_by_tokens(a, n_tile, block, k);
            load_columns(b, w1, kPitch, 0, k, lane);
            multiply_add<T>(z[0], a, b[0], b[1]);
            multiply_add<T>(z[1], a, b[2], b[3]);
            load_channels_by_tokens(a, g_tile, block, k);
            load_columns(b, w2t, kPitch, 0, k, lane);
            multiply_add<T>(da[0], a, b[0], b[1]);
            multiply_add<T>(da[1], a, b[2], b[3]);
        }

#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const GeluGradient gelu = gelu_and_slope(z[j][i], p.tanh);
                z[j][i] = gelu.a;
                da[j][i] *= gelu.slope;
            }
        }
        if (noise.dropout()) {
            const KeptFactors<8> kept([&](int i) {
                const int d = step * kHidden + i / 4 * 8 + lane % 4 * 2 + i % 2;
                return noise.kept_hidden(d, channel + i % 4 / 2 * 8, block.image);
            });
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                z[i / 4][i % 4] *= kept[i];
                da[i / 4][i % 4] *= kept[i];
            }
        }
        uint32_t dz[4];
        as_matrix_a<T>(dz, da[0], da[1]);
#pragma unroll
        for (int m = 0; m < S_PAD / 16; ++m) {
            if (m * 16 >= S) break;
            uint32_t b[4];
            load_columns_transposed(b, w1, kPitch, m * 16, 0, lane);
            multiply_add<T>(dn[2 * m], dz, b[0], b[1]);
            if (m * 16 + 8 < S) multiply_add<T>(dn[2 * m + 1], dz, b[2], b[3]);
        }

        const int d = step * kHidden + lane / 2;
        const int64_t offset = (block.image * p.D_S + d) * p.size.C + c;
        float v[8];
        if (p.a) {
            transpose_through(staging, z[0], z[1], lane, v);
            if (d < p.D_S && valid > 0) store8(p.a, p.type, offset, valid, v);
        }
        if (p.dz) {
            transpose_through(staging, da[0], da[1], lane, v);
            if (d < p.D_S && valid > 0) store8(p.dz, p.type, offset, valid, v);
        }
    }
    copy_async_wait<0>();

#pragma unroll
    for (int m = 0; m < S_PAD / 16; ++m) {
        if (m * 16 >= S) break;
        float v[8];
        transpose_through(staging, dn[2 * m], dn[2 * m + 1], lane, v);
        const int s = m * 16 + lane / 2;
        if (s < S && valid > 0) store8(p.dn, p.type, (block.image * S + s) * p.size.C + c, valid, v);
    }
}

template <class T, int S_PAD>
int launch_backward(const mk_token_data_gradient_arguments& p, mk_stream stream) {
    const int warps = warps_for(p.size, p.device, BackwardTile<T, S_PAD>::shared_bytes);
    const int channels = warps * kWarpChannels;
    const int64_t blocks = p.size.B * ((p.size.C + channels - 1) / channels);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch(token_mixing_bwd_kernel<T, S_PAD>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                  BackwardTile<T, S_PAD>::shared_bytes(channels), stream, p, Noise(p.noise));
}

template <class T>
int dispatch(const mk_token_data_gradient_arguments& p, mk_stream stream) {
    switch (p.S_pad) {
        case 64:
            return launch_backward<T, 64>(p, stream);
        case 208:
            return launch_backward<T, 208>(p, stream);
        case 256:
            return launch_backward<T, 256>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_token_data_gradient(const mk_token_data_gradient_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_token_data_gradient_arguments& p = *arguments;
    if (p.size.S > p.S_pad || p.D % MK_HIDDEN_MULTIPLE != 0) return cudaErrorInvalidValue;
    return p.type == MK_BFLOAT16  ? dispatch<bfloat16>(p, stream)
           : p.type == MK_FLOAT16 ? dispatch<float16>(p, stream)
                                  : static_cast<int>(cudaErrorInvalidValue);
}
