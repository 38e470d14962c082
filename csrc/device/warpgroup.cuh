// Matrix products of a warpgroup (128 threads, from a multiple of 128) on sm_90a: D [64, N] += A [64, 16] . B [16, N].
//
// Accumulators (PTX ISA, wgmma fragments): with warp = thread / 32 % 4, group = lane / 4 and pair = 2 * (lane % 4),
//   D  d[4 j + 0], d[4 j + 1]: row 16 warp + group, columns 8 j + pair and the next; d[4 j + 2], d[4 j + 3]: row + 8
//   A  a[0], a[1], a[2], a[3] as in matrix.cuh, of rows 16 warp to 16 warp + 15
// so that columns 16 k to 16 k + 15 of an accumulator, packed in pairs, are the A of a product's k-th step.
//
// Operands in shared memory are described by operand(): 8 x 8 cores as rows of 16 bytes, in a pattern of the swizzle's
// width, w bytes, that starts at a multiple of 8 w bytes:
//   Major::k   (K inside a row): row r at r % 8 * w + r / 8 * stride_bytes; a step of 16 along K is 32 bytes on.
//              leading_bytes is read without swizzle only: from one 16-byte column to the next.
//   Major::mn  (M or N inside a row): k at k % 8 * w + k / 8 * stride_bytes, and the next w / 2 elements of the row
//              leading_bytes on. Without swizzle: k in rows of 16 bytes, the next 8 of K leading_bytes on, the next 8
//              of M or N stride_bytes on.
//
// wgmma runs on its own time: between wgmma_fence() and the wgmma_wait() that covers it no thread touches d or the
// registers of A; shared operands have to stay until then.
#pragma once

#include "barrier.cuh"
#include "numbers.cuh"
#include "tensor_map.cuh"

namespace mixer_kernels {

enum class Major { k, mn };

}  // namespace mixer_kernels

#ifndef MIXER_KERNELS_ON_HOST
#include "wgmma_shapes.cuh"
#endif

namespace mixer_kernels {

// PTX ISA, "Matrix descriptor": 14 bits each for addresses and offsets, in units of 16 bytes.
template <Swizzle S>
__device__ __forceinline__ uint64_t descriptor(shared_address start, int leading_bytes, int stride_bytes) {
    constexpr uint64_t mode = S == Swizzle::bytes_128 ? 1 : S == Swizzle::bytes_64 ? 2 : S == Swizzle::bytes_32 ? 3 : 0;
    const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
    return field(start) | field(static_cast<uint32_t>(leading_bytes)) << 16 |
           field(static_cast<uint32_t>(stride_bytes)) << 32 | mode << 62;
}

// The operand that starts `bytes`, a multiple of 16, after this one: cheaper than to describe it anew. An address in
// shared memory is below 256 KiB, so that nothing is carried over into the next field.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int bytes) {
    return operand + static_cast<uint64_t>(bytes / 16);
}

#ifdef MIXER_KERNELS_ON_HOST

template <Swizzle S>
inline uint64_t operand(shared_address start, int leading_bytes, int stride_bytes,
                        cuda_on_host::Where where = cuda_on_host::Where::current()) {
    cuda_on_host::check_operand(start, leading_bytes, stride_bytes, where);
    return descriptor<S>(start, leading_bytes, stride_bytes);
}

using cuda_on_host::keep;
using cuda_on_host::wgmma_commit;
using cuda_on_host::wgmma_fence;
using cuda_on_host::wgmma_wait;

template <class T>
constexpr cuda_on_host::Operands operands_of = cuda_on_host::Operands::bfloat16;
template <>
inline constexpr cuda_on_host::Operands operands_of<float16> = cuda_on_host::Operands::float16;

template <class T, int N, Major B>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                  cuda_on_host::Where where = cuda_on_host::Where::current()) {
    cuda_on_host::wgmma(operands_of<T>, N, d, a, b, B == Major::mn, accumulate, where);
}

template <class T, int N, Major A, Major B>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true,
                  cuda_on_host::Where where = cuda_on_host::Where::current()) {
    cuda_on_host::wgmma(operands_of<T>, N, d, a, A == Major::mn, b, B == Major::mn, accumulate, where);
}

#else

template <Swizzle S>
__device__ __forceinline__ uint64_t operand(shared_address start, int leading_bytes, int stride_bytes) {
    return descriptor<S>(start, leading_bytes, stride_bytes);
}

// Before the first wgmma, and wherever registers of d or a have been written since the last.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the warpgroup's products since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N of the warpgroup's latest groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler moves no use of these registers past this point. After a wgmma_wait, whose products it does not know to
// have written them.
template <int N>
__device__ __forceinline__ void keep(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a . b, plus d if `accumulate`; A from registers, in T: bfloat16 or float16.
template <class T, int N, Major B>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
    WgmmaShape<T, N>::template run<B>(d, a, b, accumulate);
}

// The same with A from shared memory.
template <class T, int N, Major A, Major B>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
    WgmmaShape<T, N>::template run<A, B>(d, a, b, accumulate);
}

#endif

}  // namespace mixer_kernels
