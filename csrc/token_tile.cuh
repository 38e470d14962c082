// What the fused token-mixing kernels share: tiles of channels by tokens in shared memory, and their fragments.
//
// A warp owns 16 channels of one image and all tokens. Channels lie on the rows of every product, so that a tile of
// x [S, C] is read as it lies in memory: matrix A is loaded transposed from [tokens, channels].
#pragma once

#include "device/copy.cuh"
#include "device/matrix.cuh"
#include "device/noise.cuh"
#include "device/numbers.cuh"
#include "device/platform.cuh"
#include "mixer_kernels.h"

namespace mixer_kernels {

constexpr int kPadding = 8;        // elements between rows: a row is an odd number of 16 bytes, free of bank conflicts
constexpr int kWarpChannels = 16;  // rows of a matrix product's tile
constexpr int kStagingPitch = 20;  // floats to a row of a warp's staging area
constexpr int kStagingFloats = 16 * kStagingPitch;

__device__ __forceinline__ constexpr int align16(int n) { return (n + 15) / 16 * 16; }

// Warps to a block: as many as the channels, the shared memory and a block for every multiprocessor allow, since more
// channels to a block are less traffic of weights from L2.
template <class SharedBytes>
int warps_for(const mk_size& size, const mk_device& device, SharedBytes shared_bytes) {
    constexpr int kChoices[] = {8, 4, 3, 2};
    const size_t limit = device.shared_memory > 0 ? device.shared_memory : 99 * 1024;  // of sm_86, sm_89 and sm_120
    for (const int warps : kChoices) {
        const int channels = warps * kWarpChannels;
        const int64_t blocks = size.B * ((size.C + channels - 1) / channels);
        const bool wasted = channels / 2 >= size.C, idle = blocks < device.multiprocessors;
        if (shared_bytes(channels) <= limit && !wasted && !idle) return warps;
    }
    return 2;
}

// The channels of one image that a block owns, and the lanes' places in a fragment.
struct TokenBlock {
    int64_t image;
    int c0, channels;  // first channel; channels to a block
    int warp, lane;

    __device__ __forceinline__ explicit TokenBlock(int C) {
        channels = static_cast<int>(blockDim.x) / 32 * kWarpChannels;
        const unsigned tiles = (C + channels - 1) / channels;
        image = blockIdx.x / tiles;
        c0 = static_cast<int>(blockIdx.x % tiles) * channels;
        warp = static_cast<int>(threadIdx.x) / 32;
        lane = static_cast<int>(threadIdx.x) % 32;
    }
    __device__ __forceinline__ int pitch() const { return channels + kPadding; }
};

// Which 8 channels of which token a thread takes of a tile: neighbouring threads are neighbours in memory, whichever
// axis is contiguous.
struct TilePlace {
    int s, c;
    __device__ __forceinline__ TilePlace(int index, int octets, int rows, bool channels_contiguous) {
        s = channels_contiguous ? index / octets : index % rows;
        c = (channels_contiguous ? index % octets : index / rows) * 8;
    }
};

template <class T>
__device__ __forceinline__ void store_octet(T* destination, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(destination) =
        make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// tile [rows, channels] = LN(x) of the block's channels, zero outside the image: equation (2).
template <class T>
__device__ __forceinline__ void load_normalised(T* tile, const mk_input& x, const mk_norm& norm, const mk_size& size,
                                                const TokenBlock& block, int rows) {
    const int octets = block.channels / 8;
    for (int index = threadIdx.x; index < rows * octets; index += blockDim.x) {
        const TilePlace at(index, octets, rows, x.stride_c == 1);
        const int c = block.c0 + at.c, valid = min(size.C - c, 8);
        float v[8] = {};
        if (at.s < size.S && valid > 0) {
            load8(x.data, x.type, block.image * x.stride_b + at.s * x.stride_s + c * x.stride_c, x.stride_c, valid, v);
            const int64_t row = block.image * size.S + at.s;
            const float mean = norm.mean[row], rstd = norm.rstd[row];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= valid) break;
                const float gamma = norm.gamma ? norm.gamma[c + i] : 1.0f, beta = norm.beta ? norm.beta[c + i] : 0.0f;
                v[i] = (v[i] - mean) * rstd * gamma + beta;
            }
        }
        store_octet(tile + at.s * block.pitch() + at.c, v);
    }
}

// tile [rows, channels] = the block's channels of g [B, S, C], contiguous; zero outside the image.
template <class T>
__device__ __forceinline__ void load_gradient(T* tile, const void* g, mk_type type, const mk_size& size,
                                              const TokenBlock& block, int rows) {
    const int octets = block.channels / 8;
    for (int index = threadIdx.x; index < rows * octets; index += blockDim.x) {
        const TilePlace at(index, octets, rows, true);
        const int c = block.c0 + at.c, valid = min(size.C - c, 8);
        float v[8] = {};
        if (at.s < size.S && valid > 0) load8(g, type, (block.image * size.S + at.s) * size.C + c, 1, valid, v);
        store_octet(tile + at.s * block.pitch() + at.c, v);
    }
}

// Rows [first, first + ROWS) and columns [c0, c0 + COLUMNS) of a packed weight, by asynchronous copies of 16 bytes;
// rows and columns from `rows` and `columns` on are left out.
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void copy_weight(T* tile, const T* weight, int64_t stride, int rows, int columns) {
    constexpr int kOctets = COLUMNS / 8;
    for (int index = threadIdx.x; index < ROWS * kOctets; index += blockDim.x) {
        const int row = index / kOctets, column = index % kOctets * 8;
        if (row < rows && column < columns) {
            copy_async_16(tile + row * (COLUMNS + kPadding) + column, weight + row * stride + column, 16);
        }
    }
}

// Matrix A, 16 channels by 16 tokens, of a tile [tokens, channels].
template <class T>
__device__ __forceinline__ void load_channels_by_tokens(uint32_t (&a)[4], const T* tile, const TokenBlock& block,
                                                        int token) {
    const int row = token + block.lane % 8 + block.lane / 16 * 8;
    const int column = block.warp * kWarpChannels + block.lane / 8 % 2 * 8;
    load_matrices_x4_transposed(a, tile + row * block.pitch() + column);
}

// Matrices B, 16 deep, for two tiles of 8 columns, of a tile [columns, depth]: registers {0, 1} and {2, 3}.
template <class T>
__device__ __forceinline__ void load_columns(uint32_t (&b)[4], const T* tile, int pitch, int column, int depth,
                                             int lane) {
    load_matrices_x4(b, tile + (column + lane / 16 * 8 + lane % 8) * pitch + depth + lane / 8 % 2 * 8);
}

// The same of a tile [depth, columns].
template <class T>
__device__ __forceinline__ void load_columns_transposed(uint32_t (&b)[4], const T* tile, int pitch, int column,
                                                        int depth, int lane) {
    load_matrices_x4_transposed(b, tile + (depth + lane / 8 % 2 * 8 + lane % 8) * pitch + column + lane / 16 * 8);
}

// Matrix A, 16 by 16, of the accumulators of two neighbouring tiles of 8 columns.
template <class T>
__device__ __forceinline__ void as_matrix_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack<T>(left[0], left[1]);
    a[1] = pack<T>(left[2], left[3]);
    a[2] = pack<T>(right[0], right[1]);
    a[3] = pack<T>(right[2], right[3]);
}

// Turns the accumulators of 16 channels by 16 columns into 8 consecutive channels of one column a lane, through the
// warp's staging area: column lane / 2, channels from lane % 2 * 8 on.
__device__ __forceinline__ void transpose_through(float* staging, const float (&left)[4], const float (&right)[4],
                                                  int lane, float (&v)[8]) {
    const int channel = lane / 4, column = lane % 4 * 2;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = (column + i % 2) * kStagingPitch + channel + i / 2 * 8;
        staging[at] = left[i];
        staging[at + 8 * kStagingPitch] = right[i];
    }
    __syncwarp();
    const float4* row = reinterpret_cast<const float4*>(staging + lane / 2 * kStagingPitch + lane % 2 * 8);
    const float4 low = row[0], high = row[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

}  // namespace mixer_kernels
