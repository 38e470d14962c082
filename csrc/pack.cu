// Weights as kernels take them: cast, zero-padded, transposed if asked. Once per version of a parameter.
#include "rows.cuh"

namespace mixer_kernels {
namespace {

struct Packing {
    const void* w;  // [rows, columns]
    mk_type w_type;
    int64_t rows, columns;
    void* packed;  // [rows_padded, columns_padded]
    mk_type type;
    int64_t rows_padded, columns_padded;
};

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_kernel(const Packing p) {
    const int64_t groups = (p.columns_padded + 7) / 8;  // of 8 columns: a thread's share
    const int64_t shares = p.rows_padded * groups, step = int64_t{gridDim.x} * kThreads;
    for (int64_t share = int64_t{blockIdx.x} * kThreads + threadIdx.x; share < shares; share += step) {
        const int64_t row = share / groups, column = share % groups * 8;
        const int64_t there = row < p.rows ? p.columns - column : 0, wanted = p.columns_padded - column;
        float v[8];
        load8(p.w, p.w_type, row * p.columns + column, 1, static_cast<int>(there < 8 ? there : 8), v);
        store8(p.packed, p.type, row * p.columns_padded + column, static_cast<int>(wanted < 8 ? wanted : 8), v);
    }
}

constexpr int kTile = 32, kTileRows = kThreads / kTile, kTilePitch = kTile + 1;

__global__ void __launch_bounds__(kThreads) pack_transposed_kernel(const Packing p) {
    float* tile = shared_memory<float>();  // [kTile rows of w, kTilePitch]
    const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
    const int64_t across = (p.columns_padded + kTile - 1) / kTile, down = (p.rows_padded + kTile - 1) / kTile;
    for (int64_t i = blockIdx.x; i < across * down; i += gridDim.x) {
        const int64_t row0 = i / across * kTile, column0 = i % across * kTile;  // of packed
        for (int k = y; k < kTile; k += kTileRows) {
            const int64_t row = column0 + k, column = row0 + x;  // of w
            const bool there = row < p.rows && column < p.columns;
            tile[k * kTilePitch + x] = there ? load_element(p.w, p.w_type, row * p.columns + column) : 0.0f;
        }
        __syncthreads();
        for (int k = y; k < kTile; k += kTileRows) {
            const int64_t row = row0 + k, column = column0 + x;
            if (row < p.rows_padded && column < p.columns_padded) {
                store_element(p.packed, p.type, row * p.columns_padded + column, tile[x * kTilePitch + k]);
            }
        }
        __syncthreads();
    }
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_pack_weight(const void* w, mk_type w_type, int64_t rows, int64_t columns, int transposed,
                              void* packed, mk_type type, int64_t rows_padded, int64_t columns_padded,
                              mk_stream stream) {
    using namespace mixer_kernels;
    const Packing packing{w, w_type, rows, columns, packed, type, rows_padded, columns_padded};
    if (transposed) {
        const int64_t tiles = cdiv(rows_padded, kTile) * cdiv(columns_padded, kTile);
        return launch(pack_transposed_kernel, blocks_for(tiles), kThreads, sizeof(float) * kTile * kTilePitch, stream,
                      packing);
    }
    return launch(pack_kernel, blocks_for(cdiv(rows_padded * cdiv(columns_padded, 8), kThreads)), kThreads, 0, stream,
                  packing);
}
