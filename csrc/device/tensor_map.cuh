// TMA: asynchronous copies of boxes of a tensor, by one thread, between global and shared memory.
//
// A tensor map says where the tensor lies and how large a box is; kernels take it as
// `const __grid_constant__ TensorMap map`. A box's elements lie in shared memory in the order of the tensor's axes,
// axis 0 innermost, 128-byte aligned. Swizzled by w bytes, the 16-byte chunks of w bytes of it change places: with
// Swizzle::bytes_128, chunk i of the r-th 128 bytes from a multiple of 1024 lies where i ^ (r % 8) would. wgmma's
// operands (warpgroup.cuh) are read the same way. What of a box is outside of the tensor is read as 0 and not written.
#pragma once

#ifndef MIXER_KERNELS_ON_HOST
#include <cuda.h>

#include <atomic>
#include <cstdio>
#endif

#include "barrier.cuh"

namespace mixer_kernels {

enum class Swizzle { none = 0, bytes_32 = 32, bytes_64 = 64, bytes_128 = 128 };

#ifdef MIXER_KERNELS_ON_HOST

using cuda_on_host::load_tile;
using cuda_on_host::load_tile_multicast;
using cuda_on_host::prefetch;
using cuda_on_host::store_commit;
using cuda_on_host::store_tile;
using cuda_on_host::store_wait;
using cuda_on_host::store_wait_read;
using cuda_on_host::TensorMap;

#else

using TensorMap = CUtensorMap;

// ------------------------------------------------------------------------------------------------------------- load

// The box at (i0, i1[, i2]), of which its bytes, those outside of the tensor too, count at the barrier.
__device__ __forceinline__ void load_tile(shared_address to, const TensorMap& map, shared_address barrier, int i0,
                                          int i1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1)
        : "memory");
}

__device__ __forceinline__ void load_tile(shared_address to, const TensorMap& map, shared_address barrier, int i0,
                                          int i1, int i2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(to),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2)
        : "memory");
}

// The same to the same place in each block of the cluster whose bit is set in `blocks`, and to its barrier.
__device__ __forceinline__ void load_tile_multicast(shared_address to, const TensorMap& map, shared_address barrier,
                                                    uint16_t blocks, int i0, int i1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
        "l"(&map), "r"(barrier), "h"(blocks), "r"(i0), "r"(i1)
        : "memory");
}

__device__ __forceinline__ void load_tile_multicast(shared_address to, const TensorMap& map, shared_address barrier,
                                                    uint16_t blocks, int i0, int i1, int i2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
        "l"(&map), "r"(barrier), "h"(blocks), "r"(i0), "r"(i1), "r"(i2)
        : "memory");
}

// ------------------------------------------------------------------------------------------------------------ store

// Reads what threads wrote to shared memory before their fence_async_shared.
__device__ __forceinline__ void store_tile(const TensorMap& map, shared_address from, int i0, int i1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from),
                 "r"(i0), "r"(i1)
                 : "memory");
}

__device__ __forceinline__ void store_tile(const TensorMap& map, shared_address from, int i0, int i1, int i2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(from), "r"(i0), "r"(i1), "r"(i2)
                 : "memory");
}

// Closes the group of this thread's stores since the last commit.
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most N of this thread's latest groups still read shared memory. A thread that stores ends with
// store_wait_read<0>, for its block's shared memory is gone after it.
template <int N>
__device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Until what the others wrote is there for this thread to read.
template <int N>
__device__ __forceinline__ void store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --------------------------------------------------------------------------------------------------------- host code

// The driver's cuTensorMapEncodeTiled. Asked for at run time, so that nothing links to libcuda; again where the answer
// was none, for a driver that was not ready may be later.
inline cudaError_t tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)* encoder) {
    static std::atomic<void*> known{nullptr};
    void* function = known.load(std::memory_order_acquire);
    cudaError_t error = cudaSuccess;
    if (function == nullptr) {
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        if (error == cudaSuccess && found != cudaDriverEntryPointSuccess) error = cudaErrorNotSupported;
        if (error == cudaSuccess) known.store(function, std::memory_order_release);
    }
    *encoder = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    return error;
}

// Encoding wants a current context, which a thread that has launched nothing yet may lack: autograd's.
inline cudaError_t ensure_context() {
    static thread_local bool ensured = false;
    if (ensured) return cudaSuccess;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);  // from CUDA 12 on it makes the context
    ensured = error == cudaSuccess;
    return error;
}

// Which map was refused, for mk_error_string.
inline void note_refused_map(int error, const void* base, int rank, const int64_t* sizes, const int64_t* strides,
                             const int* box, int swizzle) {
    char text[300];
    int end = std::snprintf(text, sizeof text, "tensor map of %p refused, CUresult %d:", base, error);
    for (int i = 0; i < rank && end < static_cast<int>(sizeof text); ++i) {
        end += std::snprintf(text + end, sizeof text - end, " axis %d size %lld stride %lld box %d;", i,
                             static_cast<long long>(sizes[i]), i == 0 ? 1LL : static_cast<long long>(strides[i - 1]),
                             box[i]);
    }
    if (end < static_cast<int>(sizeof text)) std::snprintf(text + end, sizeof text - end, " swizzle %d", swizzle);
    mk_note_error(text);
}

#endif

// The map of a tensor of up to 5 axes, axis 0 with stride 1, and of boxes of `box` elements. strides: in elements, of
// axes 1 and up. Returns 0 or a cudaError_t: cudaErrorInvalidValue unless base and strides are multiples of 16 bytes,
// box is 1 to 256 along each axis, and along axis 0 a multiple of 16 bytes and within the swizzle's. Where the driver
// refuses a map its CUresult is returned, which has the number of the same cudaError_t: 700 and 719 are of a kernel
// that failed before.
inline int make_tensor_map(TensorMap* map, const void* base, mk_type type, int rank, const int64_t* sizes,
                           const int64_t* strides, const int* box, Swizzle swizzle) {
#ifdef MIXER_KERNELS_ON_HOST
    return cuda_on_host::make_tensor_map(map, base, type == MK_FLOAT32 ? 4 : 2, rank, sizes, strides, box,
                                         static_cast<int>(swizzle));
#else
    constexpr int most = 5;
    if (rank < 1 || rank > most) return cudaErrorInvalidValue;
    decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    cudaError_t failed = ensure_context();
    if (failed == cudaSuccess) failed = tensor_map_encoder(&encode);
    if (failed != cudaSuccess) return failed;
    const cuuint64_t element = type == MK_FLOAT32 ? 4 : 2;
    cuuint64_t lengths[most], bytes[most];
    cuuint32_t box_lengths[most], steps[most];
    for (int i = 0; i < rank; ++i) {
        lengths[i] = static_cast<cuuint64_t>(sizes[i]);
        box_lengths[i] = static_cast<cuuint32_t>(box[i]);
        steps[i] = 1;
        if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * element;
    }
    const CUtensorMapDataType number = type == MK_FLOAT32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                       : type == MK_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    const int which = swizzle == Swizzle::bytes_128  ? 3
                      : swizzle == Swizzle::bytes_64 ? 2
                      : swizzle == Swizzle::bytes_32 ? 1
                                                     : 0;
    const CUresult error = encode(map, number, static_cast<cuuint32_t>(rank), const_cast<void*>(base), lengths, bytes,
                                  box_lengths, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[which],
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) {
        note_refused_map(error, base, rank, sizes, strides, box, static_cast<int>(swizzle));
    }
    return error;
#endif
}

}  // namespace mixer_kernels
