// y = u + a . W4' + b4 on sm_90a: equation (7) of docs/maths.md.
#include "launchers.h"
#include "product.cuh"

namespace mixer_kernels {
namespace sm90 {
namespace {

template <class T>
class Fc2Epilogue {
  public:
    static constexpr int kVectors = 1, kExtra = 0, kScratch = 0;
    static constexpr bool kLoads = true;

    explicit Fc2Epilogue(const mk_channel_fc2_arguments& p) : b4_(p.b4), noise_(p.noise), S_(p.size.S) {}

    __device__ __forceinline__ const Noise& noise() const { return noise_; }
    template <class F>
    __device__ __forceinline__ void in_form(F f) const {  // there is no GELU
        if (noise_.dropout()) {
            f(AsForm<Form::dropout>());
        } else {
            f(AsForm<Form::erf>());
        }
    }
    __device__ __forceinline__ const float* vector(int) const { return b4_; }
    __device__ __forceinline__ float otherwise(int) const { return 0.0f; }

    __device__ __forceinline__ RowTerms row(int m) const {
        RowTerms terms{1.0f, 0.0f, 0, 0};
        if (noise_.dropout() || noise_.drop_path()) {
            terms.image = m / S_;
            terms.token = m - terms.image * S_;
            terms.x = noise_.kept_image(terms.image);
        }
        return terms;
    }

    template <Form form, class TILE, class RESULTS>
    __device__ __forceinline__ void finish(const float* d, const Chunk<TILE>& chunk, const Product<Fc2Epilogue>&,
                                           Corner corner, int number, char*, RESULTS& results) const {
        results.wait_loaded();
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            uint32_t packed[4];
            load_matrices_x4(packed, results.place(quarter));
            float v[8];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 b4 = chunk.vector(0, quarter, half);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int i = 4 * half + 2 * r;
                    v[i] = d[8 * quarter + i] + b4.x;
                    v[i + 1] = d[8 * quarter + i + 1] + b4.y;
                }
            }
            if constexpr (form == Form::dropout) {
                const auto factors = chunk.factors(quarter, [&](int column, int token, int image) {
                    return noise_.kept_branch(column, token, image);
                });
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] *= factors[i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 u = unpack<T>(packed[i]);
                const float kept = chunk.rows[i % 2].x;
                packed[i] = pack<T>(u.x + kept * v[2 * i], u.y + kept * v[2 * i + 1]);
            }
            __syncwarp();  // all lanes have their u
            store_matrices_x4(results.place(quarter), packed);
        }
        results.leave_and_load(corner, number, false, chunk.m, chunk.n, true, [](shared_address, shared_address) {});
    }

  private:
    const float* b4_;
    Noise noise_;
    int S_;
};

template <class T>
int fc2(const mk_channel_fc2_arguments& p, mk_sm90_schedule schedule, mk_device device, mk_stream stream) {
    Product<Fc2Epilogue<T>> product{{}, {}, {}, {}, {}, 0, 0, 0, 0, 0, 0, 0, Fc2Epilogue<T>(p)};
    const mk_input a{p.a, p.type, p.size.S * p.row, p.row, 1};
    int error = describe(&product, a, p.size, p.type, p.D_C, p.size.C);
    if (error == cudaSuccess) error = are_rows(p.u, p.size, p.type) ? cudaSuccess : cudaErrorInvalidValue;
    const int64_t row = row_stride(p.u, p.size, p.size.C);
    if (error == cudaSuccess) error = make_chunk_map(&product.loaded, p.u.data, p.type, product, row);
    if (error == cudaSuccess) error = make_chunk_map(&product.stored, p.y, p.type, product, p.size.C);
    if (error != cudaSuccess) return error;
    const Weight w4{p.w4, p.size.C, padded_depth(p.D_C)};
    return launch_product<T>(product, p.type, w4, schedule, device, stream);
}

}  // namespace
}  // namespace sm90
}  // namespace mixer_kernels

extern "C" int mk_sm90_channel_fc2_scheduled(const mk_channel_fc2_arguments* arguments, mk_sm90_schedule schedule,
                                             mk_device device, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_channel_fc2_arguments& p = *arguments;
    if (!sm90::is_sound(p.size, p.D_C, p.type)) return cudaErrorInvalidValue;
    if (p.size.B == 0) return cudaSuccess;
    return p.type == MK_BFLOAT16 ? sm90::fc2<bfloat16>(p, schedule, device, stream)
                                 : sm90::fc2<float16>(p, schedule, device, stream);
}

extern "C" int mk_sm90_channel_fc2_forward(const mk_channel_fc2_arguments* arguments, mk_device device,
                                           mk_stream stream) {
    const mk_size size = arguments->size;
    return mk_sm90_channel_fc2_scheduled(
        arguments, mk_sm90_channel_schedule(MK_SM90_FC2, size.B * size.S, size.C, arguments->D_C, device), device,
        stream);
}
