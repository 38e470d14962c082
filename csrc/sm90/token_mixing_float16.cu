// Token mixing in float16.
#include "token_mixing_kernel.cuh"

int mixer_kernels::token_mixing_float16(const mk_sm90_token_mixing_arguments& p, mk_stream stream) {
    return dispatch<float16>(p, stream);
}
