// The products of sm_90a: their tiles, what kernels take, how a block's shared memory is laid out and which tiles it
// has.
#pragma once

#include <type_traits>

#include "../device/noise.cuh"
#include "../device/warpgroup.cuh"

namespace mixer_kernels {
namespace sm90 {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kStep = 64, kStepBytes = 2 * kStep;  // of a row of a stage: as wide as the swizzle
static_assert(MK_K_MULTIPLE == kStep, "weights are zero-padded to whole steps");
constexpr int kBlockRows = 64;  // of a product of wgmma
constexpr int kTileRows = 128;
constexpr int kChunk = 64, kChunkBytes = 2 * kChunk * kChunk;
constexpr int kSwizzleAlignment = 1024;
constexpr int kSharedBytes = 227 << 10;  // what a block may have
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <bool ping_pong, int columns>
struct Tile {
    static constexpr bool kPingPong = ping_pong;
    static constexpr int kColumns = columns;
    static constexpr int kRowBlocks = ping_pong ? 2 : 1;  // of a consumer
    static constexpr int kConsumerRows = kRowBlocks * kBlockRows;
    static constexpr int kChunksAcross = columns / kChunk, kChunks = kRowBlocks * kChunksAcross;  // of a consumer
    using Accumulators = float[kRowBlocks][columns / 2];
};

// Of mk_sm90_tile.
using WideTile = Tile<false, 256>;
using PingPongTile = Tile<true, 128>;
using WidePingPongTile = Tile<true, 192>;
using NarrowTile = Tile<false, 64>;

// What an epilogue needs to know of a row.
struct alignas(16) RowTerms {
    float x, y;  // the epilogue's own
    int token, image;
};

// How it leaves numbers: without dropout in GELU's erf or tanh form, with dropout in either.
enum class Form { erf, tanh, dropout };
template <Form form>
using AsForm = std::integral_constant<Form, form>;

// An epilogue is a class that kernels take by value, with
//   kVectors     how many vectors [N] it reads, vector(i) or, where that is null, otherwise(i)
//   kLoads       whether chunks of a matrix [M, N] are loaded, to be changed in place
//   kExtra       chunks in shared memory beyond those that come and leave
//   kScratch     bytes of shared memory of a consumer for itself
//   row(m)       RowTerms
//   noise()
//   in_form(f)   calls f(AsForm<form>()) for the form of the run
//   finish<form>(d, chunk, p, corner, number, scratch, results)   finishes a chunk, `number` of its tile: see Results
template <class EPILOGUE>
struct Product {
    TensorMap left, right;    // boxes of a stage
    TensorMap loaded;         // boxes of a chunk
    TensorMap stored, other;  // the same
    int M, N, steps, S;       // steps along K
    int cluster;              // 1 or 2 blocks
    int row_tiles, column_tiles;
    EPILOGUE epilogue;
};

// A block's shared memory: offsets from a multiple of kSwizzleAlignment.
template <class EPILOGUE, class TILE>
struct Layout {
    static constexpr int kLeft = kTileRows * kStepBytes, kStage = kLeft + TILE::kColumns * kStepBytes;
    // Chunks of a consumer that come or leave at a time. Those that come do so while others are finished.
    static constexpr int kSlots =
        EPILOGUE::kLoads && TILE::kChunks > 1 && (EPILOGUE::kExtra == 0 || TILE::kPingPong) ? 3 : 2;
    static constexpr int kChunks = kSlots + EPILOGUE::kExtra;
    static constexpr int kRowTerms = TILE::kConsumerRows * static_cast<int>(sizeof(RowTerms));
    static constexpr int kTerms = kRowTerms + EPILOGUE::kVectors * TILE::kColumns * 4 + EPILOGUE::kScratch;
    static constexpr int kOfConsumers = kConsumers * (kChunks * kChunkBytes + kTerms);
    static constexpr int kMostStages = 6, kBarrierBytes = (2 * kMostStages + kConsumers * kSlots) * 8;
    static constexpr int kRoom = (kSharedBytes - kSwizzleAlignment - kOfConsumers - kBarrierBytes) / kStage;
    static constexpr int kStages = kRoom < kMostStages ? kRoom : kMostStages;
    static_assert(kStages >= 3);

    static constexpr int kChunksAt = kStages * kStage;
    static constexpr int kTermsAt = kChunksAt + kConsumers * kChunks * kChunkBytes;
    static constexpr int kBarriersAt = kTermsAt + kConsumers * kTerms;
    static constexpr int kBytes = kSwizzleAlignment + kBarriersAt + kBarrierBytes;
};

// ------------------------------------------------------------------------------------------------------------ schedule

struct Corner {  // a tile's first row and column
    int m, n;
};

// Which tiles a block has, one after the other: first, first + stride, ... below count. Groups of rows of tiles sweep
// all columns before the next group, so that both operands are found in L2.
template <class TILE>
class Walk {
  public:
    template <class EPILOGUE>
    __device__ __forceinline__ explicit Walk(const Product<EPILOGUE>& p)
        : first(static_cast<int>(blockIdx.x) >> (p.cluster - 1)),
          stride(static_cast<int>(gridDim.x) >> (p.cluster - 1)),
          count(p.row_tiles * p.column_tiles),
          rank_(static_cast<int>(blockIdx.x) & (p.cluster - 1)),
          height_(kTileRows * p.cluster),
          row_tiles_(p.row_tiles),
          column_tiles_(p.column_tiles) {}

    __device__ __forceinline__ Corner corner(int tile) const {
        const int group_tiles = kRowTilesToAGroup * column_tiles_;
        const int group = tile / group_tiles, within = tile - group * group_tiles;
        const int above = group * kRowTilesToAGroup;
        const int height = min(row_tiles_ - above, kRowTilesToAGroup);
        return {(above + within % height) * height_ + rank_ * kTileRows, within / height * TILE::kColumns};
    }

    // The steps of a tile along K: none where stochastic depth drops all images of the cluster's tiles, for there the
    // branch is multiplied by 0, or its gradient is 0.
    template <class EPILOGUE>
    __device__ __forceinline__ int steps(const Product<EPILOGUE>& p, int tile) const {
        const Noise& noise = p.epilogue.noise();
        if (!noise.drop_path()) return p.steps;
        const int above = corner(tile).m - rank_ * kTileRows;
        int image = above / p.S, rows = min(above + height_, p.M) - image * p.S;  // from the image's first on
#pragma unroll 1
        for (; rows > 0; rows -= p.S, ++image) {
            if (noise.kept_image(image) != 0.0f) return p.steps;
        }
        return 0;
    }

    int first, stride, count;

  private:
    static constexpr int kRowTilesToAGroup = 8;
    int rank_, height_, row_tiles_, column_tiles_;
};

// A place in the ring. Its barriers: full, empty of stage 0, full, empty of stage 1, ...
template <int stages>
struct RingPlace {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void skip(int steps) {
        const int to = stage + steps;
        stage = to % stages;
        parity ^= to / stages & 1;
    }
};

}  // namespace sm90
}  // namespace mixer_kernels
