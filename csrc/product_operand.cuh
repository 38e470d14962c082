// The operands of a matrix product: how a block's share of them comes to shared memory, stage by stage along K.
//
// An operand of 16-bit numbers whose rows start on 16 bytes goes straight to shared memory by cp.async. Any other is
// read element by element, or loaded ahead into registers, normalised, rounded to 16 bits and stored from there. A tile
// lies in shared memory as it does in memory, contiguous along K or along the other axis; ldmatrix transposes the
// latter.
#pragma once

#include "device/copy.cuh"
#include "device/keep.cuh"
#include "device/numbers.cuh"
#include "device/platform.cuh"
#include "stream.cuh"

namespace mixer_kernels {

constexpr int kStep = 32;  // elements along K to a stage

// A block's tile: 4 warps, warps_n of them side by side, of row_fragments x column_fragments products of 16 x 8.
template <int row_fragments, int column_fragments, int stages, int blocks, int warps_n = 2>
struct ProductTile {
    static constexpr int kRowFragments = row_fragments, kColumnFragments = column_fragments, kStages = stages;
    static constexpr int kBlocks = blocks;  // to a multiprocessor, at least: bounds the registers
    static constexpr int kThreads = 128, kWarps = 4, kWarpsN = warps_n;
    static constexpr int kWarpM = 16 * row_fragments, kWarpN = 8 * column_fragments;
    static constexpr int kM = kWarps / warps_n * kWarpM, kN = warps_n * kWarpN;
    static constexpr int kLeft = kM * kStep, kStage = kLeft + kN * kStep;  // elements
    static constexpr int kPitch = kWarpN + 8;  // of a warp's 16 rows of results: 8 apart, 4 rows take all banks
    static constexpr int kOver = column_fragments % 2 * 8 * kStep;  // rows that lanes of an ldmatrix point at in vain
    static constexpr size_t kRing = 2 * (kStages * kStage + kOver), kResults = sizeof(float) * kWarps * 16 * kPitch;
    static constexpr size_t kSharedBytes = kRing > kResults ? kRing : kResults;
    using Accumulators = float[row_fragments][column_fragments][4];
};

using LargeTile = ProductTile<4, 8, 3, 2>;      // 128 x 128; 48 KB: two blocks fit where a multiprocessor has 100 KB
using SmallTile = ProductTile<2, 4, 4, 3>;      // 64 x 64; 32 KB
using TokenTile = ProductTile<2, 13, 3, 2, 1>;  // 128 x 104, of which two are 208: little more than 14 x 14 tokens

// Index of a chunk of 8 elements in a tile whose rows have kStep, or row_elements, of them. Eight rows apart by one and
// the same chunk, what an 8 x 8 matrix of ldmatrix takes, lie in different banks.
__device__ __forceinline__ int chunk_along_k(int row, int chunk) { return row * kStep + (chunk ^ (row / 2 % 4)) * 8; }

template <int row_elements>
__device__ __forceinline__ int chunk_across_k(int row, int chunk) {
    return row * row_elements + (chunk ^ (row % 8)) * 8;
}

__host__ __device__ __forceinline__ int64_t tiles(int64_t length, int tile) { return (length + tile - 1) / tile; }

// ------------------------------------------------------------------------------------------------- tensors as they lie

// The stride from image to image; of one image, what gives all its rows one stride.
inline int64_t batch_stride(const mk_input& x, const mk_size& size) {
    return size.B > 1 ? x.stride_b : size.S * x.stride_s;
}

// Rows of a tile, in a tensor of rows [B, S] or of rows of one stride. Rows past the last are not there.
class TileRows {
  public:
    // Rows from the start of the tensor on.
    __device__ __forceinline__ TileRows(int64_t stride, int64_t rows_left, int tile_rows)
        : stride_s_(stride), last_(last(rows_left, tile_rows)) {}

    // Rows from first on, of B * S.
    __device__ __forceinline__ TileRows(int64_t stride_b, int64_t stride_s, int S, int64_t first, int64_t rows_left,
                                        int tile_rows)
        : stride_b_(stride_b),
          stride_s_(stride_s),
          start_(first * stride_s),
          image_(first / S),
          token_(static_cast<uint32_t>(first % S)),
          S_(S),
          has_one_stride_(stride_b == S * stride_s),
          last_(last(rows_left, tile_rows)) {}

    __device__ __forceinline__ int last() const { return last_; }
    __device__ __forceinline__ bool has_one_stride() const { return has_one_stride_; }
    __device__ __forceinline__ bool has(int row) const { return row <= last_; }
    __device__ __forceinline__ int64_t stride() const { return stride_s_; }
    __device__ __forceinline__ int64_t image(int row) const { return image_ + (token_ + row) / S_; }
    __device__ __forceinline__ int token(int row) const { return static_cast<int>((token_ + row) % S_); }
    // From the start of the tensor.
    __device__ __forceinline__ int64_t offset(int row) const {
        return has_one_stride_ ? start_ + row * stride_s_ : image(row) * stride_b_ + token(row) * stride_s_;
    }

  private:
    __device__ __forceinline__ static int last(int64_t rows_left, int tile_rows) {
        return (rows_left < tile_rows ? static_cast<int>(rows_left) : tile_rows) - 1;
    }

    int64_t stride_b_ = 0, stride_s_, start_ = 0, image_ = 0;
    uint32_t token_ = 0, S_ = 1;
    bool has_one_stride_ = true;
    int last_;
};

// ------------------------------------------------------------------------------------------------------------ operands

// Where along K a stage lies: elements from k on, of which left are there, of an image.
struct Depth {
    int64_t image;
    int k, left;
};

// The sum over 0 to K of one image (counted 0: operands start at it).
class DepthOfProduct {
  public:
    explicit __device__ __forceinline__ DepthOfProduct(int K) : left_(K) {}
    __device__ __forceinline__ bool more() const { return left_ > 0; }
    __device__ __forceinline__ Depth at() const { return {0, k_, left_}; }
    __device__ __forceinline__ void next() {
        k_ += kStep;
        left_ -= kStep;
    }

  private:
    int k_ = 0, left_;
};

// How an operand comes, known when compiled. kCopied: by cp.async. kCopiedOrRead: so, or element by element as it is
// put. kLoaded: into registers ahead, and normalised.
enum class Access { kCopied, kCopiedOrRead, kLoaded };

// LayerNorm of an operand, and where in its vectors a tile starts.
struct TileNorm {
    mk_norm norm{};
    int64_t row = 0, S = 0;  // of statistics: the first one, and how many to an image
    int channel = 0;         // across K
};

// A block's share of an operand: outer rows (of M or N) by kStep. along_k: channels lie along K, else across it. What
// is not there along K is 0; what is not there of the outer rows may be anything, for its results are not stored.
template <class T, class TILE, int outer, bool along_k, Access access>
class Operand {
  public:
    // rows: along K the outer ones, across it those along K, with only their stride used. columns_left: across K,
    // channels from the start of the tile. copied: the tensor is in T and has vectors.
    __device__ __forceinline__ Operand(const Stream& stream, const TileRows& rows, int64_t stride_image,
                                       int columns_left, const TileNorm& norm, bool copied)
        : stream_(stream),
          rows_(rows),
          stride_image_(stride_image),
          columns_left_(columns_left),
          norm_(norm),
          copied_(access == Access::kCopied || (access == Access::kCopiedOrRead && copied)) {
        const bool whole_chunks = along_k ? rows.has_one_stride() : columns_left >= outer || columns_left % 8 == 0;
        fast_ = whole_chunks && (access == Access::kLoaded ? stream.has_vectors : copied_);
        from_ = stream.address(rows.offset(row(0)) + 8 * chunk());
        pass_bytes_ = rows.stride() * kRowsAtOnce * element_bytes();
        keep(from_);
        keep(pass_bytes_);
        place_ = along_k ? chunk_along_k(row(0), chunk()) : chunk_across_k<outer>(row(0), chunk());
        keep(place_);
    }

    // Starts loading what the next put will store.
    __device__ __forceinline__ void fetch(const Depth& depth) {
        if constexpr (access == Access::kLoaded) {
            if (is_fast(depth)) {
                const char* from = fast_address(depth);
#pragma unroll
                for (int i = 0; i < kPasses; ++i) {
                    if (has_chunk(i)) ahead_[i] = stream_.load_vectors(from);
                    from += pass_bytes_;
                }
            }
            const int row = row_of_lane(threadIdx.x % 32);
            if (along_k ? rows_.has(row) : row < depth.left) {
                const int64_t at = norm_.row + depth.image * norm_.S + (along_k ? 0 : depth.k) + row;
                mean_ = norm_.norm.mean[at];
                rstd_ = norm_.norm.rstd[at];
            }
        }
    }

    __device__ __forceinline__ void put(T* tile, const Depth& depth) {
        tile += place_;
        if (!is_fast(depth)) {
            put_any(tile, depth);
            return;
        }
        if constexpr (access == Access::kLoaded) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // of the channels: gamma and beta of all 8 were too many registers
                float gamma[4], beta[4];
                load_affine(depth, half, gamma, beta);
#pragma unroll
                for (int i = 0; i < kPasses; ++i) {
                    float v[4];
                    stream_.unpack4<T>(ahead_[i], half, v);
                    normalise(v, i, gamma, beta);
                    if (!is_of_tile(i)) continue;
                    *reinterpret_cast<uint2*>(tile + i * kPassElements + 4 * half) = {pack<T>(v[0], v[1]),
                                                                                      pack<T>(v[2], v[3])};
                }
            }
        } else {
            const char* from = fast_address(depth);
#pragma unroll
            for (int i = 0; i < kPasses; ++i) {
                if (has_chunk(i)) copy_async_16(tile + i * kPassElements, from, 16);
                from += pass_bytes_;
            }
        }
    }

  private:
    static constexpr int kChunks = (along_k ? kStep : outer) / 8;  // of a row
    static constexpr int kRowsAtOnce = TILE::kThreads / kChunks, kRows = along_k ? outer : kStep,
                         kPasses = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
    static constexpr int kPassElements = kRowsAtOnce * kChunks * 8;
    static_assert(kRowsAtOnce % 8 == 0, "the rows of a thread have their chunks at the same place");
    static constexpr int kWarpRows = 32 / kChunks;  // at once
    static_assert(kWarpRows * kPasses <= 32, "a lane for each row");
    static constexpr int kAhead = access == Access::kLoaded ? kPasses : 1;

    __device__ __forceinline__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
    __device__ __forceinline__ static int row(int pass) {
        return static_cast<int>(threadIdx.x) / kChunks + pass * kRowsAtOnce;
    }
    // The last pass may go past the tile.
    __device__ __forceinline__ static bool is_of_tile(int pass) {
        return kRows % kRowsAtOnce == 0 || row(pass) < kRows;
    }
    // Lane i holds the statistics of its warp's row i.
    __device__ __forceinline__ static int row_of_lane(int lane) {
        const int warp = threadIdx.x / 32;
        return warp * kWarpRows + lane % kWarpRows + lane / kWarpRows % kPasses * kRowsAtOnce;
    }
    __device__ __forceinline__ static int lane_of_row(int pass) {
        return static_cast<int>(threadIdx.x) % 32 / kChunks + pass * kWarpRows;
    }

    // Whether all along K is there, in whole chunks that lie at one stride.
    __device__ __forceinline__ bool is_fast(const Depth& depth) const { return fast_ && depth.left >= kStep; }
    __device__ __forceinline__ int element_bytes() const {
        return access == Access::kLoaded ? stream_.element_bytes() : static_cast<int>(sizeof(T));
    }
    __device__ __forceinline__ const char* fast_address(const Depth& depth) const {
        const int64_t k = along_k ? depth.k : depth.k * rows_.stride();
        return from_ + (depth.image * stride_image_ + k) * element_bytes();
    }
    __device__ __forceinline__ bool has_chunk(int pass) const {
        return along_k ? rows_.has(row(pass)) : 8 * chunk() < columns_left_;
    }

    // Element by element, if they cannot be copied.
    __device__ __forceinline__ void put_any(T* tile, const Depth& depth) {
        const int left = (along_k ? depth.left : columns_left_) - 8 * chunk();
#pragma unroll 1
        for (int i = 0; i < kPasses; ++i) {
            if (!is_of_tile(i)) break;
            const bool is_there = along_k ? rows_.has(row(i)) : row(i) < depth.left;
            const int valid = !is_there || left < 0 ? 0 : left < 8 ? left : 8;
            const int64_t k = along_k ? depth.k * stream_.stride_c : depth.k * rows_.stride();
            const int64_t offset =
                depth.image * stride_image_ + rows_.offset(row(i)) + k + 8 * chunk() * stream_.stride_c;
            T* const to = tile + i * kPassElements;
            if (access != Access::kLoaded && copied_) {
                copy_async_16(to, static_cast<const T*>(stream_.data) + (valid > 0 ? offset : 0), 2 * valid);
                continue;
            }
            if constexpr (access != Access::kCopied) {
                float v[8];
                stream_.read<T>(stream_.fetch(offset, valid), offset, valid, v);
                if constexpr (access == Access::kLoaded) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float gamma[4], beta[4],
                            n[4] = {v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]};
                        load_affine(depth, half, gamma, beta);
                        normalise(n, i, gamma, beta);
#pragma unroll
                        for (int j = 0; j < 4; ++j) v[4 * half + j] = 4 * half + j < valid ? n[j] : 0.0f;
                    }
                }
                *reinterpret_cast<uint4*>(to) = pack8<T>(v);
            }
        }
    }

    // gamma and beta of half a chunk, 1 and 0 where they are not given.
    __device__ __forceinline__ void load_affine(const Depth& depth, int half, float (&gamma)[4],
                                                float (&beta)[4]) const {
        const int first = 8 * chunk() + 4 * half;
        int channel = (along_k ? depth.k : norm_.channel) + first;
        keep(channel);  // or loads across K would be moved out of the main loop, into too many registers
        const int left = (along_k ? depth.left : columns_left_) - first;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            gamma[j] = norm_.norm.gamma != nullptr && j < left ? norm_.norm.gamma[channel + j] : 1.0f;
            beta[j] = norm_.norm.beta != nullptr && j < left ? norm_.norm.beta[channel + j] : 0.0f;
        }
    }
    __device__ __forceinline__ void normalise(float (&v)[4], int pass, const float (&gamma)[4],
                                              const float (&beta)[4]) const {
        const int lane = lane_of_row(pass);
        const float mean = __shfl_sync(~0u, mean_, lane), rstd = __shfl_sync(~0u, rstd_, lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = (v[j] - mean) * rstd * gamma[j] + beta[j];
    }

    Stream stream_;
    TileRows rows_;
    int64_t stride_image_;
    int columns_left_;
    TileNorm norm_;
    bool copied_, fast_;
    const char* from_;  // a thread's chunk of its first row
    int64_t pass_bytes_;
    int place_;  // of that chunk in the tile
    Chunk ahead_[kAhead]{};
    float mean_ = 0.0f, rstd_ = 0.0f;
};

// A weight [N, K_pad], contiguous and zero-padded to K_pad.
template <class T>
struct Weight {
    Stream stream;
    int64_t pitch;
    int N;

    Weight(const void* data, int N_, int K)
        : stream(data, type_of<T>::value, 0, 0, 1), pitch(tiles(K, MK_K_MULTIPLE) * MK_K_MULTIPLE), N(N_) {}

    template <class TILE, int outer>
    __device__ __forceinline__ Operand<T, TILE, outer, true, Access::kCopied> tile(int first) const {
        return {stream.from(first * pitch), TileRows(pitch, N - first, outer), 0, 0, {}, true};
    }
};

}  // namespace mixer_kernels
