// What CuTe's headers say of wgmma's layouts, as lines for tests/test_hopper_on_host.py:
//
//   operand NAME ROWS K: offsets in bytes of the elements (row of M or N, k), rows outermost
//   fragment NAME: for each thread and each element it holds, row + 64 * column
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace {

using namespace cute;
using Number = cutlass::bfloat16_t;

template <class Layout>
void operand(const char* name, Layout swizzled) {
    const auto layout = as_position_independent_swizzle_layout(swizzled);
    const int rows = size<0>(layout), depth = size<1>(layout);
    std::printf("operand %s %d %d:", name, rows, depth);
    for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < depth; ++k) std::printf(" %d", static_cast<int>(layout(row, k)) * 2);
    }
    std::puts("");
}

template <class Layout>
void fragment(const char* name, Layout layout) {
    std::printf("fragment %s:", name);
    for (int thread = 0; thread < size<0>(layout); ++thread) {
        for (int i = 0; i < size<1>(layout); ++i) std::printf(" %d", static_cast<int>(layout(thread, i)));
    }
    std::puts("");
}

}  // namespace

int main() {
    using namespace GMMA;
    operand("k 128", tile_to_shape(Layout_K_SW128_Atom<Number>{}, Shape<Int<200>, _64>{}));
    operand("k 64", tile_to_shape(Layout_K_SW64_Atom<Number>{}, Shape<_256, _32>{}));
    operand("k 32", tile_to_shape(Layout_K_SW32_Atom<Number>{}, Shape<_64, _16>{}));
    operand("k 0", tile_to_shape(Layout_K_INTER_Atom<Number>{}, Shape<_64, _16>{}));
    operand("mn 128", tile_to_shape(Layout_MN_SW128_Atom<Number>{}, Shape<_64, Int<208>>{}));
    operand("mn 64", tile_to_shape(Layout_MN_SW64_Atom<Number>{}, Shape<_32, _256>{}));
    operand("mn 32", tile_to_shape(Layout_MN_SW32_Atom<Number>{}, Shape<_64, _16>{}, Step<_2, _1>{}));
    operand("mn 0", tile_to_shape(Layout_MN_INTER_Atom<Number>{}, Shape<_64, _16>{}));
    operand("mn 128 twice", tile_to_shape(Layout_MN_SW128_Atom<Number>{}, Shape<_256, _32>{}, Step<_2, _1>{}));
    using Traits = MMA_Traits<SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, Major::K>>;
    fragment("a", Traits::ALayout{});
    fragment("d", Traits::CLayout{});
}
