// Token mixing in bfloat16, and the entry for both types.
#include "token_mixing_kernel.cuh"

namespace mixer_kernels {
namespace {

// Whether what is asked for is one of the variants there are.
bool is_variant(const mk_sm90_token_mixing_arguments& p) {
    const bool consumers = p.consumers == 0 || p.consumers == 2 || (p.consumers == 3 && p.S_pad == 64);
    return consumers && p.cluster >= 0 && p.cluster <= 2 && p.pipelined >= 0 && p.pipelined <= 2;
}

}  // namespace
}  // namespace mixer_kernels

extern "C" int mk_sm90_token_mixing_forward(const mk_sm90_token_mixing_arguments* arguments, mk_stream stream) {
    using namespace mixer_kernels;
    const mk_sm90_token_mixing_arguments& p = *arguments;
    if (!mk_sm90_takes(p.x, p.size, p.type, 1) || p.size.S > p.S_pad || p.D <= 0 || p.D % kStepHidden != 0 ||
        !takes_bias(p.b1) || !is_variant(p) || reinterpret_cast<uintptr_t>(p.partial) % sizeof(float2) != 0) {
        return cudaErrorInvalidValue;
    }
    if (p.size.B == 0) return cudaSuccess;
    return p.type == MK_BFLOAT16 ? dispatch<bfloat16>(p, stream) : token_mixing_float16(p, stream);
}
