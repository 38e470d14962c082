// All weights of a half or of a block as kernels take them, in one launch: cast, zero-padded, transposed, and LayerNorm
// folded into W3 by equation (8) of docs/maths.md.
//
// Blocks are shared out among the jobs of a table that is a kernel parameter. Where the rows of a result lie in memory
// as rows, a thread takes 8 elements side by side, or 8 far apart where 16-byte accesses are not possible; where its
// columns do (a transposed weight), a block takes a tile through shared memory. For the fold a warp takes a row. No
// atomics: each sum has one owner and one order.
#include "rows.cuh"

namespace mixer_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 64, kTilePitch = kTile + 1;
constexpr int kBlockElements = kThreads * 8;

enum class Way { vectors, elements, tiles };

struct Table {
    int packings;
    unsigned first[MK_MOST_PACKINGS];  // block of each packing; those before the first are for the folding
    Way way[MK_MOST_PACKINGS];
    mk_packing packing[MK_MOST_PACKINGS];
    Way folding_way;
    mk_folding folding;
};

// tensor[offset .. offset + 8), on 16 bytes.
__device__ __forceinline__ void load_vector(const void* tensor, mk_type type, int64_t offset, float (&v)[8]) {
    if (type == MK_FLOAT32) {
        const float4* vectors = reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + offset);
        const float4 low = vectors[0], high = vectors[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        return;
    }
    const uint4 packed = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + offset);
    if (type == MK_BFLOAT16) {
        unpack8<bfloat16>(packed, v);
    } else {
        unpack8<float16>(packed, v);
    }
}

__device__ __forceinline__ void set8(float (&v)[8], float value) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = value;
}

// ------------------------------------------------------------------------------------------------------- packings

__device__ __forceinline__ void pack_vectors(const mk_packing& p, unsigned block) {
    const unsigned groups = static_cast<unsigned>(p.columns_padded) / 8;
    const unsigned share = block * kThreads + threadIdx.x;
    const int row = static_cast<int>(share / groups), column = static_cast<int>(share % groups * 8);
    if (row >= p.rows_padded) return;
    float v[8];
    if (row < p.rows && column < p.columns) {
        load_vector(p.w, p.w_type, row * p.stride_row + column, v);
    } else {
        set8(v, 0.0f);
    }
    store8(p.packed, p.type, int64_t{row} * p.columns_padded + column, 8, v);
}

__device__ __forceinline__ void pack_elements(const mk_packing& p, unsigned block) {
    const unsigned columns = static_cast<unsigned>(p.columns_padded);
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
        const unsigned share = block * kBlockElements + i * kThreads + threadIdx.x;
        const int row = static_cast<int>(share / columns), column = static_cast<int>(share % columns);
        if (row >= p.rows_padded) return;
        const bool there = row < p.rows && column < p.columns;
        const float value = there ? load_element(p.w, p.w_type, row * p.stride_row + column * p.stride_column) : 0.0f;
        store_element(p.packed, p.type, share, value);
    }
}

__device__ __forceinline__ void pack_tile(const mk_packing& p, unsigned block) {
    float* tile = shared_memory<float>();  // [kTile columns, kTilePitch]: as w lies in memory
    const unsigned across = (p.columns_padded + kTile - 1u) / kTile;
    const int row0 = static_cast<int>(block / across * kTile), column0 = static_cast<int>(block % across * kTile);
    float v[8];
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kTile / 8; i += kThreads) {
        const int row = i % (kTile / 8) * 8, column = i / (kTile / 8);
        const int there = column0 + column < p.columns ? p.rows - row0 - row : 0;
        if (there > 0) {
            load8(p.w, p.w_type, row0 + row + (column0 + column) * p.stride_column, 1, there, v);
        } else {
            set8(v, 0.0f);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) tile[column * kTilePitch + row + j] = v[j];
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kTile / 8; i += kThreads) {
        const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
        const int wanted = row0 + row < p.rows_padded ? p.columns_padded - column0 - column : 0;
        if (wanted <= 0) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = tile[(column + j) * kTilePitch + row];
        store8(p.packed, p.type, int64_t{row0 + row} * p.columns_padded + column0 + column, wanted, v);
    }
}

// -------------------------------------------------------------------------------------------------------- folding

// v[N] of a row of W3 and of gamma and beta from `column` on. N is 8 where all have 16-byte accesses, else 1.
template <int N>
struct Columns {
    float w[N], gamma[N], beta[N];

    __device__ __forceinline__ Columns(const mk_folding& f, int row, int column) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            w[i] = beta[i] = 0.0f;
            gamma[i] = 1.0f;
        }
        if (column >= f.w3.columns) return;
        if constexpr (N == 8) {
            load_vector(f.w3.w, f.w3.w_type, row * f.w3.stride_row + column, w);
            if (f.gamma.data != nullptr) load_vector(f.gamma.data, f.gamma.type, column, gamma);
            if (f.beta.data != nullptr) load_vector(f.beta.data, f.beta.type, column, beta);
        } else {
            w[0] = load_element(f.w3.w, f.w3.w_type, row * f.w3.stride_row + column * f.w3.stride_column);
            if (f.gamma.data != nullptr) gamma[0] = load_element(f.gamma.data, f.gamma.type, column * f.gamma.stride);
            if (f.beta.data != nullptr) beta[0] = load_element(f.beta.data, f.beta.type, column * f.beta.stride);
        }
    }
};

// The exponent of the power of two above a finite magnitude, given by its bits, of 2^-100 at least: the magnitude over
// that power is in [1/2, 1). 0 for infinity and NaN, which stay what they are.
__device__ __forceinline__ int exponent_above(uint32_t magnitude) {
    constexpr uint32_t infinity = 0xffu << 23, least = (127u - 100u) << 23;
    if (magnitude >= infinity) return 0;
    return static_cast<int>((magnitude > least ? magnitude : least) >> 23) - 126;
}

// The largest magnitude in a row of W3 * gamma, by its bits: NaN is above infinity.
template <int N>
__device__ __forceinline__ uint32_t largest_of_row(const mk_folding& f, int row) {
    uint32_t largest = 0;
#pragma unroll 1
    for (int column = threadIdx.x % 32 * N; column < f.w3.columns; column += 32 * N) {
        const Columns<N> at(f, row, column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint32_t magnitude = __float_as_uint(at.w[i] * at.gamma[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, largest, lanes);
        largest = other > largest ? other : largest;
    }
    return largest;
}

template <int N>
__device__ __forceinline__ void fold_row(const mk_folding& f, unsigned block) {
    const int lane = threadIdx.x % 32, row = static_cast<int>(block * kWarps + threadIdx.x / 32);
    if (row >= f.w3.rows) return;
    float factor = 1.0f;
    if (f.scale != nullptr) {
        const int exponent = exponent_above(largest_of_row<N>(f, row));  // of a row that is in cache from then on
        factor = ldexpf(1.0f, -exponent);
        if (lane == 0) f.scale[row] = ldexpf(1.0f, exponent);
    }
    float wg = 0.0f, wb = 0.0f;
#pragma unroll 1  // loads of other warps are under way: fewer registers, more warps
    for (int column = lane * N; column < f.w3.columns_padded; column += 32 * N) {
        Columns<N> at(f, row, column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            wb += at.w[i] * at.beta[i];
            const float w = at.w[i] * at.gamma[i] * factor;
            at.w[i] = f.w3.type == MK_BFLOAT16 ? to_float(from_float<bfloat16>(w)) : to_float(from_float<float16>(w));
            wg += at.w[i];  // of what the product takes
        }
        const int64_t offset = int64_t{row} * f.w3.columns_padded + column;
        if constexpr (N == 8) {
            store8(f.w3.packed, f.w3.type, offset, 8, at.w);
        } else {
            store_element(f.w3.packed, f.w3.type, offset, at.w[0]);
        }
    }
    wg = warp_sum(wg);
    wb = warp_sum(wb);
    if (lane == 0) {
        f.wg[row] = wg;
        f.wb[row] = f.b3.data != nullptr ? wb + load_element(f.b3.data, f.b3.type, row * f.b3.stride) : wb;
    }
}

__global__ void __launch_bounds__(kThreads, 4) pack_weights_kernel(const __grid_constant__ Table table) {
    int job = -1;
    while (job + 1 < table.packings && blockIdx.x >= table.first[job + 1]) ++job;
    if (job < 0) {
        if (table.folding_way == Way::vectors) {
            fold_row<8>(table.folding, blockIdx.x);
        } else {
            fold_row<1>(table.folding, blockIdx.x);
        }
        return;
    }
    const mk_packing& p = table.packing[job];
    const unsigned block = blockIdx.x - table.first[job];
    switch (table.way[job]) {
        case Way::vectors:
            return pack_vectors(p, block);
        case Way::elements:
            return pack_elements(p, block);
        case Way::tiles:
            return pack_tile(p, block);
    }
}

// -------------------------------------------------------------------------------------------------------- launching

bool on_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

bool has_vectors(const mk_vector& v) { return v.data == nullptr || (on_16_bytes(v.data) && v.stride == 1); }

Way way_of(const mk_packing& p) {
    if (p.stride_row == 1 && p.stride_column != 1 && p.rows > 1) return Way::tiles;
    const int64_t row_bytes = p.stride_row * (p.w_type == MK_FLOAT32 ? 4 : 2);
    const bool vectors = p.stride_column == 1 && on_16_bytes(p.w) && (p.rows <= 1 || row_bytes % 16 == 0) &&
                         on_16_bytes(p.packed) && p.columns % 8 == 0 && p.columns_padded % 8 == 0;
    return vectors ? Way::vectors : Way::elements;
}

int64_t blocks_of(const mk_packing& p, Way way) {
    return way == Way::tiles ? cdiv(p.rows_padded, kTile) * cdiv(p.columns_padded, kTile)
                             : cdiv(int64_t{p.rows_padded} * p.columns_padded, kBlockElements);
}

bool is_wrong(const mk_packing& p) {
    constexpr int64_t most = (int64_t{1} << 32) - kBlockElements;  // indices of shares have 32 bits
    return p.rows < 0 || p.columns < 0 || p.rows > p.rows_padded || p.columns > p.columns_padded ||
           int64_t{p.rows_padded} * p.columns_padded > most;
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_pack_weights(const mk_packing* packings, int count, const mk_folding* folding, mk_stream stream) {
    using namespace mixer_kernels;
    if (count < 0 || count > MK_MOST_PACKINGS) return cudaErrorInvalidValue;
    Table table{};
    int64_t blocks = 0;
    bool tiles = false;
    if (folding != nullptr) {
        const mk_packing& w3 = folding->w3;
        if (is_wrong(w3) || w3.rows != w3.rows_padded || w3.type == MK_FLOAT32) return cudaErrorInvalidValue;
        const bool vectors = has_vectors(folding->gamma) && has_vectors(folding->beta);
        table.folding = *folding;
        table.folding_way = vectors && way_of(w3) == Way::vectors ? Way::vectors : Way::elements;
        blocks = cdiv(w3.rows, kWarps);
    }
    table.packings = count;
    for (int i = 0; i < count; ++i) {
        if (is_wrong(packings[i])) return cudaErrorInvalidValue;
        table.packing[i] = packings[i];
        table.way[i] = way_of(packings[i]);
        table.first[i] = static_cast<unsigned>(blocks);
        blocks += blocks_of(packings[i], table.way[i]);
        tiles = tiles || table.way[i] == Way::tiles;
    }
    if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
    const size_t shared = tiles ? sizeof(float) * kTile * kTilePitch : 0;
    return launch(pack_weights_kernel, static_cast<unsigned>(blocks), kThreads, shared, stream, table);
}
