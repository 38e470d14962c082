// dz = (g . W4) * GELU'(z), a = GELU(z) and column sums of dz on sm_90a: equation (20) of docs/maths.md.
#include "../device/gelu.cuh"
#include "launchers.h"
#include "product.cuh"

namespace mixer_kernels {
namespace sm90 {
namespace {

constexpr int kWarps = kWarpgroup / 32;

template <class T>
class GeluBackwardEpilogue {
  public:
    static constexpr int kVectors = 0, kExtra = 2;
    static constexpr int kScratch = 2 * kWarps * kChunk * 4;  // sums of warps, of two chunks
    static constexpr bool kLoads = true;

    GeluBackwardEpilogue(const mk_channel_gelu_backward_arguments& p, bool by_tiles)
        : sums_(p.sums),
          dz_(static_cast<T*>(p.dz)),
          a_(static_cast<T*>(p.a)),
          noise_(p.noise),
          S_(p.size.S),
          tanh_form_(p.tanh != 0),
          by_tiles_(by_tiles) {}

    __device__ __forceinline__ const Noise& noise() const { return noise_; }
    template <class F>
    __device__ __forceinline__ void in_form(F f) const {
        if (noise_.dropout()) {
            f(AsForm<Form::dropout>());
        } else if (tanh_form_) {
            f(AsForm<Form::tanh>());
        } else {
            f(AsForm<Form::erf>());
        }
    }
    __device__ __forceinline__ const float* vector(int) const { return nullptr; }
    __device__ __forceinline__ float otherwise(int) const { return 0.0f; }

    __device__ __forceinline__ RowTerms row(int m) const {
        RowTerms terms{};
        if (noise_.dropout()) {
            terms.image = m / S_;
            terms.token = m - terms.image * S_;
        }
        return terms;
    }

    template <Form form, class TILE, class RESULTS>
    __device__ __forceinline__ void finish(const float* d, const Chunk<TILE>& chunk,
                                           const Product<GeluBackwardEpilogue>& p, Corner corner, int number,
                                           char* scratch, RESULTS& results) const {
        results.wait_loaded();
        float* const of_warps = reinterpret_cast<float*>(scratch) + results.parity_of_extra() * kWarps * kChunk;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            uint32_t packed[4];
            load_matrices_x4(packed, results.place(quarter));
            float a[8], dz[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 z = unpack<T>(packed[i]);
                a[2 * i] = z.x;
                a[2 * i + 1] = z.y;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const bool tanh_form = form == Form::dropout ? tanh_form_ : form == Form::tanh;
                const GeluGradient gradient = gelu_and_slope(a[i], tanh_form);
                a[i] = gradient.a;
                dz[i] = d[8 * quarter + i] * gradient.slope;
            }
            if constexpr (form == Form::dropout) {
                const auto factors = chunk.factors(quarter, [&](int column, int token, int image) {
                    return noise_.kept_hidden(column, token, image);
                });
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    a[i] *= factors[i];
                    dz[i] *= factors[i];
                }
            }
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = dz[i % 2 + i / 2 * 4] + dz[i % 2 + i / 2 * 4 + 2];
            sum_rows(sums, of_warps + results.thread() / 32 * kChunk + 16 * quarter + chunk.column);
            __syncwarp();  // all lanes have their z
            store_matrices_x4(results.place(quarter), {pack<T>(dz[0], dz[1]), pack<T>(dz[2], dz[3]),
                                                       pack<T>(dz[4], dz[5]), pack<T>(dz[6], dz[7])});
            if (a_ != nullptr) {
                store_matrices_x4(results.extra_place(quarter),
                                  {pack<T>(a[0], a[1]), pack<T>(a[2], a[3]), pack<T>(a[4], a[5]), pack<T>(a[6], a[7])});
            }
        }
        results.leave_and_load(corner, number, a_ != nullptr, chunk.m, chunk.n, by_tiles_,
                               [&](shared_address slot, shared_address extra) {
                                   store_elements(slot, dz_, results.thread(), chunk.m, chunk.n, p.M, p.N);
                                   if (a_ != nullptr) {
                                       store_elements(extra, a_, results.thread(), chunk.m, chunk.n, p.M, p.N);
                                   }
                               });
        const int column = results.thread();
        if (column < kChunk && chunk.n + column < p.N && chunk.m < p.M) {
            float sum = of_warps[column];
#pragma unroll
            for (int warp = 1; warp < kWarps; ++warp) sum += of_warps[warp * kChunk + column];
            sums_[static_cast<int64_t>(chunk.m / kBlockRows) * p.N + chunk.n + column] = sum;
        }
    }

  private:
    // Sums of four columns over a warp's 16 rows, of a lane's two rows at first. Lanes 16 and 8 apart give each other
    // half of theirs and add what they are given to the others; what is left, one sum, is summed by lanes 4 apart.
    __device__ __forceinline__ static void sum_rows(float (&sums)[4], float* to) {
        const int lane = threadIdx.x % 32;
        const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float low = sums[i], high = sums[i + 2];
            sums[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 16);
        }
        const float low = sums[0], high = sums[1];
        float sum = (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, 8);
        sum += __shfl_xor_sync(~0u, sum, 4);
        if ((lane & 4) == 0) to[(upper ? 8 : 0) + (odd ? 1 : 0)] = sum;
    }

    // A chunk into rows that do not start on 16 bytes.
    __device__ __forceinline__ static void store_elements(shared_address chunk, T* to, int thread, int m, int n, int M,
                                                          int N) {
#pragma unroll 1
        for (int i = thread; i < kChunk * kChunk; i += kWarpgroup) {
            const int row = i / kChunk, column = i % kChunk;
            if (m + row >= M || n + column >= N) continue;
            const int place = row * kStepBytes + ((column / 8 ^ row % 8) << 4) + column % 8 * 2;
            to[static_cast<int64_t>(m + row) * N + n + column] = *pointer_to<T>(chunk + place);
        }
    }

    float* sums_;
    T *dz_, *a_;
    Noise noise_;
    int S_;
    bool tanh_form_, by_tiles_;
};

template <class T>
int gelu_backward(const mk_channel_gelu_backward_arguments& p, mk_sm90_schedule schedule, mk_device device,
                  mk_stream stream) {
    const bool by_tiles =
        p.D_C % 8 == 0 && reinterpret_cast<uintptr_t>(p.dz) % 16 == 0 && reinterpret_cast<uintptr_t>(p.a) % 16 == 0;
    Product<GeluBackwardEpilogue<T>> product{
        {}, {}, {}, {}, {}, 0, 0, 0, 0, 0, 0, 0, GeluBackwardEpilogue<T>(p, by_tiles)};
    const mk_input g{p.g, p.type, static_cast<int64_t>(p.size.S) * p.size.C, p.size.C, 1};
    int error = describe(&product, g, p.size, p.type, p.size.C, p.D_C);
    if (error == cudaSuccess) error = make_chunk_map(&product.loaded, p.z, p.type, product, p.row);
    if (error == cudaSuccess && by_tiles) error = make_chunk_map(&product.stored, p.dz, p.type, product, p.D_C);
    if (error == cudaSuccess && by_tiles && p.a != nullptr) {
        error = make_chunk_map(&product.other, p.a, p.type, product, p.D_C);
    }
    if (error != cudaSuccess) return error;
    const Weight w4t{p.w4t, p.D_C, padded_depth(p.size.C)};
    return launch_product<T>(product, p.type, w4t, schedule, device, stream);
}

}  // namespace
}  // namespace sm90
}  // namespace mixer_kernels

extern "C" int64_t mk_sm90_gelu_backward_tiles(int64_t rows) {
    constexpr int tile = mixer_kernels::sm90::kBlockRows;
    return (rows + tile - 1) / tile;
}

extern "C" int mk_sm90_channel_gelu_backward_scheduled(const mk_channel_gelu_backward_arguments* arguments,
                                                       mk_sm90_schedule schedule, mk_device device, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_channel_gelu_backward_arguments& p = *arguments;
    if (!sm90::is_sound(p.size, p.D_C, p.type)) return cudaErrorInvalidValue;
    if (p.size.B == 0) return cudaSuccess;
    return p.type == MK_BFLOAT16 ? sm90::gelu_backward<bfloat16>(p, schedule, device, stream)
                                 : sm90::gelu_backward<float16>(p, schedule, device, stream);
}

extern "C" int mk_sm90_channel_gelu_backward(const mk_channel_gelu_backward_arguments* arguments, mk_device device,
                                             mk_stream stream) {
    const mk_size size = arguments->size;
    return mk_sm90_channel_gelu_backward_scheduled(
        arguments, mk_sm90_channel_schedule(MK_SM90_GELU_BACKWARD, size.B * size.S, arguments->D_C, size.C, device),
        device, stream);
}
