// Token mixing over any number of tokens as two products with the hidden units between them in memory, equations (2) to
// (5) of docs/maths.md, and the product of its backward pass that has an epilogue, equations (14) and (15).
//
// The weight is on the left and an image on the right, so that channels stay contiguous and nothing is transposed.
#include "device/gelu.cuh"
#include "device/noise.cuh"
#include "product.cuh"

namespace mixer_kernels {
namespace {

struct Corner {  // a tile's image, and its first row and column: a hidden unit or a token, and a channel
    int64_t image;
    int m, n;
};

// Tiles along M next to each other: they share the columns of one image.
template <class TILE>
__device__ __forceinline__ Corner corner_of_block(int M, int C) {
    const int64_t m_tiles = tiles(M, TILE::kM), n_tiles = tiles(C, TILE::kN), rest = blockIdx.x / m_tiles;
    return {rest / n_tiles, static_cast<int>(blockIdx.x % m_tiles) * TILE::kM,
            static_cast<int>(rest % n_tiles) * TILE::kN};
}

// The right operand: rows along K of one image, from tensor [.., K, C].
template <class T, class TILE, Access access>
using Channels = Operand<T, TILE, TILE::kN, false, access>;

int64_t padded(int C) { return tiles(C, 8) * 8; }

// ----------------------------------------------------------------------------------------------------------------- fc1

template <class T>
struct Fc1 {
    Stream x;
    int64_t stride_b, stride_s, C_pad;
    int S, C, D_S;
    mk_norm norm;
    Weight<T> w1;
    const float* b1;
    Noise noise;
    GeluForm form;
    bool keeps_z;
    void* a;

    explicit Fc1(const mk_token_products_arguments& p)
        : x(p.x),
          stride_b(p.x.stride_b),
          stride_s(p.x.stride_s),
          C_pad(padded(p.size.C)),
          S(p.size.S),
          C(p.size.C),
          D_S(p.D_S),
          norm(p.norm),
          w1(p.w1, D_S, S),
          b1(p.b1),
          noise(p.noise),
          form(p.tanh != 0),
          keeps_z(p.u == nullptr),
          a(p.a) {}
};

template <class T>
struct Fc1Epilogue {
    struct Columns {};
    using Row = float;  // of b1
    const Fc1<T>& p;
    Corner corner;

    __device__ __forceinline__ Columns columns(int, int) const { return {}; }
    __device__ __forceinline__ Row fetch(int row, int, int) const { return p.b1[corner.m + row]; }
    __device__ __forceinline__ void finish(float (&v)[8], const Row& bias, Columns&, int row, int column,
                                           int valid) const {
        const int d = corner.m + row, c = corner.n + column;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += bias;
        if (!p.keeps_z) {
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = gelu(v[i], p.form);
            if (p.noise.dropout()) {
                multiply_kept(v, [&](int i) { return p.noise.kept_hidden(d, c + i, corner.image); });
            }
        }
        store8(p.a, type_of<T>::value, (corner.image * p.D_S + d) * p.C_pad + c, valid, v);
    }
};

template <class T, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks) token_fc1_kernel(const Fc1<T> p) {
    const Corner corner = corner_of_block<TILE>(p.D_S, p.C);
    const bool dropped = p.noise.kept_image(corner.image) == 0.0f;  // then what it leaves in a is finite
    const TileNorm norm{p.norm, corner.image * p.S, 0, corner.n};
    auto left = p.w1.template tile<TILE, TILE::kM>(corner.m);
    Channels<T, TILE, Access::kLoaded> right(p.x.from(corner.image * p.stride_b + corner.n * p.x.stride_c),
                                             TileRows(p.stride_s, p.S, p.S), 0, p.C - corner.n, norm, false);
    typename TILE::Accumulators accumulators;
    accumulate<T, TILE, false>(left, right, DepthOfProduct(dropped ? 0 : p.S), NothingToObserve(), accumulators);
    finish_tile<TILE>(accumulators, Fc1Epilogue<T>{p, corner}, p.D_S - corner.m, p.C - corner.n);
}

// ----------------------------------------------------------------------------------------------------------------- fc2

template <class T>
struct Fc2 {
    Stream a, x;
    int64_t stride_b, stride_s, C_pad;
    int S, C, D_S;
    Weight<T> w2;
    const float* b2;
    Noise noise;
    void* u;

    explicit Fc2(const mk_token_products_arguments& p)
        : a(p.a, p.type, 0, padded(p.size.C), 1),
          x(p.x),
          stride_b(p.x.stride_b),
          stride_s(p.x.stride_s),
          C_pad(padded(p.size.C)),
          S(p.size.S),
          C(p.size.C),
          D_S(p.D_S),
          w2(p.w2, S, D_S),
          b2(p.b2),
          noise(p.noise),
          u(p.u) {}
};

template <class T>
struct Fc2Epilogue {
    struct Columns {};
    struct Row {
        float bias;
        Chunk x;
    };
    const Fc2<T>& p;
    Corner corner;
    float kept;

    __device__ __forceinline__ int64_t offset(int row, int column) const {
        return corner.image * p.stride_b + (corner.m + row) * p.stride_s + (corner.n + column) * p.x.stride_c;
    }
    __device__ __forceinline__ Columns columns(int, int) const { return {}; }
    __device__ __forceinline__ Row fetch(int row, int column, int valid) const {
        return {p.b2[corner.m + row], p.x.fetch(offset(row, column), valid)};
    }
    __device__ __forceinline__ void finish(float (&v)[8], const Row& fetched, Columns&, int row, int column,
                                           int valid) const {
        const int s = corner.m + row, c = corner.n + column;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += fetched.bias;
        if (p.noise.dropout()) {
            multiply_kept(v, [&](int i) { return p.noise.kept_branch(c + i, s, corner.image); });
        }
        float x[8];
        p.x.template read<T>(fetched.x, offset(row, column), valid, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = x[i] + kept * v[i];
        write8<T>(p.u, p.x.is_float32, (corner.image * p.S + s) * p.C + c, valid, v);
    }
};

template <class T, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks) token_fc2_kernel(const Fc2<T> p) {
    const Corner corner = corner_of_block<TILE>(p.S, p.C);
    const float kept = p.noise.kept_image(corner.image);
    auto left = p.w2.template tile<TILE, TILE::kM>(corner.m);
    Channels<T, TILE, Access::kCopied> right(p.a.from(corner.image * p.D_S * p.C_pad + corner.n),
                                             TileRows(p.C_pad, p.D_S, p.D_S), 0, p.C - corner.n, {}, true);
    typename TILE::Accumulators accumulators;
    accumulate<T, TILE, false>(left, right, DepthOfProduct(kept == 0.0f ? 0 : p.D_S), NothingToObserve(), accumulators);
    finish_tile<TILE>(accumulators, Fc2Epilogue<T>{p, corner, kept}, p.S - corner.m, p.C - corner.n);
}

// ------------------------------------------------------------------------------------------------------- GELU backward

template <class T>
struct GeluBackward {
    Stream g, z;
    int64_t C_pad;
    int S, C, D_S;
    Weight<T> w2t;
    Noise noise;
    GeluForm form;
    void *a, *dz;

    explicit GeluBackward(const mk_token_gelu_backward_arguments& p)
        : g(p.g, p.type, 0, p.size.C, 1),
          z(p.z, p.type, 0, padded(p.size.C), 1),
          C_pad(padded(p.size.C)),
          S(p.size.S),
          C(p.size.C),
          D_S(p.D_S),
          w2t(p.w2t, D_S, S),
          noise(p.noise),
          form(p.tanh != 0),
          a(p.a),
          dz(p.dz) {}
};

template <class T>
struct GeluBackwardEpilogue {
    struct Columns {};
    using Row = Chunk;  // of z
    const GeluBackward<T>& p;
    Corner corner;

    __device__ __forceinline__ int64_t offset(int row, int column) const {
        return (corner.image * p.D_S + corner.m + row) * p.C_pad + corner.n + column;
    }
    __device__ __forceinline__ Columns columns(int, int) const { return {}; }
    __device__ __forceinline__ Row fetch(int row, int column, int valid) const {
        return p.z.fetch(offset(row, column), valid);
    }
    __device__ __forceinline__ void finish(float (&v)[8], const Row& z, Columns&, int row, int column,
                                           int valid) const {
        float a[8];
        p.z.template read<T>(z, offset(row, column), valid, a);
        gelu_backward8(a, v, p.form);
        if (p.noise.dropout()) {
            const auto kept = [&](int i) {
                return p.noise.kept_hidden(corner.m + row, corner.n + column + i, corner.image);
            };
            multiply_kept(a, v, kept);
        }
        store8(p.a, type_of<T>::value, offset(row, column), valid, a);
        store8(p.dz, type_of<T>::value, offset(row, column), valid, v);  // dz may be z: a lane has read what it writes
    }
};

template <class T, class TILE>
__global__ void __launch_bounds__(TILE::kThreads, TILE::kBlocks) token_gelu_backward_kernel(const GeluBackward<T> p) {
    const Corner corner = corner_of_block<TILE>(p.D_S, p.C);
    const bool dropped = p.noise.kept_image(corner.image) == 0.0f;  // then g is 0
    auto left = p.w2t.template tile<TILE, TILE::kM>(corner.m);
    Channels<T, TILE, Access::kCopiedOrRead> right(p.g.from(corner.image * p.S * p.C + corner.n),
                                                   TileRows(p.C, p.S, p.S), 0, p.C - corner.n, {}, p.g.has_vectors);
    typename TILE::Accumulators accumulators;
    accumulate<T, TILE, false>(left, right, DepthOfProduct(dropped ? 0 : p.S), NothingToObserve(), accumulators);
    finish_tile<TILE>(accumulators, GeluBackwardEpilogue<T>{p, corner}, p.D_S - corner.m, p.C - corner.n);
}

// ----------------------------------------------------------------------------------------------------------- launchers

bool is_sound(mk_size size, int D_S, mk_type type) {
    return size.B >= 0 && size.S > 0 && size.C > 0 && D_S > 0 && type != MK_FLOAT32;
}

template <class T, class TILE>
int forward_in(const mk_token_products_arguments& p, mk_stream stream) {
    const Fc2<T> second(p);
    if (!second.a.has_vectors) return cudaErrorInvalidValue;
    const mk_size& size = p.size;
    const int error = launch_product<TILE>(token_fc1_kernel<T, TILE>, p.D_S, size.C, size.B, stream, Fc1<T>(p));
    if (error != cudaSuccess || p.u == nullptr) return error;
    return launch_product<TILE>(token_fc2_kernel<T, TILE>, size.S, size.C, size.B, stream, second);
}

template <class T>
int forward(const mk_token_products_arguments& p, mk_stream stream) {
    return are_few(p.D_S, p.size.C, p.size.B) ? forward_in<T, SmallTile>(p, stream)
                                              : forward_in<T, LargeTile>(p, stream);
}

template <class T>
int backward(const mk_token_gelu_backward_arguments& p, mk_stream stream) {
    return launch_product<LargeTile>(token_gelu_backward_kernel<T, LargeTile>, p.D_S, p.size.C, p.size.B, stream,
                                     GeluBackward<T>(p));
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_token_products_forward(const mk_token_products_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    if (!is_sound(arguments->size, arguments->D_S, arguments->type)) return cudaErrorInvalidValue;
    return arguments->type == MK_BFLOAT16 ? forward<bfloat16>(*arguments, stream)
                                          : forward<float16>(*arguments, stream);
}

extern "C" int mk_token_gelu_backward(const mk_token_gelu_backward_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    if (!is_sound(arguments->size, arguments->D_S, arguments->type)) return cudaErrorInvalidValue;
    return arguments->type == MK_BFLOAT16 ? backward<bfloat16>(*arguments, stream)
                                          : backward<float16>(*arguments, stream);
}
