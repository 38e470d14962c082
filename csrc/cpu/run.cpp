// Which kernels run on this CPU, and the tasks of a call on threads.
#ifdef MIXER_KERNELS_X86
#include <cpuid.h>
#endif
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#if defined(MIXER_KERNELS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <initializer_list>
#include <memory>
#include <new>

#include "kernels.h"
#include "tsmixer.h"

namespace mixer_kernels::cpu {
namespace {

#ifdef MIXER_KERNELS_X86
struct X86 {
    bool avx2, avx512, avx512_bf16, amx;
};

// What the CPU has and the operating system saves. __builtin_cpu_supports() would ask a run-time library that Zig's
// toolchain, which compiles the wheels, does not fill.
X86 asked_x86() {
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return {};
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
    const unsigned ymm = 0x6, zmm = 0xe6, wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    const bool avx2 = (saved & ymm) == ymm && (b & bit_AVX2);
    const bool avx512 = avx2 && (saved & zmm) == zmm && (b & wanted) == wanted;
    const unsigned tiles = 0x60000, bf16_and_tiles = 1u << 22 | 1u << 24;
    const bool amx = (saved & tiles) == tiles && (d & bf16_and_tiles) == bf16_and_tiles;
    const bool bf16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
    return {avx2, avx512, bf16, bf16 && amx};
}

// Asked once: a virtual machine takes microseconds for each answer.
X86 x86() {
    static const X86 found = asked_x86();
    return found;
}

#ifdef MIXER_KERNELS_AMX
// Linux gives a process the memory for tiles when it asks, once for all of its threads.
bool may_use_tiles() {
#ifdef __linux__
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; the state's bit in XCR0
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}
#endif
#endif

struct InstructionSet {
    const char* name;
    const Kernels* kernels;
    const TsmixerKernels* tsmixer;
    bool (*runs_here)();
};

const InstructionSet kInstructionSets[] = {
#ifdef MIXER_KERNELS_X86
#ifdef MIXER_KERNELS_BF16
    {"avx512_bf16", &kernels_avx512_bf16, &tsmixer_avx512_bf16, [] { return x86().avx512_bf16; }},
#endif
    {"avx512", &kernels_avx512, &tsmixer_avx512, [] { return x86().avx512; }},
    {"avx2", &kernels_avx2, &tsmixer_avx2, [] { return x86().avx2; }},
#endif
    {"baseline", &kernels_baseline, &tsmixer_baseline, [] { return true; }},
#if defined(MIXER_KERNELS_X86) && defined(MIXER_KERNELS_AMX)
    // Behind baseline, which always runs: it has to be asked for until it has run on such a CPU.
    // for until it has run on such a CPU
    {"avx512_amx", &kernels_avx512_amx, &tsmixer_avx512_amx, [] { return x86().amx && may_use_tiles(); }},
#endif
};

// That called `name`; null if it was not built or does not run here.
const InstructionSet* named(const char* name) {
    for (const InstructionSet& set : kInstructionSets)
        if (strcmp(set.name, name) == 0) return set.runs_here() ? &set : nullptr;
    return nullptr;
}

struct Free {
    void operator()(float* memory) const { free(memory); }
};

std::unique_ptr<float, Free> allocated(int64_t floats) {
    const int64_t line = 64, bytes = (4 * floats + line - 1) / line * line;
    float* memory = static_cast<float*>(aligned_alloc(line, bytes > 0 ? bytes : line));
    if (!memory) throw std::bad_alloc();
    return std::unique_ptr<float, Free>(memory);
}

// GNU OpenMP's entry for a parallel region; LLVM's and Intel's runtimes have it too. The extension is not linked with
// a runtime of its own: a second pool in a process would take the cores twice.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel pool() { return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

// `run(task, thread)` for each task, whichever thread is free.
template <class RUN>
void on_threads(int64_t tasks, int threads, RUN run) {
    const Parallel parallel = threads > 1 ? pool() : nullptr;
    if (!parallel) {
        for (int64_t task = 0; task < tasks; ++task) run(task, 0);
        return;
    }
    struct Region {
        RUN& run;
        int64_t tasks;
        std::atomic<int64_t> next_task{0}, next_thread{0};
    } region{run, tasks};
    const auto of_a_thread = [](void* data) {
        Region& region = *static_cast<Region*>(data);
        const int64_t thread = region.next_thread++;
        for (int64_t task; (task = region.next_task++) < region.tasks;) region.run(task, thread);
    };
    parallel(of_a_thread, &region, static_cast<unsigned>(threads), 0);
}

// The call's weights in the order in which products read them, once for all tasks.
std::unique_ptr<float, Free> packed(const Kernels& kernels, const Call& call, Plan& plan) {
    if (plan.packs == 0) return nullptr;
    auto packs = allocated(plan.packs);
    kernels.pack(call, packs.get());
    plan.packed = packs.get();
    return packs;
}

template <class PLAN>
int threads_for(const PLAN& plan, int threads) {
    return static_cast<int>(plan.tasks < threads ? plan.tasks : threads);
}

// Whether a parameter of the call has a gradient.
bool has_sums(const Call& call) {
    for (int i = 0; i < call.mixers; ++i) {
        const Gradients& to = call.gradients[i];
        for (const float* gradient : {to.gamma, to.beta, to.w1, to.b1, to.w2, to.b2, to.w_gate, to.b_gate})
            if (gradient) return true;
    }
    return false;
}

constexpr const char* kNames[] = {
#ifdef MIXER_KERNELS_X86
#ifdef MIXER_KERNELS_BF16
    "avx512_bf16",
#endif
    "avx512",      "avx2",
#endif
    "baseline",
#if defined(MIXER_KERNELS_X86) && defined(MIXER_KERNELS_AMX)
    "avx512_amx",
#endif
    nullptr};

}  // namespace

const char* const* built() { return kNames; }

bool runs_here(const char* name) { return find(name) != nullptr; }

const Kernels* find(const char* name) {
    const InstructionSet* set = named(name);
    return set ? set->kernels : nullptr;
}

const TsmixerKernels* find_tsmixer(const char* name) {
    const InstructionSet* set = named(name);
    return set ? set->tsmixer : nullptr;
}

bool has_pool() { return pool() != nullptr; }

void run_forward(const Kernels& kernels, const Call& call, int threads, const float* packs) {
    Plan plan = kernels.plan_forward(call, threads);
    plan.packed = packs;
    const auto own = packs ? nullptr : packed(kernels, call, plan);
    threads = threads_for(plan, threads);
    const auto work = allocated(threads * plan.work);
    on_threads(plan.tasks, threads, [&](int64_t task, int64_t thread) {
        kernels.forward(call, plan, task, work.get() + thread * plan.work);
    });
}

void run_backward(const Kernels& kernels, const Call& call, int threads) {
    Plan plan = kernels.plan_backward(call);
    const auto packs = packed(kernels, call, plan);
    threads = threads_for(plan, threads);
    const auto work = allocated(threads * plan.work);
    const int64_t size = plan.sums[0] + plan.sums[1];
    const auto sums = has_sums(call) ? allocated(plan.tasks * size) : nullptr;
    on_threads(plan.tasks, threads, [&](int64_t task, int64_t thread) {
        kernels.backward(call, plan, task, work.get() + thread * plan.work, sums ? sums.get() + task * size : nullptr);
    });
    if (sums) kernels.add_sums(call, plan, sums.get());
}

void run_forward(const TsmixerKernels& kernels, const TsmixerCall& call, int threads) {
    TsmixerPlan plan = kernels.plan(call);
    const auto packs = allocated(plan.packs);
    kernels.pack(call, packs.get());
    plan.packed = packs.get();
    threads = threads_for(plan, threads);
    const auto work = allocated(threads * plan.work);
    on_threads(plan.tasks, threads, [&](int64_t task, int64_t thread) {
        kernels.forward(call, plan, task, work.get() + thread * plan.work);
    });
}

void run_backward(const TsmixerKernels& kernels, const TsmixerCall& call, int threads) {
    TsmixerPlan plan = kernels.plan(call);
    const auto packs = allocated(plan.packs);
    kernels.pack(call, packs.get());
    plan.packed = packs.get();
    threads = threads_for(plan, threads);
    const auto work = allocated(threads * plan.work), sums = allocated(plan.tasks * plan.sums);
    on_threads(plan.tasks, threads, [&](int64_t task, int64_t thread) {
        kernels.backward(call, plan, task, work.get() + thread * plan.work, sums.get() + task * plan.sums);
    });
    kernels.add_sums(call, plan, sums.get());
}

}  // namespace mixer_kernels::cpu
