// Asynchronous copies from global to shared memory, in groups that a thread waits for in order.
#pragma once

#include "platform.cuh"

namespace mixer_kernels {

// 16 bytes, of which the first valid_bytes are read and the rest become 0. Both addresses are 16-byte aligned, also
// where nothing is read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid_bytes) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::cp_async_16(shared, global, valid_bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(__cvta_generic_to_global(global)),
                   "r"(valid_bytes)
                 : "memory");
#endif
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most N of this thread's latest groups are under way. Other threads' copies need their wait and a barrier.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace mixer_kernels
