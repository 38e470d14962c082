// What epilogues of the products of sm_90a work with: a tile's terms of rows and columns, its chunks as lanes see them,
// and their way through shared memory.
#pragma once

#include "../device/matrix.cuh"
#include "product_tile.cuh"

namespace mixer_kernels {
namespace sm90 {

// Named barriers, one of each for each consumer.
constexpr int kOwnBarrier = 1, kTurnBarrier = 3;

// What a consumer's tile is finished with: terms of its rows and columns, loaded before the product and put into shared
// memory after it, or at once if there is time.
template <class EPILOGUE, class TILE>
struct Terms {
    static constexpr int kToAThread = (TILE::kColumns + kWarpgroup - 1) / kWarpgroup;
    float columns[EPILOGUE::kVectors > 0 ? EPILOGUE::kVectors : 1][kToAThread];
    RowTerms row;

    __device__ __forceinline__ void load(const Product<EPILOGUE>& p, Corner corner, int thread) {
#pragma unroll
        for (int i = 0; i < EPILOGUE::kVectors; ++i) {
            const float* vector = p.epilogue.vector(i);
#pragma unroll
            for (int j = 0; j < kToAThread; ++j) {
                const int n = corner.n + thread + j * kWarpgroup;
                columns[i][j] = vector != nullptr && n < p.N ? vector[n] : p.epilogue.otherwise(i);
            }
        }
        const int m = corner.m + thread % TILE::kConsumerRows;
        row = m < p.M ? p.epilogue.row(m) : RowTerms{};
    }

    __device__ __forceinline__ void store(char* terms, int thread) const {
        if (thread < TILE::kConsumerRows) reinterpret_cast<RowTerms*>(terms)[thread] = row;
        float* vectors = reinterpret_cast<float*>(terms + Layout<EPILOGUE, TILE>::kRowTerms);
#pragma unroll
        for (int j = 0; j < kToAThread; ++j) {
            const int column = thread + j * kWarpgroup;
            if (column >= TILE::kColumns) break;
#pragma unroll
            for (int i = 0; i < EPILOGUE::kVectors; ++i) vectors[i * TILE::kColumns + column] = columns[i][j];
        }
    }
};

// A chunk as an epilogue sees it: a lane has two rows of it, and of each 16 columns (quarter 0 to 3) the columns 2 *
// (lane % 4), the next, and 8 and 9 on, as in accumulators.
template <class TILE>
struct Chunk {
    int m, n;              // its first row and column
    int column;            // of the lane, from n
    RowTerms rows[2];      // of the lane, 8 apart
    const float* vectors;  // from n + column on, kColumns apart

    // Elements n + column + 16 quarter + 8 half and the next of a vector.
    __device__ __forceinline__ float2 vector(int i, int quarter, int half) const {
        return *reinterpret_cast<const float2*>(vectors + i * TILE::kColumns + 16 * quarter + 8 * half);
    }

    // Dropout's factors of a quarter's elements, kept(column, token, image). In the order of accumulators: of 8 columns
    // two of a row, two of the other.
    template <class KEPT>
    __device__ __forceinline__ KeptFactors<8> factors(int quarter, KEPT kept) const {
        const int first = n + column + 16 * quarter;
        return KeptFactors<8>([&](int i) {
            const bool below = (i & 2) != 0;
            return kept(first + i / 4 * 8 + i % 2, below ? rows[1].token : rows[0].token,
                        below ? rows[1].image : rows[0].image);
        });
    }
};

// Chunks on their way out, and in.
template <class EPILOGUE, class TILE>
class Results {
  public:
    using L = Layout<EPILOGUE, TILE>;

    __device__ __forceinline__ Results(const Product<EPILOGUE>& p, shared_address shared, int consumer, int thread)
        : p_(p),
          chunks_(shared + L::kChunksAt + consumer * L::kChunks * kChunkBytes),
          loaded_(shared + L::kBarriersAt + (2 * L::kMostStages + consumer * L::kSlots) * 8),
          lane_place_(thread / 32 * 16 * kStepBytes + thread % 16 * kStepBytes +
                      ((thread % 32 / 16 ^ thread % 8) << 4)),
          first_row_(TILE::kPingPong ? 0 : consumer * kBlockRows),
          barrier_(kOwnBarrier + consumer),
          thread_(thread) {}

    // Before each chunk: the compiler shall compute places in it again, not keep them in registers for all chunks.
    __device__ __forceinline__ void begin() {
#ifndef MIXER_KERNELS_ON_HOST
        asm volatile("" : "+r"(lane_place_));
#endif
    }

    __device__ __forceinline__ int thread() const { return thread_; }
    __device__ __forceinline__ int first_row() const { return first_row_; }
    __device__ __forceinline__ void sync() const { named_barrier_sync(barrier_, kWarpgroup); }

    // Where ldmatrix and stmatrix find a quarter of the chunk, in its slot or in an extra one.
    __device__ __forceinline__ shared_address place(int quarter) const {
        return chunks_ + slot_ * kChunkBytes + (lane_place_ ^ 32 * quarter);
    }
    __device__ __forceinline__ shared_address extra_place(int quarter) const {
        return chunks_ + (L::kSlots + extra_) * kChunkBytes + (lane_place_ ^ 32 * quarter);
    }

    // The first chunks of the first tile.
    __device__ __forceinline__ void request_first(Corner corner) const {
        if (thread_ != 0) return;
#pragma unroll
        for (int i = 0; i < L::kSlots - 1; ++i) request(corner, i, i);
    }

    // The tile that comes next, if any.
    __device__ __forceinline__ void set_next(bool exists, Corner corner) {
        next_exists_ = exists;
        next_ = corner;
    }

    __device__ __forceinline__ void wait_loaded() const { barrier_wait(loaded_ + slot_ * 8, parity_); }

    // The chunk is written: it leaves, and its slot's turn is over.
    __device__ __forceinline__ void leave(const TensorMap& map, int m, int n) {
        settle();
        if (thread_ == 0) {
            store_tile(map, chunks_ + slot_ * kChunkBytes, n, m);
            store_commit();
        }
        next_slot();
    }

    // The same for a chunk that was loaded, number i of its tile's, and for an extra one if `both`; then the chunk
    // kSlots - 1 on is loaded. Without vectors of 16 bytes to store, by_elements(slot, extra) stores.
    template <class STORE>
    __device__ __forceinline__ void leave_and_load(Corner corner, int i, bool both, int m, int n, bool by_tiles,
                                                   STORE by_elements) {
        settle();
        const shared_address slot = chunks_ + slot_ * kChunkBytes;
        const shared_address extra = chunks_ + (L::kSlots + extra_) * kChunkBytes;
        if (!by_tiles) by_elements(slot, extra);
        if (thread_ == 0) {
            if (by_tiles) {
                store_tile(p_.stored, slot, n, m);
                if (both) store_tile(p_.other, extra, n, m);
                store_commit();
            }
            const int ahead = i + L::kSlots - 1, into = slot_ == 0 ? L::kSlots - 1 : slot_ - 1;
            if (ahead < TILE::kChunks) {
                request(corner, ahead, into);
            } else if (next_exists_) {
                request(next_, ahead - TILE::kChunks, into);
            }
        }
        next_slot();
        extra_ ^= 1;
    }

    __device__ __forceinline__ int parity_of_extra() const { return extra_; }

  private:
    static_assert(!EPILOGUE::kLoads || L::kSlots - 1 <= TILE::kChunks, "requests reach into the next tile at most");

    __device__ __forceinline__ void request(Corner corner, int i, int slot) const {
        const shared_address barrier = loaded_ + slot * 8;
        barrier_expect(barrier, kChunkBytes);
        load_tile(chunks_ + slot * kChunkBytes, p_.loaded, barrier, corner.n + i % TILE::kChunksAcross * kChunk,
                  corner.m + first_row_ + i / TILE::kChunksAcross * kChunk);
    }

    // What the consumer's threads wrote is there for TMA, and chunks before this one have left: the slot of the last
    // and, with two, of the next can be written.
    __device__ __forceinline__ void settle() const {
        fence_async_shared();
        if (thread_ == 0) store_wait_read<0>();
        sync();
    }

    __device__ __forceinline__ void next_slot() {
        if (++slot_ == L::kSlots) {
            slot_ = 0;
            parity_ ^= 1;
        }
    }

    const Product<EPILOGUE>& p_;
    shared_address chunks_, loaded_;
    int lane_place_, first_row_, barrier_, thread_;
    int slot_ = 0, parity_ = 0, extra_ = 0;
    bool next_exists_ = false;
    Corner next_{};
};

}  // namespace sm90
}  // namespace mixer_kernels
