// What the compiler shall not compute again.
#pragma once

#include "platform.cuh"

namespace mixer_kernels {

// Keeps a value in its register: without, the compiler computes it again from kernel arguments in each turn of a loop.
__device__ __forceinline__ void keep(int& value) {
#ifndef MIXER_KERNELS_ON_HOST
    asm volatile("" : "+r"(value));
#else
    (void)value;
#endif
}

template <class V>
__device__ __forceinline__ void keep(V& value) {
    static_assert(sizeof(V) == 8);
#ifndef MIXER_KERNELS_ON_HOST
    asm volatile("" : "+l"(value));
#else
    (void)value;
#endif
}

}  // namespace mixer_kernels
