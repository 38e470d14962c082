// What the fused token-mixing kernels share: tiles of channels by tokens in shared memory, and their fragments.
//
// A warp owns 16 channels of one image and all tokens. Channels lie on the rows of every product, so that a tile of
// x [S, C] is read as it lies in memory: matrix A is loaded transposed from [tokens, channels].
#pragma once

#include <type_traits>

#include "device/copy.cuh"
#include "device/keep.cuh"
#include "device/matrix.cuh"
#include "device/noise.cuh"
#include "device/numbers.cuh"
#include "device/platform.cuh"
#include "mixer_kernels.h"
#include "stream.cuh"

namespace mixer_kernels {

constexpr int kPadding = 8;        // elements between rows: a row is an odd number of 16 bytes, free of bank conflicts
constexpr int kWarpChannels = 16;  // rows of a matrix product's tile
constexpr int kStagingPitch = 20;  // floats to a row of a warp's staging area
constexpr int kStagingFloats = 16 * kStagingPitch;
constexpr int kGroup = 16;  // hidden units that a warp takes at a time

// The token axis as tiles of 8 and, where it is summed over, of 16 tokens. How many is a constant, so that the loops
// over them are straight code.
template <int TILES>
struct Tokens {
    static constexpr int kTiles16 = (TILES + 1) / 2, kPadded = 16 * kTiles16;
    static constexpr int kBlocks = kPadded > 64 ? 1 : 2;  // to a multiprocessor, at least: bounds the registers
};

// The numbers of tiles that kernels are compiled for, among them those of 7 x 7, 14 x 14 and 16 x 16 tokens: 7, 25, 32.
// Other token counts take the next.
constexpr int kTokenTiles[] = {4, 7, 8, 14, 18, 25, 32};
constexpr int kMostTokens = 256;

// run(TILES) for S tokens, with TILES as a constant.
template <int I = 0, class RUN>
int with_token_tiles(int S, RUN run) {
    if constexpr (I == sizeof(kTokenTiles) / sizeof(kTokenTiles[0])) {
        return cudaErrorInvalidValue;
    } else {
        if (S <= 8 * kTokenTiles[I]) return run(std::integral_constant<int, kTokenTiles[I]>());
        return with_token_tiles<I + 1>(S, run);
    }
}

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

    __device__ __forceinline__ explicit TokenBlock(int C) : TokenBlock(C, blockIdx.x, threadIdx.x) {}
    // The same, computed again: registers are free of it until then.
    __device__ __forceinline__ TokenBlock again(int C) const {
        int block = blockIdx.x, thread = threadIdx.x;
        keep(block);
        keep(thread);
        return TokenBlock(C, block, thread);
    }
    __device__ __forceinline__ int pitch() const { return channels + kPadding; }

  private:
    __device__ __forceinline__ TokenBlock(int C, unsigned block, int thread) {
        channels = static_cast<int>(blockDim.x) / 32 * kWarpChannels;
        const unsigned tiles = (C + channels - 1) / channels;
        image = block / tiles;
        c0 = static_cast<int>(block % tiles) * channels;
        warp = thread / 32;
        lane = thread % 32;
    }
};

template <class T>
__device__ __forceinline__ void store_octet(T* destination, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(destination) =
        make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// v[i] = vector[i] for i < valid, 16-byte aligned where all 8 are; 0 for the others, or otherwise without a vector.
__device__ __forceinline__ void load_affine(const float* vector, int valid, float otherwise, float (&v)[8]) {
    if (vector != nullptr) {
        load8(vector, MK_FLOAT32, 0, 1, valid, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = otherwise;
}

// LN(x), equation (2), 8 channels of a token at a time.
template <class T>
class NormalisedReader {
  public:
    struct Fetched {
        Chunk x;
        float mean, rstd;
    };
    __device__ __forceinline__ NormalisedReader(const Stream& x, const mk_input& strides, const mk_norm& norm,
                                                const mk_size& size, int64_t image)
        : x_(x), norm_(norm), stride_s_(strides.stride_s), offset_(image * strides.stride_b), row_(image * size.S) {}

    __device__ __forceinline__ void set_channels(int c, int valid) {
        c_ = c;
        valid_ = valid;
        load_affine(norm_.gamma ? norm_.gamma + c : nullptr, valid, 1.0f, gamma_);
        load_affine(norm_.beta ? norm_.beta + c : nullptr, valid, 0.0f, beta_);
    }
    __device__ __forceinline__ Fetched fetch(int s) const {
        return {x_.fetch(offset(s), valid_), norm_.mean[row_ + s], norm_.rstd[row_ + s]};
    }
    __device__ __forceinline__ void read(const Fetched& fetched, int s, float (&v)[8]) const {
        x_.read<T>(fetched.x, offset(s), valid_, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = i < valid_ ? (v[i] - fetched.mean) * fetched.rstd * gamma_[i] + beta_[i] : 0.0f;
        }
    }

  private:
    __device__ __forceinline__ int64_t offset(int s) const { return offset_ + s * stride_s_ + c_ * x_.stride_c; }

    const Stream& x_;
    const mk_norm& norm_;
    int64_t stride_s_, offset_, row_;
    int c_ = 0, valid_ = 0;
    float gamma_[8], beta_[8];
};

// g [B, S, C], contiguous.
template <class T>
class GradientReader {
  public:
    using Fetched = Chunk;
    __device__ __forceinline__ GradientReader(const Stream& g, const mk_size& size, int64_t image)
        : g_(g), C_(size.C), offset_(image * size.S * size.C) {}

    __device__ __forceinline__ void set_channels(int c, int valid) {
        c_ = c;
        valid_ = valid;
    }
    __device__ __forceinline__ Fetched fetch(int s) const { return g_.fetch(offset(s), valid_); }
    __device__ __forceinline__ void read(const Fetched& fetched, int s, float (&v)[8]) const {
        g_.read<T>(fetched, offset(s), valid_, v);
    }

  private:
    __device__ __forceinline__ int64_t offset(int s) const { return offset_ + int64_t{s} * C_ + c_; }

    const Stream& g_;
    int C_;
    int64_t offset_;
    int c_ = 0, valid_ = 0;
};

// tile [ROWS, channels] = what a reader has of the block's channels; zero outside the image. Neighbouring threads are
// neighbours in memory, whichever axis is contiguous.
template <int ROWS, class T, class READER>
__device__ __forceinline__ void fill_tile(T* tile, READER reader, const mk_size& size, const TokenBlock& block,
                                          bool channels_contiguous) {
    const int octets = block.channels / 8;
    if (channels_contiguous) {
        // The threads take all channels of 16 tokens at once: each keeps its channels, and half of its tokens' loads
        // are under way together.
        constexpr int kBatch = (ROWS / 16 + 1) / 2;
        const int first = static_cast<int>(threadIdx.x) / octets, c = static_cast<int>(threadIdx.x) % octets * 8;
        const int valid = min(size.C - block.c0 - c, 8);
        reader.set_channels(block.c0 + c, valid);
#pragma unroll 1
        for (int batch = first; batch < ROWS; batch += 16 * kBatch) {
            typename READER::Fetched fetched[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (batch + 16 * i < size.S && valid > 0) fetched[i] = reader.fetch(batch + 16 * i);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int s = batch + 16 * i;
                if (s >= ROWS) break;
                float v[8] = {};
                if (s < size.S && valid > 0) reader.read(fetched[i], s, v);
                store_octet(tile + s * block.pitch() + c, v);
            }
        }
        return;
    }
    for (int index = threadIdx.x; index < ROWS * octets; index += blockDim.x) {
        const int s = index % ROWS, c = index / ROWS * 8, valid = min(size.C - block.c0 - c, 8);
        float v[8] = {};
        if (s < size.S && valid > 0) {
            reader.set_channels(block.c0 + c, valid);
            reader.read(reader.fetch(s), s, v);
        }
        store_octet(tile + s * block.pitch() + c, v);
    }
}

// tile [ROWS, COLUMNS] = the first of a packed weight, by asynchronous copies of 16 bytes.
template <int ROWS, int COLUMNS, class T>
__device__ __forceinline__ void copy_weight(T* tile, const T* weight, int64_t stride) {
    constexpr int kOctets = COLUMNS / 8;
    for (int index = threadIdx.x; index < ROWS * kOctets; index += blockDim.x) {
        const int row = index / kOctets, column = index % kOctets * 8;
        copy_async_16(tile + row * (COLUMNS + kPadding) + column, weight + row * stride + column, 16);
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
