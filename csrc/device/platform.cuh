// CUDA, or the CPU's model of it: the same kernels are compiled by nvcc for devices and by a C++ compiler for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../mixer_kernels.h"
#ifdef MIXER_KERNELS_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace mixer_kernels {

// The block's dynamic shared memory, 128-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef MIXER_KERNELS_ON_HOST
    return static_cast<T*>(cuda_on_host::shared_memory());
#else
    extern __shared__ __align__(128) unsigned char shared_memory_bytes[];
    return reinterpret_cast<T*>(shared_memory_bytes);
#endif
}

template <class T>
struct exactly {  // keeps a parameter out of template argument deduction
    using type = T;
};

// Launches a kernel and returns 0 or a cudaError_t. An empty grid has nothing to run.
template <class... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, mk_stream stream,
           typename exactly<P>::type... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    const void* function = reinterpret_cast<const void*>(kernel);
#ifdef MIXER_KERNELS_ON_HOST
    (void)stream;
    return cuda_on_host::launch(function, [&] { kernel(args...); }, grid, block, shared_bytes);
#else
    constexpr size_t without_asking = 48 << 10;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > without_asking) {
        error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
        void* pointers[] = {static_cast<void*>(&args)...};
        error = cudaLaunchKernel(function, grid, block, pointers, shared_bytes, static_cast<cudaStream_t>(stream));
    }
    if (error != cudaSuccess) cudaGetLastError();  // reported here, so nobody else should find it
    return error;
#endif
}

}  // namespace mixer_kernels
