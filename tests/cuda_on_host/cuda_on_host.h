// CUDA on the CPU, for tests: what the kernels' sources need of CUDA's language and run time, without a CUDA toolkit.
//
// The threads of a block, and of the other blocks of its cluster, run as fibers, one at a time and in a random order
// given by a seed. The warp's instructions (ldmatrix, mma, shuffles) and those of sm_90 (hopper.h) are models of the
// PTX ISA's text. What a GPU leaves undefined is an error here: launch() then returns cudaErrorLaunchFailure and
// cudaGetErrorString() says what happened in which thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

// ------------------------------------------------------------------------------------------------------- language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
// No __shared__: static shared memory would not start as NaN in each block. Kernels take shared_memory<T>().

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------------- run time

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};

// For cudaErrorLaunchFailure and cudaErrorInvalidConfiguration: what went wrong in this process's latest failed launch.
// For cudaErrorInvalidValue also: what was wrong with the latest tensor map that was refused.
const char* cudaGetErrorString(cudaError_t error);

// Settings, below, by their numbers.
extern "C" void cuda_on_host_configure(uint64_t seed, int landing, uint64_t shared_limit);
extern "C" uint64_t cuda_on_host_launches();
extern "C" uint64_t cuda_on_host_matrix_products();
extern "C" uint64_t cuda_on_host_warpgroup_products();

namespace cuda_on_host {

using Where = std::source_location;

// When asynchronous work is done: copies of cp.async, TMA's loads and stores, wgmma. When a wait covers it (and, of
// sm_90's, when no thread can go on without), with its issue, or at any time between.
enum class Landing { late = 0, early = 1, random = 2 };

struct Settings {
    uint64_t seed = 0;  // of the order of blocks, warps and lanes
    Landing landing = Landing::late;
    size_t shared_limit = 227 << 10;  // bytes of dynamic shared memory a block may have: CUDA's largest, of sm_90
};
Settings& settings();  // from CUDA_ON_HOST_SEED, CUDA_ON_HOST_LANDING and CUDA_ON_HOST_SHARED_LIMIT at first

// function is the kernel's address, for its name in messages. cluster: blocks side by side along x.
cudaError_t run_grid(const void* function, void (*thread)(void*), void* closure, dim3 grid, dim3 block, int cluster,
                     size_t shared_bytes);

template <class F>
cudaError_t launch(const void* function, F thread, dim3 grid, dim3 block, int cluster, size_t shared_bytes) {
    return run_grid(
        function, [](void* closure) { (*static_cast<F*>(closure))(); }, &thread, grid, block, cluster, shared_bytes);
}

// -------------------------------------------------------------------------------------- a thread's view of its block

void* shared_memory();  // NaN at first, whichever the type: every byte is 0xFF

// An address in the shared window, and back. The window begins at a multiple of 128 that is none of 256: kernels have
// to align by hand what needs more.
using shared_address = uint32_t;
shared_address address_of(const void* shared, Where where = Where::current());
void* pointer_to(shared_address address, Where where = Where::current());

void sync_block(Where where);
void sync_warp(unsigned mask, Where where);
// The value that lane `source` of the warp gave.
uint32_t shuffle(unsigned mask, uint32_t value, int source, Where where);

void cp_async_16(void* shared, const void* global, int valid_bytes, Where where = Where::current());
void cp_async_commit();
void cp_async_wait(int groups);

enum class Operands { bfloat16, float16 };
void ldmatrix(uint32_t* r, int matrices, bool transposed, shared_address row, Where where = Where::current());
void stmatrix(shared_address row, const uint32_t* r, int matrices, bool transposed, Where where = Where::current());
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Operands type, Where where = Where::current());

// ------------------------------------------------------------------------------------------------- number formats

template <class To, class From>
To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

inline float from_bfloat16(uint16_t value) { return bits_of<float>(static_cast<uint32_t>(value) << 16); }

inline uint16_t to_bfloat16(float value) {  // NaN becomes the NaN that the device's conversion gives
    const uint32_t bits = bits_of<uint32_t>(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t value) {
    const float scaled = bits_of<float>(static_cast<uint32_t>(value & 0x7fff) << 13) * 0x1p112f;
    const uint32_t magnitude = bits_of<uint32_t>(scaled) | (scaled >= 65536.0f ? 0x7f800000u : 0u);
    return bits_of<float>(magnitude | static_cast<uint32_t>(value & 0x8000) << 16);
}

inline uint16_t to_float16(float value) {
    const uint32_t magnitude = bits_of<uint32_t>(value) & 0x7fffffff;
    const uint32_t sign = (bits_of<uint32_t>(value) >> 16) & 0x8000;
    if (value != value) return 0x7fff;
    if (magnitude >= bits_of<uint32_t>(65520.0f)) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < bits_of<uint32_t>(0x1p-14f)) {  // subnormal: 1/2 has their unit in the last place
        const uint32_t sum = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (sum - bits_of<uint32_t>(0.5f)));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23);
    return static_cast<uint16_t>(sign | rounded >> 13);
}

}  // namespace cuda_on_host

// -------------------------------------------------------------------------------------------------------- built-ins

inline void __syncthreads(cuda_on_host::Where where = cuda_on_host::Where::current()) {
    cuda_on_host::sync_block(where);
}

inline void __syncwarp(unsigned mask = ~0u, cuda_on_host::Where where = cuda_on_host::Where::current()) {
    cuda_on_host::sync_warp(mask, where);
}

namespace cuda_on_host {

inline int lane() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

template <class T>
T shuffle_any(unsigned mask, T value, int source, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint32_t words[sizeof(T) / 4];
    std::memcpy(words, &value, sizeof(T));
    for (uint32_t& word : words) word = shuffle(mask, word, source, where);
    std::memcpy(&value, words, sizeof(T));
    return value;
}

}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_on_host::Where where = cuda_on_host::Where::current()) {
    const int first = cuda_on_host::lane() / width * width;
    return cuda_on_host::shuffle_any(mask, value, first + (source & (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  cuda_on_host::Where where = cuda_on_host::Where::current()) {
    const int lane = cuda_on_host::lane(), source = lane ^ lanes;
    // PTX: shfl.bfly reads lower segments, and past the end of its own gives the lane's own value
    return cuda_on_host::shuffle_any(mask, value, source < (lane / width + 1) * width ? source : lane, where);
}

inline float __uint_as_float(uint32_t bits) { return cuda_on_host::bits_of<float>(bits); }
inline uint32_t __float_as_uint(float value) { return cuda_on_host::bits_of<uint32_t>(value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

#include "hopper.h"
