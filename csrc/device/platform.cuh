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

// Instructions of sm_90a can be used: elsewhere a kernel that needs them compiles to nothing.
#if defined(MIXER_KERNELS_ON_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MK_HAS_SM90A
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

// An address in the block's shared memory, as instructions take it, and back.
using shared_address = uint32_t;

__device__ __forceinline__ shared_address address_of(const void* shared) {
#ifdef MIXER_KERNELS_ON_HOST
    return cuda_on_host::address_of(shared);
#else
    return static_cast<shared_address>(__cvta_generic_to_shared(shared));
#endif
}

template <class T>
__device__ __forceinline__ T* pointer_to(shared_address address) {
#ifdef MIXER_KERNELS_ON_HOST
    return static_cast<T*>(cuda_on_host::pointer_to(address));
#else
    return static_cast<T*>(__cvta_shared_to_generic(address));
#endif
}

// v, which is the same in all lanes of the warp, in a register that the compiler knows to be so.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

template <class T>
struct exactly {  // keeps a parameter out of template argument deduction
    using type = T;
};

// Launches a kernel in clusters of `cluster` blocks side by side along x, a divisor of grid.x, at most 8 (of sm_90 on).
// Returns 0 or a cudaError_t. An empty grid has nothing to run.
template <class... P>
int launch_cluster(void (*kernel)(P...), dim3 grid, dim3 block, int cluster, size_t shared_bytes, mk_stream stream,
                   typename exactly<P>::type... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    const void* function = reinterpret_cast<const void*>(kernel);
#ifdef MIXER_KERNELS_ON_HOST
    (void)stream;
    return cuda_on_host::launch(function, [&] { kernel(args...); }, grid, block, cluster, shared_bytes);
#else
    constexpr size_t without_asking = 48 << 10;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > without_asking) {
        error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = cluster > 1 ? 1 : 0;  // so that GPUs without clusters can launch too
        void* pointers[] = {static_cast<void*>(&args)...};
        error = cudaLaunchKernelExC(&config, function, pointers);
    }
    if (error != cudaSuccess) cudaGetLastError();  // reported here, so nobody else should find it
    return error;
#endif
}

// Launches a kernel whose blocks have nothing to do with each other.
template <class... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, mk_stream stream,
           typename exactly<P>::type... args) {
    return launch_cluster<P...>(kernel, grid, block, 1, shared_bytes, stream, args...);
}

}  // namespace mixer_kernels
