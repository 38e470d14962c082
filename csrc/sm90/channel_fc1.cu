// a = GELU(z), z = LN(u) . W3' + b3 on sm_90a: equations (6), (8) of docs/maths.md.
#include "../device/gelu.cuh"
#include "launchers.h"
#include "product.cuh"

namespace mixer_kernels {
namespace sm90 {
namespace {

template <class T>
class Fc1Epilogue {
  public:
    static constexpr int kVectors = 3, kExtra = 0, kScratch = 0;
    static constexpr bool kLoads = false;

    explicit Fc1Epilogue(const mk_channel_fc1_arguments& p)
        : mean_(p.norm.mean),
          rstd_(p.norm.rstd),
          b_(p.wg != nullptr ? p.wb : p.b3),
          wg_(p.wg),
          scale_(p.scale),
          noise_(p.noise),
          S_(p.size.S),
          tanh_form_(p.tanh != 0),
          has_a_(p.a != nullptr),
          has_z_(p.z != nullptr) {}

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
    __device__ __forceinline__ const float* vector(int i) const { return i == 0 ? b_ : i == 1 ? wg_ : scale_; }
    __device__ __forceinline__ float otherwise(int i) const { return i == 2 ? 1.0f : 0.0f; }

    __device__ __forceinline__ RowTerms row(int m) const {
        RowTerms terms{0.0f, 1.0f, 0, 0};
        if (wg_ != nullptr) {
            terms.x = mean_[m];
            terms.y = rstd_[m];
        }
        if (noise_.dropout()) {
            terms.image = m / S_;
            terms.token = m - terms.image * S_;
        }
        return terms;
    }

    template <Form form, class TILE, class RESULTS>
    __device__ __forceinline__ void finish(const float* d, const Chunk<TILE>& chunk, const Product<Fc1Epilogue>& p,
                                           Corner, int, char*, RESULTS& results) const {
        if (has_z_) {
#pragma unroll
            for (int quarter = 0; quarter < 4; ++quarter) {
                float z[8];
                hidden(d + 8 * quarter, chunk, quarter, z);
                store(results.place(quarter), z);
            }
            results.leave(p.other, chunk.m, chunk.n);
        }
        if (has_a_) {
#pragma unroll
            for (int quarter = 0; quarter < 4; ++quarter) {
                float a[8];
                hidden(d + 8 * quarter, chunk, quarter, a);
#pragma unroll
                for (int i = 0; i < 8; ++i) a[i] = gelu(a[i], form == Form::dropout ? tanh_form_ : form == Form::tanh);
                if constexpr (form == Form::dropout) {
                    const auto factors = chunk.factors(quarter, [&](int column, int token, int image) {
                        return noise_.kept_hidden(column, token, image);
                    });
#pragma unroll
                    for (int i = 0; i < 8; ++i) a[i] *= factors[i];
                }
                store(results.place(quarter), a);
            }
            results.leave(p.stored, chunk.m, chunk.n);
        }
    }

  private:
    // z of a quarter, from its accumulators.
    template <class TILE>
    __device__ __forceinline__ void hidden(const float* d, const Chunk<TILE>& chunk, int quarter, float (&z)[8]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 b = chunk.vector(0, quarter, half), wg = chunk.vector(1, quarter, half),
                         scale = chunk.vector(2, quarter, half);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int i = 4 * half + 2 * r;
                z[i] = chunk.rows[r].y * (d[i] - chunk.rows[r].x * wg.x) * scale.x + b.x;
                z[i + 1] = chunk.rows[r].y * (d[i + 1] - chunk.rows[r].x * wg.y) * scale.y + b.y;
            }
        }
    }

    __device__ __forceinline__ static void store(shared_address place, const float (&v)[8]) {
        store_matrices_x4(place, {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])});
    }

    const float *mean_, *rstd_, *b_, *wg_, *scale_;
    Noise noise_;
    int S_;
    bool tanh_form_, has_a_, has_z_;
};

template <class T>
int fc1(const mk_channel_fc1_arguments& p, mk_sm90_schedule schedule, mk_device device, mk_stream stream) {
    Product<Fc1Epilogue<T>> product{{}, {}, {}, {}, {}, 0, 0, 0, 0, 0, 0, 0, Fc1Epilogue<T>(p)};
    int error = describe(&product, p.u, p.size, p.type, p.size.C, p.D_C);
    if (error == cudaSuccess && p.a != nullptr) {
        error = make_chunk_map(&product.stored, p.a, p.type, product, p.row);
    }
    if (error == cudaSuccess && p.z != nullptr) {
        error = make_chunk_map(&product.other, p.z, p.type, product, p.row);
    }
    if (error != cudaSuccess) return error;
    const Weight w3{p.w3, p.D_C, padded_depth(p.size.C)};
    return launch_product<T>(product, p.type, w3, schedule, device, stream);
}

}  // namespace
}  // namespace sm90
}  // namespace mixer_kernels

extern "C" int mk_sm90_channel_fc1_scheduled(const mk_channel_fc1_arguments* arguments, mk_sm90_schedule schedule,
                                             mk_device device, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_channel_fc1_arguments& p = *arguments;
    // A norm that is not folded would have to be applied to u, which TMA leaves as it is.
    const bool has_norm = p.norm.mean != nullptr || p.norm.gamma != nullptr || p.norm.beta != nullptr;
    if (!sm90::is_sound(p.size, p.D_C, p.type) || (p.wg == nullptr && has_norm)) {
        return cudaErrorInvalidValue;
    }
    if (p.size.B == 0 || (p.a == nullptr && p.z == nullptr)) return cudaSuccess;
    return p.type == MK_BFLOAT16 ? sm90::fc1<bfloat16>(p, schedule, device, stream)
                                 : sm90::fc1<float16>(p, schedule, device, stream);
}

extern "C" int mk_sm90_channel_fc1_forward(const mk_channel_fc1_arguments* arguments, mk_device device,
                                           mk_stream stream) {
    const mk_size size = arguments->size;
    return mk_sm90_channel_fc1_scheduled(
        arguments, mk_sm90_channel_schedule(MK_SM90_FC1, size.B * size.S, arguments->D_C, size.C, device), device,
        stream);
}
