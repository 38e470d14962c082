// What the launchers of sm_90a take.
#include "launchers.h"

// The channel products see x as a matrix, the fused token kernels as three axes. Rows, and B times the groups of 64
// channels with a step of the grid past them, are counted in 32 bits; TMA's strides in 40.
extern "C" int mk_sm90_takes(mk_input x, mk_size size, mk_type type, int tokens) {
    const auto whole = [](int64_t elements, int64_t length) {
        return length <= 1 || (elements > 0 && elements % 8 == 0 && elements < int64_t{1} << 39);
    };
    const int64_t most = INT32_MAX / 2;
    return (type == MK_BFLOAT16 || type == MK_FLOAT16) && x.type == type && size.C > 0 && size.C % 8 == 0 &&
           size.S > 0 && size.B >= 0 && size.B * ((size.C + 63) / 64) <= most && size.B * size.S <= most &&
           x.stride_c == 1 && whole(x.stride_s, size.S) && whole(x.stride_b, size.B) &&
           reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
           (tokens ? mk_sm90_padded_tokens(size.S) != 0
                   : size.B <= 1 || size.S == 1 || x.stride_b == x.stride_s * size.S);
}

extern "C" int mk_sm90_padded_tokens(int S) { return S <= 64 ? 64 : S <= 208 ? 208 : S <= 256 ? 256 : 0; }
