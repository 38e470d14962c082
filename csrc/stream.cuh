// Tensors as they lie in memory, read and written 8 channels at a time.
#pragma once

#include "device/numbers.cuh"
#include "device/platform.cuh"

namespace mixer_kernels {

template <class T>
struct type_of;
template <>
struct type_of<bfloat16> {
    static constexpr mk_type value = MK_BFLOAT16;
};
template <>
struct type_of<float16> {
    static constexpr mk_type value = MK_FLOAT16;
};

struct Chunk {  // 8 elements: low of 16 bits, or low and high of float32
    uint4 low, high;
};

// A tensor in T or float32, read 8 elements along its channels at a time, whatever its strides.
struct Stream {
    const void* data;
    int64_t stride_c;
    bool is_float32;
    bool has_vectors;  // chunks start on 16 bytes, at every multiple of 8 elements from the start of a row

    Stream(const void* data_, mk_type type, int64_t stride_b, int64_t stride_s, int64_t stride_c_)
        : data(data_), stride_c(stride_c_), is_float32(type == MK_FLOAT32) {
        const int64_t vector = is_float32 ? 4 : 8;
        has_vectors = stride_c == 1 && stride_s % vector == 0 && stride_b % vector == 0 &&
                      reinterpret_cast<uintptr_t>(data) % 16 == 0;
    }
    explicit Stream(const mk_input& x) : Stream(x.data, x.type, x.stride_b, x.stride_s, x.stride_c) {}

    // The tensor from an element on.
    __device__ __forceinline__ Stream from(int64_t offset) const {
        Stream shifted = *this;
        shifted.data = address(offset);
        return shifted;
    }

    __device__ __forceinline__ int element_bytes() const { return is_float32 ? 4 : 2; }
    __device__ __forceinline__ const char* address(int64_t offset) const {
        return static_cast<const char*>(data) + offset * element_bytes();
    }

    // 8 elements that are there and start on 16 bytes.
    __device__ __forceinline__ Chunk load_vectors(const char* at) const {
        const uint4* vectors = reinterpret_cast<const uint4*>(at);
        Chunk chunk{vectors[0], {}};
        if (is_float32) chunk.high = vectors[1];
        return chunk;
    }

    // Elements 4 * half on.
    template <class T>
    __device__ __forceinline__ void unpack4(const Chunk& chunk, int half, float (&v)[4]) const {
        if (is_float32) {
            const uint4 bits = half == 0 ? chunk.low : chunk.high;
            v[0] = __uint_as_float(bits.x), v[1] = __uint_as_float(bits.y);
            v[2] = __uint_as_float(bits.z), v[3] = __uint_as_float(bits.w);
        } else {
            const float2 low = unpack<T>(half == 0 ? chunk.low.x : chunk.low.z);
            const float2 high = unpack<T>(half == 0 ? chunk.low.y : chunk.low.w);
            v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
        }
    }

    // Starts the loads of 8 elements, if they can be vectors.
    __device__ __forceinline__ Chunk fetch(int64_t offset, int valid) const {
        return has_vectors && valid >= 8 ? load_vectors(address(offset)) : Chunk{};
    }

    // The 8 elements, those past valid 0; from what fetch loaded, else one by one.
    template <class T>
    __device__ __forceinline__ void read(const Chunk& chunk, int64_t offset, int valid, float (&v)[8]) const {
        if (has_vectors && valid >= 8) {
            float low[4], high[4];
            unpack4<T>(chunk, 0, low);
            unpack4<T>(chunk, 1, high);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = i < 4 ? low[i % 4] : high[i % 4];
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = 0.0f;
            if (i < valid) {
                const int64_t at = offset + i * stride_c;
                v[i] = is_float32 ? static_cast<const float*>(data)[at] : to_float(static_cast<const T*>(data)[at]);
            }
        }
    }
};

// v, the first valid of which count, to a contiguous tensor in T or float32.
template <class T>
__device__ __forceinline__ void write8(void* tensor, bool is_float32, int64_t offset, int valid, const float (&v)[8]) {
    if (is_float32) {
        store8(tensor, MK_FLOAT32, offset, valid, v);
    } else {
        store8(tensor, type_of<T>::value, offset, valid, v);
    }
}

}  // namespace mixer_kernels
