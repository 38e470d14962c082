// Vectors of MIXER_KERNELS_LANES floats as GCC and Clang have them for any instruction set, and their transposition.
//
// All of these headers is in an unnamed namespace and uses no function of the standard library: a function that two
// instruction sets share by name could be linked from the wrong one.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#ifdef __AVX2__
#include <immintrin.h>  // loads and stores of parts of a vector
#endif

namespace {

constexpr int kLanes = MIXER_KERNELS_LANES;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// A bfloat16 in memory: the upper half of a float.
struct Bf16 {
    uint16_t bits;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return divided_up(a, multiple) * multiple; }

inline Vector all(float value) { return value - Vector{}; }
inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }

inline Unsigned load(const uint32_t* p) {
    Unsigned v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline void store(uint32_t* p, Unsigned v) { memcpy(p, &v, sizeof(v)); }

template <int... I>
inline Integers counted(std::integer_sequence<int, I...>) {
    return Integers{I...};
}

// All bits of the first `lanes` elements.
inline Integers first(int64_t lanes) {
    return counted(std::make_integer_sequence<int, kLanes>()) < static_cast<int32_t>(least(lanes, kLanes));
}

// The first `lanes` elements; zeros behind.
inline Vector load(const float* p, int64_t lanes) {
    if (lanes >= kLanes) return load(p);
#if defined(__AVX512F__) && MIXER_KERNELS_LANES == 16
    return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << lanes) - 1), p);
#elif defined(__AVX2__) && MIXER_KERNELS_LANES == 8
    return (Vector)_mm256_maskload_ps(p, (__m256i)first(lanes));
#else
    float values[kLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) values[i] = p[i];
    return load(values);
#endif
}

inline void store(float* p, Vector v, int64_t lanes) {
    if (lanes >= kLanes) return store(p, v);
#if defined(__AVX512F__) && MIXER_KERNELS_LANES == 16
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << lanes) - 1), (__m512)v);
#elif defined(__AVX2__) && MIXER_KERNELS_LANES == 8
    _mm256_maskstore_ps(p, (__m256i)first(lanes), (__m256)v);
#else
    float values[kLanes];
    store(values, v);
    for (int64_t i = 0; i < lanes; ++i) p[i] = values[i];
#endif
}

inline Vector widened(Halves h) { return (Vector)(__builtin_convertvector(h, Unsigned) << 16); }

// To the nearest bfloat16, of two the even one; NaN stays NaN.
inline Halves narrowed(Vector v) {
#if defined(__AVX512BF16__) && MIXER_KERNELS_LANES == 16
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const Unsigned bits = (Unsigned)v, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, Halves);
#endif
}

inline Vector load(const Bf16* p) {
    Halves h;
    memcpy(&h, p, sizeof(h));
    return widened(h);
}

inline Vector load(const Bf16* p, int64_t lanes) {
    if (lanes >= kLanes) return load(p);
#if defined(__AVX512BW__) && MIXER_KERNELS_LANES == 16
    return widened((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << lanes) - 1), p));
#else
    Halves h{};
    memcpy(&h, p, 2 * lanes);
    return widened(h);
#endif
}

inline void store(Bf16* p, Vector v, int64_t lanes) {
    const Halves h = narrowed(v);
    if (lanes >= kLanes) {
        memcpy(p, &h, sizeof(h));
        return;
    }
#if defined(__AVX512BW__) && MIXER_KERNELS_LANES == 16
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1 << lanes) - 1), (__m256i)h);
#else
    memcpy(p, &h, 2 * lanes);
#endif
}

inline float widened(float value) { return value; }
inline float widened(Bf16 h) {
    const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Zero behind the first `lanes` elements.
inline Vector only(Vector v, int64_t lanes) { return lanes >= kLanes ? v : (first(lanes) ? v : Vector{}); }

inline Vector greater(Vector a, Vector b) { return a > b ? a : b; }

template <int... I>
inline Vector shuffled(Vector a, Vector b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, Integers{I...});
#endif
}

template <int Distance, int... I>
inline Vector exchanged(Vector v, std::integer_sequence<int, I...>) {
    return shuffled<(I ^ Distance)...>(v, v);
}

template <int Distance = kLanes / 2>
inline float sum(Vector v) {
    v += exchanged<Distance>(v, std::make_integer_sequence<int, kLanes>());
    if constexpr (Distance > 1) return sum<Distance / 2>(v);
    return v[0];
}

template <int First, int... I>
inline Vector interleaved(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return shuffled<(First + I / 2 + I % 2 * kLanes)...>(a, b);
}

// Rows become columns.
inline void transpose(Vector (&rows)[kLanes]) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
    for (int stage = 1; stage < kLanes; stage *= 2) {
        Vector next[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = interleaved<0>(rows[i], rows[i + kLanes / 2], lanes);
            next[2 * i + 1] = interleaved<kLanes / 2>(rows[i], rows[i + kLanes / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

// Halves of each 2 * Distance elements, added; those of `a` and of `b` by turns.
template <int Distance, int... I>
inline Vector halved(Vector a, Vector b, std::integer_sequence<int, I...>) {
    const Vector left = shuffled<(I / Distance / 2 * 2 * Distance + I % Distance + I / Distance % 2 * kLanes)...>(a, b);
    return left +
           shuffled<(I / Distance / 2 * 2 * Distance + I % Distance + I / Distance % 2 * kLanes + Distance)...>(a, b);
}

// The sums of kLanes vectors, as a vector.
template <int Distance = kLanes / 2>
inline Vector sums(Vector (&rows)[kLanes]) {
#pragma GCC unroll 8
    for (int i = 0; i < Distance; ++i)
        rows[i] = halved<Distance>(rows[i], rows[i + Distance], std::make_integer_sequence<int, kLanes>());
    if constexpr (Distance > 1) return sums<Distance / 2>(rows);
    return rows[0];
}

}  // namespace
