// Number types of the products and of the residual stream, and approximate functions.
#pragma once

#include "platform.cuh"

namespace mixer_kernels {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// ----------------------------------------------------------------------------------- conversions, to nearest even

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(bfloat16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

__device__ __forceinline__ float to_float(float16 value) {
#ifdef MIXER_KERNELS_ON_HOST
    return cuda_on_host::from_float16(value.bits);
#else
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
    bfloat16 result;
#ifdef MIXER_KERNELS_ON_HOST
    result.bits = cuda_on_host::to_bfloat16(value);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#endif
    return result;
}

template <>
__device__ __forceinline__ float16 from_float<float16>(float value) {
    float16 result;
#ifdef MIXER_KERNELS_ON_HOST
    result.bits = cuda_on_host::to_float16(value);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#endif
    return result;
}

// Two 16-bit numbers in a register.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

#ifdef MIXER_KERNELS_ON_HOST
template <class T>
inline uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
#else
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
#endif

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    return {to_float(T{static_cast<uint16_t>(pair & 0xffff)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

// ------------------------------------------------------------------------ functions within 2 units in the last place

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef MIXER_KERNELS_ON_HOST
    return std::exp2(x);
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

__device__ __forceinline__ float exp_approx(float x) {
#ifdef MIXER_KERNELS_ON_HOST
    return std::exp(x);
#else
    return exp2_approx(x * 1.4426950408889634f);  // log2(e)
#endif
}

__device__ __forceinline__ float rsqrt_approx(float x) {
#ifdef MIXER_KERNELS_ON_HOST
    return 1.0f / std::sqrt(x);
#else
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef MIXER_KERNELS_ON_HOST
    return 1.0f / x;
#else
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// ------------------------------------------------------------------------ tensors whose type is known at run time

__device__ __forceinline__ float load_element(const void* tensor, mk_type type, int64_t offset) {
    switch (type) {
        case MK_BFLOAT16:
            return to_float(static_cast<const bfloat16*>(tensor)[offset]);
        case MK_FLOAT16:
            return to_float(static_cast<const float16*>(tensor)[offset]);
        default:
            return static_cast<const float*>(tensor)[offset];
    }
}

__device__ __forceinline__ void store_element(void* tensor, mk_type type, int64_t offset, float value) {
    switch (type) {
        case MK_BFLOAT16:
            static_cast<bfloat16*>(tensor)[offset] = from_float<bfloat16>(value);
            break;
        case MK_FLOAT16:
            static_cast<float16*>(tensor)[offset] = from_float<float16>(value);
            break;
        default:
            static_cast<float*>(tensor)[offset] = value;
    }
}

__device__ __forceinline__ bool aligned_16(const void* address) {
    return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

template <class T>
__device__ __forceinline__ void unpack8(uint4 packed, float (&v)[8]) {
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(pairs[i]);
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
    }
}

template <class T>
__device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
    return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}

// v[i] = tensor[offset + i * stride] for i < valid, else 0.
__device__ __forceinline__ void load8(const void* tensor, mk_type type, int64_t offset, int64_t stride, int valid,
                                      float (&v)[8]) {
    const int64_t element = type == MK_FLOAT32 ? 4 : 2;
    const void* address = static_cast<const char*>(tensor) + offset * element;
    if (stride == 1 && valid >= 8 && aligned_16(address)) {
        const uint4* vectors = static_cast<const uint4*>(address);
        if (type == MK_BFLOAT16) {
            unpack8<bfloat16>(vectors[0], v);
        } else if (type == MK_FLOAT16) {
            unpack8<float16>(vectors[0], v);
        } else {
            const uint4 low = vectors[0], high = vectors[1];
            const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(bits[i]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < valid ? load_element(tensor, type, offset + i * stride) : 0.0f;
}

// tensor[offset + i] = v[i] for i < valid.
__device__ __forceinline__ void store8(void* tensor, mk_type type, int64_t offset, int valid, const float (&v)[8]) {
    const int64_t element = type == MK_FLOAT32 ? 4 : 2;
    void* address = static_cast<char*>(tensor) + offset * element;
    if (valid >= 8 && aligned_16(address)) {
        uint4* vectors = static_cast<uint4*>(address);
        if (type == MK_BFLOAT16) {
            vectors[0] = pack8<bfloat16>(v);
        } else if (type == MK_FLOAT16) {
            vectors[0] = pack8<float16>(v);
        } else {
            float4* floats = static_cast<float4*>(address);
            floats[0] = {v[0], v[1], v[2], v[3]};
            floats[1] = {v[4], v[5], v[6], v[7]};
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < valid) store_element(tensor, type, offset + i, v[i]);
    }
}

}  // namespace mixer_kernels
