// The tasks of a call of TSMixer's mixers, for the instruction set that this file is compiled for; MIXER_KERNELS_ISA is
// its name.
#include "tsmixer.h"

#include "feature_mixing.h"
#include "time_mixing.h"

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)

namespace {

using namespace mixer_kernels::cpu;

constexpr int64_t kBackwardTasks = 16;      // sets of sums, at most
constexpr int64_t kSumsRows = 256;          // to a set: fewer would cost less than the set, which is written and read
constexpr int64_t kSumsFloats = 1ll << 24;  // of all sets, unless one has more

template <class MIXING>
struct Tasks;

template <>
struct Tasks<TimeMixing> {
    using Weights = TimeWeights;
    static int64_t rows(const TsmixerCall& call) { return call.B * call.C; }
};

template <>
struct Tasks<FeatureMixing> {
    using Weights = FeatureWeights;
    static int64_t rows(const TsmixerCall& call) { return call.B * call.S; }
};

template <class MIXING>
typename Tasks<MIXING>::Weights weights_of(const TsmixerCall& call, const float* packs, bool fill = false) {
    Arena arena(const_cast<float*>(packs));
    return {arena, call, fill};
}

template <class MIXING>
TsmixerPlan plan_of(const TsmixerCall& call) {
    TsmixerPlan plan{};
    plan.images = least(MIXING::images_of(call), call.B);
    plan.groups = plan.tasks = divided_up(call.B, plan.images);
    Arena packs(nullptr), sums(nullptr), work(nullptr);
    const typename Tasks<MIXING>::Weights weights(packs, call, false);
    plan.packs = packs.used();
    MIXING(work, call, weights, plan.images);
    plan.work = work.used();
    if (!call.dy) return plan;
    typename MIXING::Sums(sums, call);
    plan.sums = sums.used();
    const int64_t sets = least(Tasks<MIXING>::rows(call) / kSumsRows, kSumsFloats / plan.sums);
    plan.tasks = least(plan.groups, largest(least(sets, kBackwardTasks), 1));
    return plan;
}

template <class MIXING>
void forward_of(const TsmixerCall& call, const TsmixerPlan& plan, int64_t task, float* memory) {
    Arena arena(memory);
    const auto weights = weights_of<MIXING>(call, plan.packed);
    const int64_t first = task * plan.images;
    MIXING(arena, call, weights, plan.images).forward(first, least(plan.images, call.B - first));
}

template <class MIXING>
void backward_of(const TsmixerCall& call, const TsmixerPlan& plan, int64_t task, float* memory, float* memory_of_sums) {
    Arena arena(memory), arena_of_sums(memory_of_sums);
    for (int64_t i = 0; i < plan.sums; ++i) memory_of_sums[i] = 0.0f;
    const typename MIXING::Sums sums(arena_of_sums, call);
    const auto weights = weights_of<MIXING>(call, plan.packed);
    MIXING mixing(arena, call, weights, plan.images);
    for (int64_t group = task * plan.groups / plan.tasks; group < (task + 1) * plan.groups / plan.tasks; ++group) {
        const int64_t first = group * plan.images;
        mixing.backward(first, least(plan.images, call.B - first), sums);
    }
}

// to [rows, columns], or its transpose, from rows of `width`
void copy(float* to, const float* from, int64_t rows, int64_t columns, int64_t width, bool transposed = false) {
    for (int64_t r = 0; to && r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) to[transposed ? c * rows + r : r * columns + c] = from[r * width + c];
}

void to_gradients(const TsmixerCall& call, const TimeSums& from) {
    const auto& to = call.gradients;
    copy(to.w1, from.w, call.S, call.S, whole(call.S));
    copy(to.b1, from.b, 1, call.S, call.S);
    copy(to.gamma, from.gamma, 1, call.S * call.C, 0);
    copy(to.beta, from.beta, 1, call.S * call.C, 0);
}

void to_gradients(const TsmixerCall& call, const FeatureSums& from) {
    const auto& to = call.gradients;
    const int64_t of_norm = call.S * (call.norm_first ? call.C : call.O);
    copy(to.w1, from.w1, call.C, call.H, whole(call.H), true);
    copy(to.b1, from.b1, 1, call.H, 0);
    copy(to.w2, from.w2, call.H, call.O, whole(call.O), true);
    copy(to.b2, from.b2, 1, call.O, 0);
    copy(to.w_skip, from.w_skip, call.C, call.O, whole(call.O), true);
    copy(to.b_skip, from.b_skip, 1, call.O, 0);
    copy(to.gamma, from.gamma, 1, of_norm, 0);
    copy(to.beta, from.beta, 1, of_norm, 0);
}

void add_sums(const TsmixerCall& call, const TsmixerPlan& plan, float* memory) {
    for (int64_t task = 1; task < plan.tasks; ++task)
        for (int64_t i = 0; i < plan.sums; i += kLanes)
            store(memory + i, load(memory + i) + load(memory + task * plan.sums + i));
    Arena arena(memory);
    if (call.features)
        to_gradients(call, FeatureSums(arena, call));
    else
        to_gradients(call, TimeSums(arena, call));
}

TsmixerPlan plan(const TsmixerCall& call) {
    return call.features ? plan_of<FeatureMixing>(call) : plan_of<TimeMixing>(call);
}

void pack(const TsmixerCall& call, float* packs) {
    if (call.features)
        weights_of<FeatureMixing>(call, packs, true);
    else
        weights_of<TimeMixing>(call, packs, true);
}

void forward(const TsmixerCall& call, const TsmixerPlan& plan, int64_t task, float* work) {
    (call.features ? forward_of<FeatureMixing> : forward_of<TimeMixing>)(call, plan, task, work);
}

void backward(const TsmixerCall& call, const TsmixerPlan& plan, int64_t task, float* work, float* sums) {
    (call.features ? backward_of<FeatureMixing> : backward_of<TimeMixing>)(call, plan, task, work, sums);
}

}  // namespace

namespace mixer_kernels::cpu {

const TsmixerKernels JOINED(tsmixer_, MIXER_KERNELS_ISA) = {plan, pack, forward, backward, add_sums};

}  // namespace mixer_kernels::cpu
