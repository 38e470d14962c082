// A matrix product with the rest of a layer around it: D [M, N] = left [M, K] . right [N, K]', one tile to a block.
//
// A ring of stages in shared memory (product_operand.cuh) holds what comes next while the tensor cores work on what is
// there. The result leaves through shared memory so that an epilogue sees 8 neighbours of a row at a time, and a warp
// whole lines.
#pragma once

#include "device/copy.cuh"
#include "device/gelu.cuh"
#include "device/matrix.cuh"
#include "device/noise.cuh"
#include "device/numbers.cuh"
#include "device/platform.cuh"
#include "product_operand.cuh"

namespace mixer_kernels {

// ----------------------------------------------------------------------------------------------------------- main loop

// Where a lane points ldmatrix in the tiles of its warp. Chunks are swizzled by the row's place among 8, which is the
// lane's: 16 rows on is a constant away, and 2 chunks on an exclusive or.
template <class TILE, bool right_along_k>
struct LanePlaces {
    int left, right;

    __device__ __forceinline__ LanePlaces() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = warp % TILE::kWarpsN * TILE::kWarpN;
        left = chunk_along_k(warp / TILE::kWarpsN * TILE::kWarpM + lane % 16, lane / 16);
        right = right_along_k ? chunk_along_k(column + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                              : chunk_across_k<TILE::kN>(lane % 16, column / 8 + lane / 16);
        keep(left);
        keep(right);
    }
};

template <class T, class TILE, bool right_along_k>
__device__ __forceinline__ void multiply_stage(const T* left, const T* right,
                                               const LanePlaces<TILE, right_along_k>& places,
                                               typename TILE::Accumulators& accumulators) {
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
        uint32_t a[TILE::kRowFragments][4];
#pragma unroll
        for (int i = 0; i < TILE::kRowFragments; ++i) {
            load_matrices_x4(a[i], left + (places.left ^ 16 * k) + 16 * i * kStep);
        }
#pragma unroll
        for (int j = 0; j < (TILE::kColumnFragments + 1) / 2; ++j) {
            uint32_t b[4];
            const bool is_pair = 2 * j + 1 < TILE::kColumnFragments;
            if constexpr (right_along_k && TILE::kColumnFragments % 2 != 0) {
                const T* from = right + (places.right ^ 16 * k) + 16 * j * kStep;
                if (is_pair) {
                    load_matrices_x4(b, from);
                } else {
                    uint32_t last[2];
                    load_matrices_x2(last, from);
                    b[0] = last[0], b[1] = last[1];
                }
            } else if constexpr (right_along_k) {
                load_matrices_x4(b, right + (places.right ^ 16 * k) + 16 * j * kStep);
            } else {
                load_matrices_x4_transposed(b, right + (places.right ^ 16 * j) + 16 * k * TILE::kN);
            }
#pragma unroll
            for (int i = 0; i < TILE::kRowFragments; ++i) {
                multiply_add<T>(accumulators[i][2 * j], a[i], b[0], b[1]);
                if (is_pair) multiply_add<T>(accumulators[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

struct NothingToObserve {
    template <class T>
    __device__ __forceinline__ void operator()(const T*, const T*) const {}
};

// accumulators = left . right' over depth. observe(left, right) sees the tiles of each stage, in order. On return the
// block is through with its shared memory.
template <class T, class TILE, bool right_along_k, class LEFT, class RIGHT, class DEPTH, class OBSERVE>
__device__ __forceinline__ void accumulate(LEFT& left, RIGHT& right, DEPTH depth, OBSERVE&& observe,
                                           typename TILE::Accumulators& accumulators) {
    T* const ring = shared_memory<T>();
    const LanePlaces<TILE, right_along_k> places;
#pragma unroll
    for (int i = 0; i < TILE::kRowFragments; ++i)
#pragma unroll
        for (int j = 0; j < TILE::kColumnFragments; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) accumulators[i][j][k] = 0.0f;

    if (depth.more()) {
        left.fetch(depth.at());
        right.fetch(depth.at());
    }
    // The first kStages - 1 turns only fill the ring.
    int put = 0, put_stage = 0, stage = 0;
#pragma unroll 1
    for (int turn = 1 - TILE::kStages; turn < put || turn < 0; ++turn) {
        if (turn >= 0) {
            copy_async_wait<TILE::kStages - 2>();
            __syncthreads();  // everybody's copies are there, and nobody reads the stage before this one any more
        }
        if (depth.more()) {
            left.put(ring + put_stage * TILE::kStage, depth.at());
            right.put(ring + put_stage * TILE::kStage + TILE::kLeft, depth.at());
            depth.next();
            ++put;
            put_stage = put_stage + 1 == TILE::kStages ? 0 : put_stage + 1;
            if (depth.more()) {
                left.fetch(depth.at());
                right.fetch(depth.at());
            }
        }
        copy_async_commit();
        if (turn >= 0) {
            const T* tiles = ring + stage * TILE::kStage;
            observe(tiles, tiles + TILE::kLeft);
            multiply_stage<T, TILE, right_along_k>(tiles, tiles + TILE::kLeft, places, accumulators);
            stage = stage + 1 == TILE::kStages ? 0 : stage + 1;
        }
    }
    copy_async_wait<0>();
    __syncthreads();
}

// ------------------------------------------------------------------------------------------------------------ epilogue

// Hands the results to an epilogue, 8 neighbours of a row at a time, of a tile with that many rows and columns left:
//   Columns columns(column, valid)                    what a lane's 8 columns need; asked once
//   Row     fetch(row, column, valid)                 starts the loads of 8 elements of a row
//   void    finish(v, Row, Columns&, row, column, valid)
// row and column count from the tile's corner. Returns the lane's Columns.
template <class TILE, class EPILOGUE>
__device__ __forceinline__ typename EPILOGUE::Columns finish_tile(const typename TILE::Accumulators& accumulators,
                                                                  const EPILOGUE& epilogue, int64_t rows_left,
                                                                  int64_t columns_left) {
    constexpr int lanes = TILE::kWarpN / 8, rows_at_once = 32 / lanes, passes = 16 / rows_at_once;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* const results = shared_memory<float>() + warp * 16 * TILE::kPitch;
    const int column = warp % TILE::kWarpsN * TILE::kWarpN + lane % lanes * 8;
    const bool works = lane < lanes * rows_at_once;
    const int valid = !works                       ? 0
                      : columns_left - column >= 8 ? 8
                      : columns_left > column      ? static_cast<int>(columns_left - column)
                                                   : 0;
    typename EPILOGUE::Columns columns = epilogue.columns(column, valid);
#pragma unroll 1
    for (int slice = 0; slice < TILE::kRowFragments; ++slice) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TILE::kRowFragments; ++i) {
            if (i != slice) continue;
#pragma unroll
            for (int j = 0; j < TILE::kColumnFragments; ++j) {
                float* to = results + lane / 4 * TILE::kPitch + 8 * j + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = {accumulators[i][j][0], accumulators[i][j][1]};
                *reinterpret_cast<float2*>(to + 8 * TILE::kPitch) = {accumulators[i][j][2], accumulators[i][j][3]};
            }
        }
        __syncwarp();
        typename EPILOGUE::Row fetched[passes];
        const int first = warp / TILE::kWarpsN * TILE::kWarpM + 16 * slice;
#pragma unroll
        for (int pass = 0; pass < passes; ++pass) {
            const int row = first + pass * rows_at_once + lane / lanes;
            if (valid > 0 && row < rows_left) fetched[pass] = epilogue.fetch(row, column, valid);
        }
#pragma unroll
        for (int pass = 0; pass < passes; ++pass) {
            const int within = pass * rows_at_once + lane / lanes, row = first + within;
            if (valid == 0 || row >= rows_left) continue;
            const float4* from = reinterpret_cast<const float4*>(results + within * TILE::kPitch + lane % lanes * 8);
            const float4 low = from[0], high = from[1];
            float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            epilogue.finish(v, fetched[pass], columns, row, column, valid);
        }
    }
    return columns;
}

// a[i] *= kept(i), and also[i] *= kept(i).
template <class KEPT>
__device__ __forceinline__ void multiply_kept(float (&a)[8], float (&also)[8], KEPT kept) {
    const KeptFactors<8> factors(kept);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        a[i] *= factors[i];
        also[i] *= factors[i];
    }
}

template <class KEPT>
__device__ __forceinline__ void multiply_kept(float (&v)[8], KEPT kept) {
    float unused[8]{};
    multiply_kept(v, unused, kept);
}

// From z and da: a = GELU(z) over z, and dz = da * GELU'(z) over da.
__device__ __forceinline__ void gelu_backward8(float (&z)[8], float (&da)[8], const GeluForm& form) {
    const auto all = [&](auto gelu_and_slope) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const GeluGradient gradient = gelu_and_slope(z[i], form);
            z[i] = gradient.a;
            da[i] *= gradient.slope;
        }
    };
    if (form.is_tanh) {
        all([](float v, const GeluForm& f) { return gelu_and_slope_tanh(v, f); });
    } else {
        all([](float v, const GeluForm& f) { return gelu_and_slope_erf(v, f); });
    }
}

// v[i] = vector[first + i] for i < valid, else otherwise; vector may be null.
__device__ __forceinline__ void load_columns(const float* vector, int first, int valid, float otherwise,
                                             float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = vector != nullptr && i < valid ? vector[first + i] : otherwise;
}

// ----------------------------------------------------------------------------------------------------------- launching

// Whether large tiles of images products [M, N] would be too few blocks for a large GPU's multiprocessors.
inline bool are_few(int64_t M, int64_t N, int64_t images) {
    constexpr double few = 128;
    return static_cast<double>(tiles(M, LargeTile::kM)) * tiles(N, LargeTile::kN) * images < few;
}

// Runs kernel(arguments) for all tiles of images products [M, N].
template <class TILE, class ARGUMENTS>
int launch_product(void (*kernel)(ARGUMENTS), int64_t M, int64_t N, int64_t images, mk_stream stream,
                   const ARGUMENTS& arguments) {
    constexpr int64_t most = 0x7fffffff;
    const int64_t of_image = tiles(M, TILE::kM) * tiles(N, TILE::kN);
    if (of_image > most || (images > 0 && of_image > most / images)) return cudaErrorInvalidValue;
    return launch(kernel, dim3(static_cast<unsigned>(of_image * images)), dim3(TILE::kThreads), TILE::kSharedBytes,
                  stream, arguments);
}

}  // namespace mixer_kernels
