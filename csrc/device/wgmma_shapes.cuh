// wgmma m64nNk16 for each N in use. Included by warpgroup.cuh.
//
// Inline assembly cannot loop over its operands: the lists of each N are those of the N before and some more. The
// operands that follow the N / 2 accumulators have numbers that depend on N, so that each shape spells them out.
#pragma once

// clang-format off

#define MK_ACCUMULATOR_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MK_ACCUMULATOR_NAMES_64 MK_ACCUMULATOR_NAMES_32 ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MK_ACCUMULATOR_NAMES_128 MK_ACCUMULATOR_NAMES_64 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_ACCUMULATOR_NAMES_192 MK_ACCUMULATOR_NAMES_128 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MK_ACCUMULATOR_NAMES_200 MK_ACCUMULATOR_NAMES_192 ", " \
    "%96, %97, %98, %99"
#define MK_ACCUMULATOR_NAMES_208 MK_ACCUMULATOR_NAMES_200 ", " \
    "%100, %101, %102, %103"
#define MK_ACCUMULATOR_NAMES_256 MK_ACCUMULATOR_NAMES_208 ", " \
    "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"

#define MK_ACCUMULATORS_32 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MK_ACCUMULATORS_64 MK_ACCUMULATORS_32, \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MK_ACCUMULATORS_128 MK_ACCUMULATORS_64, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MK_ACCUMULATORS_192 MK_ACCUMULATORS_128, \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define MK_ACCUMULATORS_200 MK_ACCUMULATORS_192, \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define MK_ACCUMULATORS_208 MK_ACCUMULATORS_200, \
    "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define MK_ACCUMULATORS_256 MK_ACCUMULATORS_208, \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// P0 and the next: names of the operands after the accumulators. D = A . B + (accumulate ? D : 0); the operands of A
// and B are not negated; those in shared memory are transposed where they are not K-major.
#define MK_WGMMA(T, NUMBERS, N, P0, P1, P2, P3, P4, P5, P6)                                                            \
    template <>                                                                                                        \
    struct WgmmaShape<T, N> {                                                                                          \
        template <Major B>                                                                                             \
        static __device__ __forceinline__ void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,              \
                                                   bool accumulate) {                                                  \
            asm volatile(                                                                                              \
                "{.reg .pred p; setp.ne.b32 p, " P5 ", 0; "                                                            \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NUMBERS "." NUMBERS                                  \
                " {" MK_ACCUMULATOR_NAMES_##N "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";}"         \
                : MK_ACCUMULATORS_##N                                                                                  \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),               \
                  "n"(B == Major::mn ? 1 : 0));                                                                        \
        }                                                                                                              \
        template <Major A, Major B>                                                                                    \
        static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {       \
            asm volatile(                                                                                              \
                "{.reg .pred p; setp.ne.b32 p, " P2 ", 0; "                                                            \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NUMBERS "." NUMBERS                                  \
                " {" MK_ACCUMULATOR_NAMES_##N "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";}"                           \
                : MK_ACCUMULATORS_##N                                                                                  \
                : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(A == Major::mn ? 1 : 0),                      \
                  "n"(B == Major::mn ? 1 : 0));                                                                        \
        }                                                                                                              \
    };
#define MK_WGMMA_SHAPE(...) MK_WGMMA(bfloat16, "bf16", __VA_ARGS__) MK_WGMMA(float16, "f16", __VA_ARGS__)

namespace mixer_kernels {

template <class T, int N>
struct WgmmaShape;

MK_WGMMA_SHAPE(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
MK_WGMMA_SHAPE(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
MK_WGMMA_SHAPE(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
MK_WGMMA_SHAPE(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
MK_WGMMA_SHAPE(200, "%100", "%101", "%102", "%103", "%104", "%105", "%106")
MK_WGMMA_SHAPE(208, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
MK_WGMMA_SHAPE(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

}  // namespace mixer_kernels

#undef MK_WGMMA_SHAPE
#undef MK_WGMMA
#undef MK_ACCUMULATORS_32
#undef MK_ACCUMULATOR_NAMES_32
#undef MK_ACCUMULATORS_64
#undef MK_ACCUMULATOR_NAMES_64
#undef MK_ACCUMULATORS_128
#undef MK_ACCUMULATOR_NAMES_128
#undef MK_ACCUMULATORS_192
#undef MK_ACCUMULATOR_NAMES_192
#undef MK_ACCUMULATORS_200
#undef MK_ACCUMULATOR_NAMES_200
#undef MK_ACCUMULATORS_208
#undef MK_ACCUMULATOR_NAMES_208
#undef MK_ACCUMULATORS_256
#undef MK_ACCUMULATOR_NAMES_256
// clang-format on
