// What sm_90 adds, as csrc/device/{barrier,tensor_map,warpgroup}.cuh have it: mbarriers, named barriers, clusters, TMA,
// products of a warpgroup. Included by cuda_on_host.h. What each function does is told there; what a GPU leaves
// undefined is a fault here, told with the line that called.
#pragma once

#include "cuda_on_host.h"

namespace cuda_on_host {

// ------------------------------------------------------------------------------------------- barriers and clusters

void barrier_init(shared_address barrier, int arrivals, Where where = Where::current());
void barrier_init_fence();
void barrier_arrive(shared_address barrier, Where where = Where::current());
void barrier_arrive_in(shared_address barrier, int block, Where where = Where::current());
void barrier_expect(shared_address barrier, int bytes, Where where = Where::current());
void barrier_wait(shared_address barrier, int parity, Where where = Where::current());

void named_barrier_sync(int id, int threads, Where where = Where::current());
void named_barrier_arrive(int id, int threads, Where where = Where::current());

void fence_async_shared();

int cluster_rank();
void cluster_sync(Where where = Where::current());

// Registers are not modelled, but there are 64 Ki for a block's threads.
void set_registers(int count, Where where);

template <int REGISTERS>
void increase_registers(Where where = Where::current()) {
    static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
    set_registers(REGISTERS, where);
}
template <int REGISTERS>
void decrease_registers(Where where = Where::current()) {
    static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
    set_registers(REGISTERS, where);
}

// -------------------------------------------------------------------------------------------------------------- TMA

struct alignas(64) TensorMap {  // as large as CUtensorMap
    char* base;
    uint64_t sizes[5];    // in elements
    uint64_t strides[5];  // in bytes
    uint16_t box[5];
    uint8_t rank, element_bytes, swizzle;
    uint32_t made;  // by make_tensor_map
};
static_assert(sizeof(TensorMap) == 128);

// swizzle: 0, 32, 64 or 128 bytes.
cudaError_t make_tensor_map(TensorMap* map, const void* base, int element_bytes, int rank, const int64_t* sizes,
                            const int64_t* strides, const int* box, int swizzle);

void load_tile(shared_address to, const TensorMap& map, shared_address barrier, int i0, int i1,
               Where where = Where::current());
void load_tile(shared_address to, const TensorMap& map, shared_address barrier, int i0, int i1, int i2,
               Where where = Where::current());
void load_tile_multicast(shared_address to, const TensorMap& map, shared_address barrier, uint16_t blocks, int i0,
                         int i1, Where where = Where::current());
void load_tile_multicast(shared_address to, const TensorMap& map, shared_address barrier, uint16_t blocks, int i0,
                         int i1, int i2, Where where = Where::current());
void store_tile(const TensorMap& map, shared_address from, int i0, int i1, Where where = Where::current());
void store_tile(const TensorMap& map, shared_address from, int i0, int i1, int i2, Where where = Where::current());
void store_commit();
void wait_for_stores(int groups, bool written, Where where);  // or only read

template <int N>
void store_wait_read(Where where = Where::current()) {
    wait_for_stores(N, false, where);
}
template <int N>
void store_wait(Where where = Where::current()) {
    wait_for_stores(N, true, where);
}
void prefetch(const TensorMap& map, Where where = Where::current());

// ------------------------------------------------------------------------------------------------------- warpgroups

// Faults unless the fields of a descriptor can hold these.
void check_operand(shared_address start, int leading_bytes, int stride_bytes, Where where);

void wgmma(Operands type, int N, float* d, const uint32_t* a, uint64_t b, bool b_mn_major, bool accumulate,
           Where where);
void wgmma(Operands type, int N, float* d, uint64_t a, bool a_mn_major, uint64_t b, bool b_mn_major, bool accumulate,
           Where where);
void wgmma_fence();
void wgmma_commit();
void wait_for_products(int groups, Where where);

template <int N>
void wgmma_wait(Where where = Where::current()) {
    wait_for_products(N, where);
}
template <int N>
void keep(float (&)[N]) {}

}  // namespace cuda_on_host
