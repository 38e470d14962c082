// What threads, blocks and asynchronous copies of sm_90a wait for each other with: mbarriers, named barriers, clusters.
//
// An mbarrier is 8 bytes of shared memory, 8-byte aligned. Its phases are numbered from 0; one ends when all arrivals
// of barrier_init and all bytes of barrier_expect in it have come. barrier_wait(barrier, parity) returns once the phase
// with that parity, the current one or the one before, has ended: a new barrier's parity 1 has. Thus a slot's n-th use
// waits for parity n % 2 to be full, and for (n + 1) % 2 to be empty. No thread may fall two phases behind.
#pragma once

#include "platform.cuh"

#ifdef MK_BOUNDED_WAITS
#include <cstdio>
#endif

namespace mixer_kernels {

#ifdef MIXER_KERNELS_ON_HOST

using cuda_on_host::barrier_arrive;
using cuda_on_host::barrier_arrive_in;
using cuda_on_host::barrier_expect;
using cuda_on_host::barrier_init;
using cuda_on_host::barrier_init_fence;
using cuda_on_host::barrier_wait;
using cuda_on_host::cluster_rank;
using cuda_on_host::cluster_sync;
using cuda_on_host::decrease_registers;
using cuda_on_host::fence_async_shared;
using cuda_on_host::increase_registers;
using cuda_on_host::named_barrier_arrive;
using cuda_on_host::named_barrier_sync;

#else

// By one thread, before others know of the barrier.
__device__ __forceinline__ void barrier_init(shared_address barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// By the thread that has made barriers: then TMA and other blocks may use them, after a __syncthreads or cluster_sync.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(shared_address barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier of the same address in another block of the cluster, or in this one. For slots whose reads are
// over: with .release.cluster, which would also publish this thread's writes to the other block, it would be a fence of
// the whole GPU.
__device__ __forceinline__ void barrier_arrive_in(shared_address barrier, int block) {
    asm volatile(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
        "r"(block)
        : "memory");
}

// Arrives, and has the phase wait for that many bytes of load_tile too. Bytes outside of the tensor count.
__device__ __forceinline__ void barrier_expect(shared_address barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_has_ended(shared_address barrier, int parity) {
    uint32_t ended;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return ended != 0;
}

#ifndef MK_BOUNDED_WAITS

__device__ __forceinline__ void barrier_wait(shared_address barrier, int parity) {
    while (!barrier_has_ended(barrier, parity)) {
    }
}

#else

// For the first runs on a GPU: a barrier that waits for over 2 s says where, and ends the kernel with an error.
static __device__ __noinline__ void barrier_give_up(const char* file, int line, const char* function,
                                                    shared_address barrier, int parity) {
    printf("mixer_kernels: %s, %s:%d: block %u, warp %u waits for parity %d of the barrier at %u for over 2 s\n",
           function, file, line, blockIdx.x, threadIdx.x / 32, parity, barrier);
    __trap();
}

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

__device__ __forceinline__ void barrier_wait(shared_address barrier, int parity, const char* file = __builtin_FILE(),
                                             int line = __builtin_LINE(), const char* function = __builtin_FUNCTION()) {
    constexpr uint64_t longest = 2000000000;
    if (barrier_has_ended(barrier, parity)) return;
    const uint64_t start = nanoseconds();
    while (!barrier_has_ended(barrier, parity)) {
        if (nanoseconds() - start > longest) barrier_give_up(file, line, function, barrier, parity);
    }
}

#endif

// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, whole warps, that come to sync or to arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Comes without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread wrote to shared memory before is seen by the async proxy after: wgmma's operands in shared memory,
// and TMA. By the threads that wrote, before the barrier that tells the thread that issues those.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The number of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// All threads of all blocks of the cluster. Before the first use of another block's shared memory, and after the last.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// From now on this warpgroup's threads have REGISTERS registers each, a multiple of 8 from 24 to 256. All of its warps;
// an increase waits until others have given back enough of the block's.
template <int REGISTERS>
__device__ __forceinline__ void increase_registers() {
    static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void decrease_registers() {
    static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

}  // namespace mixer_kernels
