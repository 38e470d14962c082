// Matrix products on the tensor cores: fragments from shared memory, and D += A . B of 16 x 8 x 16 tiles.
//
// Fragments are those of the PTX ISA's mma.m16n8k16 and ldmatrix. With group = lane / 4 and pair = 2 * (lane % 4), a
// lane holds, as pairs of 16-bit numbers (low half: the even index),
//   A [16, 16]  a[0], a[1], a[2], a[3]: rows group, group + 8, group, group + 8; columns pair + 0, 0, 8, 8 and the next
//   B [16, 8]   b0, b1: rows pair, pair + 8 and the next; column group
//   D [16, 8]   d[0], d[1]: row group, columns pair and the next; d[2], d[3]: row group + 8
// and ldmatrix gives it, of an 8 x 8 matrix, row group, columns pair and the next; of its transpose, if asked.
// load_matrices_x4 thus loads A from rows at which lane l points with row l % 16, column 8 * (l / 16).
#pragma once

#include "numbers.cuh"

namespace mixer_kernels {

// Four (two) 8 x 8 matrices of 16-bit numbers; lane l points at row l % 8, 16-byte aligned, of matrix l / 8.
// Of load_matrices_x2, lanes 16 to 31 point anywhere valid: they may repeat lanes 0 to 15.
__device__ __forceinline__ void load_matrices_x4(uint32_t (&r)[4], shared_address row) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::ldmatrix(r, 4, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_x4_transposed(uint32_t (&r)[4], shared_address row) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::ldmatrix(r, 4, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_x2(uint32_t (&r)[2], shared_address row) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::ldmatrix(r, 2, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_x2_transposed(uint32_t (&r)[2], shared_address row) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::ldmatrix(r, 2, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_x4(uint32_t (&r)[4], const void* row) {
    load_matrices_x4(r, address_of(row));
}

__device__ __forceinline__ void load_matrices_x4_transposed(uint32_t (&r)[4], const void* row) {
    load_matrices_x4_transposed(r, address_of(row));
}

__device__ __forceinline__ void load_matrices_x2(uint32_t (&r)[2], const void* row) {
    load_matrices_x2(r, address_of(row));
}

__device__ __forceinline__ void load_matrices_x2_transposed(uint32_t (&r)[2], const void* row) {
    load_matrices_x2_transposed(r, address_of(row));
}

// The other way round, on sm_90 and up: what a lane holds goes where load_matrices would take it from.
__device__ __forceinline__ void store_matrices_x4(shared_address row, const uint32_t (&r)[4]) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::stmatrix(row, r, 4, false);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

__device__ __forceinline__ void store_matrices_x4_transposed(shared_address row, const uint32_t (&r)[4]) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::stmatrix(row, r, 4, true);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

__device__ __forceinline__ void store_matrices_x2(shared_address row, const uint32_t (&r)[2]) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::stmatrix(row, r, 2, false);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]), "r"(r[1])
                 : "memory");
#endif
}

__device__ __forceinline__ void store_matrices_x2_transposed(shared_address row, const uint32_t (&r)[2]) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::stmatrix(row, r, 2, true);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]), "r"(r[1])
                 : "memory");
#endif
}

// d += A . B of 16-bit numbers of type T, accumulated in float32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::mma_m16n8k16(d, a, b0, b1, cuda_on_host::Operands::bfloat16);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void multiply_add<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MIXER_KERNELS_ON_HOST
    cuda_on_host::mma_m16n8k16(d, a, b0, b1, cuda_on_host::Operands::float16);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace mixer_kernels
