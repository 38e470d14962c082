// Weight gradients of token mixing: products over images and channels, split along that sum; equation (16) of
// docs/maths.md.
//
//   dW1  = sum over images of dz . n'     [D_S, S]     n = LN(x), normalised again as it is loaded
//   dW2' = sum over images of a . g'      [D_S, S]
//
// Each split adds its share in registers and writes partial sums, which the caller adds in a fixed order: no atomics,
// two runs agree bit for bit. db1 and db2 are row sums of the operands' tiles.
#include "device/noise.cuh"
#include "product.cuh"

namespace mixer_kernels {
namespace {

// Whether tiles of 104 tokens pad S less than those of 128.
bool takes_token_tiles(int S) {
    return tiles(S, TokenTile::kN) * TokenTile::kN < tiles(S, LargeTile::kN) * LargeTile::kN;
}

template <class T>
struct WeightGradient {
    Stream left, right;
    mk_size size;
    int D_S;
    int64_t C_left, stride_b, stride_s;
    bool right_copied;
    mk_norm norm;
    Noise noise;
    int splits;
    float *partial, *bias;

    explicit WeightGradient(const mk_token_weight_gradient_arguments& p)
        : left(p.left, p.type, p.D_S * p.C_left, p.C_left, 1),
          right(p.right),
          size(p.size),
          D_S(p.D_S),
          C_left(p.C_left),
          stride_b(p.right.stride_b),
          stride_s(p.right.stride_s),
          right_copied(right.has_vectors && p.right.type == p.type),
          norm(p.norm == nullptr ? mk_norm{} : *p.norm),
          noise(p.noise),
          splits(p.splits),
          partial(p.partial),
          bias(p.bias) {}
};

// A split's share of the stages of all images, in order, without those of dropped images.
class DepthOfSplit {
  public:
    __device__ __forceinline__ DepthOfSplit(const mk_size& size, const Noise& noise, int split, int splits)
        : noise_(noise), C_(size.C) {
        const int64_t of_image = tiles(size.C, kStep), all = size.B * of_image;
        const int64_t first = share(all, split, splits);
        end_ = share(all, split + 1, splits);
        at_ = first;
        image_ = first / of_image;
        k_ = static_cast<int>(first % of_image) * kStep;
        skip_dropped();
    }
    __device__ __forceinline__ bool more() const { return at_ < end_; }
    __device__ __forceinline__ Depth at() const { return {image_, k_, C_ - k_}; }
    __device__ __forceinline__ void next() {
        ++at_;
        k_ += kStep;
        if (k_ >= C_) {
            next_image();
            skip_dropped();
        }
    }

  private:
    // split / splits of all, without overflow
    __device__ __forceinline__ static int64_t share(int64_t all, int split, int splits) {
        return all / splits * split + all % splits * split / splits;
    }
    __device__ __forceinline__ void next_image() {
        ++image_;
        k_ = 0;
    }
    __device__ __forceinline__ void skip_dropped() {
        if (!noise_.drop_path()) return;
#pragma unroll 1
        while (more() && noise_.kept_image(image_) == 0.0f) {
            at_ += tiles(C_ - k_, kStep);
            next_image();
        }
    }

    const Noise& noise_;
    int64_t at_, end_, image_;
    int C_, k_;
};

// Sums a row of a tile to a thread, stage by stage.
template <class T, class Tile>
struct RowSums {
    static_assert(Tile::kThreads >= Tile::kM && Tile::kThreads >= Tile::kN, "a thread for each row");
    bool of_left, of_right;
    float sum = 0.0f;

    __device__ __forceinline__ bool works() const {
        return (of_left && threadIdx.x < Tile::kM) || (of_right && threadIdx.x < Tile::kN);
    }
    __device__ __forceinline__ void operator()(const T* left, const T* right) {
        if (!works()) return;
        const T* tile = of_left ? left : right;
#pragma unroll
        for (int chunk = 0; chunk < kStep / 8; ++chunk) {
            float v[8];
            unpack8<T>(*reinterpret_cast<const uint4*>(tile + chunk_along_k(threadIdx.x, chunk)), v);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += v[i];
        }
    }
};

template <class T>
struct PartialEpilogue {
    struct Columns {};
    struct Row {};
    float* partial;  // [D_S, S] of the split
    int S, d, s;

    __device__ __forceinline__ Columns columns(int, int) const { return {}; }
    __device__ __forceinline__ Row fetch(int, int, int) const { return {}; }
    __device__ __forceinline__ void finish(float (&v)[8], const Row&, Columns&, int row, int column, int valid) const {
        store8(partial, MK_FLOAT32, static_cast<int64_t>(d + row) * S + s + column, valid, v);
    }
};

template <class T, class Tile, bool is_w1>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    token_weight_gradient_kernel(const WeightGradient<T> p) {
    const int S = p.size.S;
    const int64_t d_tiles = tiles(p.D_S, Tile::kM), s_tiles = tiles(S, Tile::kN), rest = blockIdx.x / d_tiles;
    const int d = static_cast<int>(blockIdx.x % d_tiles) * Tile::kM, s = static_cast<int>(rest % s_tiles) * Tile::kN;
    const int split = static_cast<int>(rest / s_tiles);

    Operand<T, Tile, Tile::kM, true, Access::kCopiedOrRead> left(p.left.from(d * p.C_left),
                                                                 TileRows(p.C_left, p.D_S - d, Tile::kM),
                                                                 p.D_S * p.C_left, 0, {}, p.left.has_vectors);
    const TileNorm norm{p.norm, s, S, 0};
    constexpr Access access = is_w1 ? Access::kLoaded : Access::kCopiedOrRead;
    Operand<T, Tile, Tile::kN, true, access> right(p.right.from(s * p.stride_s), TileRows(p.stride_s, S - s, Tile::kN),
                                                   p.stride_b, 0, norm, p.right_copied);
    RowSums<T, Tile> sums{is_w1 && s == 0, !is_w1 && d == 0};
    typename Tile::Accumulators accumulators;
    accumulate<T, Tile, true>(left, right, DepthOfSplit(p.size, p.noise, split, p.splits), sums, accumulators);

    float* const partial = p.partial + static_cast<int64_t>(split) * p.D_S * S;
    finish_tile<Tile>(accumulators, PartialEpilogue<T>{partial, S, d, s}, p.D_S - d, S - s);
    const int first = is_w1 ? d : s, length = is_w1 ? p.D_S : S, row = first + static_cast<int>(threadIdx.x);
    if (sums.works() && row < length) p.bias[static_cast<int64_t>(split) * length + row] = sums.sum;
}

template <class T>
int weight_gradient(const mk_token_weight_gradient_arguments& p, mk_stream stream) {
    const auto launch_tile = [&](auto tile) {
        using Tile = decltype(tile);
        const auto kernel = p.norm != nullptr ? token_weight_gradient_kernel<T, Tile, true>
                                              : token_weight_gradient_kernel<T, Tile, false>;
        return launch_product<Tile>(kernel, p.D_S, p.size.S, p.splits, stream, WeightGradient<T>(p));
    };
    return takes_token_tiles(p.size.S) ? launch_tile(TokenTile()) : launch_tile(LargeTile());
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_weight_gradient_splits(mk_size size, int D_S, int multiprocessors) {
    using namespace mixer_kernels;
    const int kN = takes_token_tiles(size.S) ? TokenTile::kN : LargeTile::kN;
    static_assert(TokenTile::kM == LargeTile::kM && TokenTile::kBlocks == LargeTile::kBlocks);
    const int64_t of_product = tiles(D_S, LargeTile::kM) * tiles(size.S, kN);
    const int64_t stages = size.B * tiles(size.C, kStep),
                  blocks = static_cast<int64_t>(LargeTile::kBlocks) * multiprocessors;
    const int64_t splits = blocks / (of_product > 0 ? of_product : 1);
    return static_cast<int>(splits < 1 || stages < 1 ? 1 : splits < stages ? splits : stages);
}

extern "C" int mk_token_weight_gradient(const mk_token_weight_gradient_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_token_weight_gradient_arguments& p = *arguments;
    if (p.size.B < 0 || p.size.S < 1 || p.size.C < 1 || p.D_S < 1 || p.splits < 1 || p.C_left < p.size.C ||
        p.type == MK_FLOAT32) {
        return cudaErrorInvalidValue;
    }
    return p.type == MK_BFLOAT16 ? weight_gradient<bfloat16>(p, stream) : weight_gradient<float16>(p, stream);
}
