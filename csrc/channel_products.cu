// Channel mixing as products over the M = B * S rows of tokens, with everything else in their epilogues: equations (6)
// to (8) and (20) of docs/maths.md.
#include <type_traits>

#include "device/gelu.cuh"
#include "device/noise.cuh"
#include "product.cuh"

namespace mixer_kernels {
namespace {

constexpr int kRowTilesToAGroup = 8;

struct Corner {  // a tile's first row and column
    int64_t m;
    int n;
};

// Groups of row tiles sweep all columns before the next group, so that both operands are found in L2.
template <class TILE>
__device__ __forceinline__ Corner corner_of_block(int64_t M, int N) {
    const int64_t m_tiles = tiles(M, TILE::kM), group_tiles = kRowTilesToAGroup * tiles(N, TILE::kN);
    const int64_t group = blockIdx.x / group_tiles, within = blockIdx.x % group_tiles;
    const int64_t first = group * kRowTilesToAGroup;
    const int64_t height = m_tiles - first < kRowTilesToAGroup ? m_tiles - first : kRowTilesToAGroup;
    return {(first + within % height) * TILE::kM, static_cast<int>(within / height) * TILE::kN};
}

// Whether stochastic depth drops every image of a tile: its branch is multiplied by 0, or its gradient is 0.
__device__ __forceinline__ bool all_dropped(const Noise& noise, const TileRows& rows) {
    if (!noise.drop_path()) return false;
#pragma unroll 1
    for (int64_t image = rows.image(0); image <= rows.image(rows.last()); ++image) {
        if (noise.kept_image(image) != 0.0f) return false;
    }
    return true;
}

// ----------------------------------------------------------------------------------------------------------------- fc1

template <class T>
struct Fc1 {
    Stream u;
    int64_t stride_b, stride_s, M;
    int S, C, D_C;
    bool copied;
    mk_norm norm;
    Weight<T> w3;
    const float *b, *wg, *scale;  // b: b3, or wb where LayerNorm is folded
    Noise noise;
    GeluForm form;
    int64_t row;
    void *a, *z;

    explicit Fc1(const mk_channel_fc1_arguments& p)
        : u(p.u),
          stride_b(batch_stride(p.u, p.size)),
          stride_s(p.u.stride_s),
          M(p.size.B * p.size.S),
          S(p.size.S),
          C(p.size.C),
          D_C(p.D_C),
          copied(u.has_vectors && p.u.type == p.type),
          norm(p.norm),
          w3(p.w3, D_C, C),
          b(p.wg != nullptr ? p.wb : p.b3),
          wg(p.wg),
          scale(p.scale),
          noise(p.noise),
          form(p.tanh != 0),
          row(p.row),
          a(p.a),
          z(p.z) {}
};

template <class T, bool folded>
struct Fc1Epilogue {
    struct Columns {
        float b[8], wg[8], scale[8];
    };
    struct Row {
        float mean, rstd;
    };
    const Fc1<T>& p;
    const TileRows& rows;
    Corner corner;

    __device__ __forceinline__ Columns columns(int column, int valid) const {
        const int n = corner.n + column;
        Columns loaded;
        load_columns(p.b, n, valid, 0.0f, loaded.b);
        if constexpr (folded) {
            load_columns(p.wg, n, valid, 0.0f, loaded.wg);
            load_columns(p.scale, n, valid, 1.0f, loaded.scale);
        }
        return loaded;
    }
    __device__ __forceinline__ Row fetch(int row, int, int) const {
        if constexpr (!folded) return {};
        return {p.norm.mean[corner.m + row], p.norm.rstd[corner.m + row]};
    }
    __device__ __forceinline__ void finish(float (&v)[8], const Row& statistics, Columns& columns, int row, int column,
                                           int valid) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if constexpr (folded) v[i] = statistics.rstd * (v[i] - statistics.mean * columns.wg[i]) * columns.scale[i];
            v[i] += columns.b[i];
        }
        const int64_t offset = (corner.m + row) * p.row + corner.n + column;
        if (p.z != nullptr) store8(p.z, type_of<T>::value, offset, valid, v);
        if (p.a == nullptr) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = gelu(v[i], p.form);
        if (p.noise.dropout()) {
            multiply_kept(
                v, [&](int i) { return p.noise.kept_hidden(corner.n + column + i, rows.token(row), rows.image(row)); });
        }
        store8(p.a, type_of<T>::value, offset, valid, v);
    }
};

// Folded, or applied to u as it is loaded.
template <class T, class TILE, bool folded>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks) channel_fc1_kernel(const Fc1<T> p) {
    const Corner corner = corner_of_block<TILE>(p.M, p.D_C);
    const TileRows rows(p.stride_b, p.stride_s, p.S, corner.m, p.M - corner.m, TILE::kM);
    const TileNorm norm{p.norm, corner.m, 0, 0};
    constexpr Access access = folded ? Access::kCopiedOrRead : Access::kLoaded;
    Operand<T, TILE, TILE::kM, true, access> left(p.u, rows, 0, 0, norm, p.copied);
    auto right = p.w3.template tile<TILE, TILE::kN>(corner.n);
    typename TILE::Accumulators accumulators;
    // What a dropped tile leaves in a is finite, and is multiplied by 0 in fc2 or not read.
    accumulate<T, TILE, true>(left, right, DepthOfProduct(all_dropped(p.noise, rows) ? 0 : p.C), NothingToObserve(),
                              accumulators);
    finish_tile<TILE>(accumulators, Fc1Epilogue<T, folded>{p, rows, corner}, p.M - corner.m, p.D_C - corner.n);
}

// ----------------------------------------------------------------------------------------------------------------- fc2

template <class T>
struct Fc2 {
    Stream a, u;
    int64_t stride_b, stride_s, M, row;
    int S, C, D_C;
    Weight<T> w4;
    const float* b4;
    Noise noise;
    void* y;

    explicit Fc2(const mk_channel_fc2_arguments& p)
        : a(p.a, p.type, 0, p.row, 1),
          u(p.u),
          stride_b(batch_stride(p.u, p.size)),
          stride_s(p.u.stride_s),
          M(p.size.B * p.size.S),
          row(p.row),
          S(p.size.S),
          C(p.size.C),
          D_C(p.D_C),
          w4(p.w4, C, D_C),
          b4(p.b4),
          noise(p.noise),
          y(p.y) {}
};

template <class T>
struct Fc2Epilogue {
    struct Columns {
        float b4[8];
    };
    using Row = Chunk;  // of u
    const Fc2<T>& p;
    const TileRows& rows;  // of u
    Corner corner;

    __device__ __forceinline__ Columns columns(int column, int valid) const {
        Columns loaded;
        load_columns(p.b4, corner.n + column, valid, 0.0f, loaded.b4);
        return loaded;
    }
    __device__ __forceinline__ int64_t offset(int row, int column) const {
        return rows.offset(row) + (corner.n + column) * p.u.stride_c;
    }
    __device__ __forceinline__ Row fetch(int row, int column, int valid) const {
        return p.u.fetch(offset(row, column), valid);
    }
    __device__ __forceinline__ void finish(float (&v)[8], const Row& chunk, Columns& columns, int row, int column,
                                           int valid) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += columns.b4[i];
        if (p.noise.dropout()) {
            multiply_kept(
                v, [&](int i) { return p.noise.kept_branch(corner.n + column + i, rows.token(row), rows.image(row)); });
        }
        const float kept = p.noise.drop_path() ? p.noise.kept_image(rows.image(row)) : 1.0f;
        float u[8];
        p.u.template read<T>(chunk, offset(row, column), valid, u);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = u[i] + kept * v[i];
        write8<T>(p.y, p.u.is_float32, (corner.m + row) * p.C + corner.n + column, valid, v);
    }
};

template <class T, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks) channel_fc2_kernel(const Fc2<T> p) {
    const Corner corner = corner_of_block<TILE>(p.M, p.C);
    const TileRows rows(p.stride_b, p.stride_s, p.S, corner.m, p.M - corner.m, TILE::kM);
    Operand<T, TILE, TILE::kM, true, Access::kCopied> left(p.a.from(corner.m * p.row),
                                                           TileRows(p.row, p.M - corner.m, TILE::kM), 0, 0, {}, true);
    auto right = p.w4.template tile<TILE, TILE::kN>(corner.n);
    typename TILE::Accumulators accumulators;
    accumulate<T, TILE, true>(left, right, DepthOfProduct(all_dropped(p.noise, rows) ? 0 : p.D_C), NothingToObserve(),
                              accumulators);
    finish_tile<TILE>(accumulators, Fc2Epilogue<T>{p, rows, corner}, p.M - corner.m, p.C - corner.n);
}

// ------------------------------------------------------------------------------------------------------- GELU backward

template <class T>
struct GeluBackward {
    Stream g, z;
    int64_t M, row;
    int S, C, D_C;
    Weight<T> w4t;
    Noise noise;
    GeluForm form;
    void *dz, *a;
    float* sums;

    explicit GeluBackward(const mk_channel_gelu_backward_arguments& p)
        : g(p.g, p.type, 0, p.size.C, 1),
          z(p.z, p.type, 0, p.row, 1),
          M(p.size.B * p.size.S),
          row(p.row),
          S(p.size.S),
          C(p.size.C),
          D_C(p.D_C),
          w4t(p.w4t, D_C, C),
          noise(p.noise),
          form(p.tanh != 0),
          dz(p.dz),
          a(p.a),
          sums(p.sums) {}
};

template <class T>
struct GeluBackwardEpilogue {
    struct Columns {
        float sums[8];  // of dz
    };
    using Row = Chunk;  // of z
    const GeluBackward<T>& p;
    const TileRows& rows;
    Corner corner;

    __device__ __forceinline__ Columns columns(int, int) const { return {}; }
    __device__ __forceinline__ int64_t offset(int row, int column) const {
        return (corner.m + row) * p.row + corner.n + column;
    }
    __device__ __forceinline__ Row fetch(int row, int column, int valid) const {
        return p.z.fetch(offset(row, column), valid);
    }
    __device__ __forceinline__ void finish(float (&v)[8], const Row& chunk, Columns& columns, int row, int column,
                                           int valid) const {
        float a[8];
        p.z.template read<T>(chunk, offset(row, column), valid, a);
        gelu_backward8(a, v, p.form);
        if (p.noise.dropout()) {
            const auto kept = [&](int i) {
                return p.noise.kept_hidden(corner.n + column + i, rows.token(row), rows.image(row));
            };
            multiply_kept(a, v, kept);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) columns.sums[i] += v[i];
        const int64_t to = (corner.m + row) * p.D_C + corner.n + column;
        store8(p.dz, type_of<T>::value, to, valid, v);
        if (p.a != nullptr) store8(p.a, type_of<T>::value, to, valid, a);
    }
};

template <class T, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks) channel_gelu_backward_kernel(const GeluBackward<T> p) {
    const Corner corner = corner_of_block<TILE>(p.M, p.D_C);
    const TileRows rows(static_cast<int64_t>(p.S) * p.C, p.C, p.S, corner.m, p.M - corner.m, TILE::kM);
    Operand<T, TILE, TILE::kM, true, Access::kCopiedOrRead> left(p.g, rows, 0, 0, {}, p.g.has_vectors);
    auto right = p.w4t.template tile<TILE, TILE::kN>(corner.n);
    typename TILE::Accumulators accumulators;
    accumulate<T, TILE, true>(left, right, DepthOfProduct(all_dropped(p.noise, rows) ? 0 : p.C), NothingToObserve(),
                              accumulators);
    const auto columns =
        finish_tile<TILE>(accumulators, GeluBackwardEpilogue<T>{p, rows, corner}, p.M - corner.m, p.D_C - corner.n);

    // Sums of a lane's rows, then of the lanes that share columns, then of the two warps that do.
    constexpr int lanes = TILE::kWarpN / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* const of_warps = shared_memory<float>();  // [2, kN]
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float sum = columns.sums[i];
#pragma unroll
        for (int distance = lanes; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane < lanes) of_warps[warp / 2 * TILE::kN + warp % 2 * TILE::kWarpN + lane * 8 + i] = sum;
    }
    __syncthreads();
    for (int column = threadIdx.x; column < TILE::kN && column < p.D_C - corner.n; column += TILE::kThreads) {
        p.sums[corner.m / TILE::kM * p.D_C + corner.n + column] = of_warps[column] + of_warps[TILE::kN + column];
    }
}

// ----------------------------------------------------------------------------------------------------------- launchers

bool is_sound(mk_size size, int hidden, mk_type type) {
    return size.B >= 0 && size.S > 0 && size.C > 0 && hidden > 0 && type != MK_FLOAT32;
}

template <class T>
int fc1(const mk_channel_fc1_arguments& p, mk_stream stream) {
    const Fc1<T> product(p);
    const auto launch_tile = [&](auto tile, auto folded) {
        using TILE = decltype(tile);
        return launch_product<TILE>(channel_fc1_kernel<T, TILE, folded.value>, product.M, product.D_C, 1, stream,
                                    product);
    };
    const auto launch_form = [&](auto tile) {
        return product.wg != nullptr ? launch_tile(tile, std::true_type()) : launch_tile(tile, std::false_type());
    };
    return are_few(product.M, product.D_C, 1) ? launch_form(SmallTile()) : launch_form(LargeTile());
}

template <class T>
int fc2(const mk_channel_fc2_arguments& p, mk_stream stream) {
    const Fc2<T> product(p);
    if (!product.a.has_vectors) return cudaErrorInvalidValue;
    if (are_few(product.M, product.C, 1)) {
        return launch_product<SmallTile>(channel_fc2_kernel<T, SmallTile>, product.M, product.C, 1, stream, product);
    }
    return launch_product<LargeTile>(channel_fc2_kernel<T, LargeTile>, product.M, product.C, 1, stream, product);
}

template <class T>
int gelu_backward(const mk_channel_gelu_backward_arguments& p, mk_stream stream) {
    const GeluBackward<T> product(p);
    return launch_product<LargeTile>(channel_gelu_backward_kernel<T, LargeTile>, product.M, product.D_C, 1, stream,
                                     product);
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_channel_fc1_forward(const mk_channel_fc1_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    if (!is_sound(arguments->size, arguments->D_C, arguments->type)) return cudaErrorInvalidValue;
    return arguments->type == MK_BFLOAT16 ? fc1<bfloat16>(*arguments, stream) : fc1<float16>(*arguments, stream);
}

extern "C" int mk_channel_fc2_forward(const mk_channel_fc2_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    if (!is_sound(arguments->size, arguments->D_C, arguments->type)) return cudaErrorInvalidValue;
    return arguments->type == MK_BFLOAT16 ? fc2<bfloat16>(*arguments, stream) : fc2<float16>(*arguments, stream);
}

extern "C" int64_t mk_gelu_backward_tiles(int64_t rows) {
    return mixer_kernels::tiles(rows, mixer_kernels::LargeTile::kM);
}

extern "C" int mk_channel_gelu_backward(const mk_channel_gelu_backward_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    if (!is_sound(arguments->size, arguments->D_C, arguments->type)) return cudaErrorInvalidValue;
    return arguments->type == MK_BFLOAT16 ? gelu_backward<bfloat16>(*arguments, stream)
                                          : gelu_backward<float16>(*arguments, stream);
}
