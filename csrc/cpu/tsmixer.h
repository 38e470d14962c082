// The mixers of a TSMixer layer, forward and backward, float32; equations (36) to (40) of docs/maths.md. Torch-free:
// addresses and sizes.
//
// tsmixer.cpp is compiled once for each instruction set; run.cpp puts the tasks of a call on threads.
#pragma once

#include <stdint.h>

namespace mixer_kernels::cpu {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu };

// Parameters, or where their gradients go. Where tokens are mixed w1 [S, S] and b1 [S] are all beside the norm's. Any
// but w1 and w2 may be null; gradients that are not wanted are.
template <class FLOAT>
struct TsmixerParameters {
    FLOAT* gamma;   // [S, C], or [S, O] of a norm behind features' mixing
    FLOAT* beta;    // as gamma
    FLOAT* w1;      // [H, C]
    FLOAT* b1;      // [H]
    FLOAT* w2;      // [O, H]
    FLOAT* b2;      // [O]
    FLOAT* w_skip;  // [O, C]
    FLOAT* b_skip;  // [O]
};

// One call on x [B, S, C]; x, results and gradients are contiguous.
struct TsmixerCall {
    const float* x;
    int64_t B, S, C;
    int64_t H, O;   // hidden units, channels of the result; where tokens are mixed S and C
    bool features;  // that those are mixed, else tokens
    bool norm_first;
    bool affine;  // gamma * x + beta in the place of LayerNorm
    Activation activation;
    float eps, dropout_p;
    const int64_t* seed;  // null without dropout
    TsmixerParameters<const float> parameters;

    float* y;  // [B, S, O]
    // What is kept for the backward pass; null where it is not, and then computed again. v only if its norm is last.
    float* z;  // [B, S, C], where features are mixed [B, S, H]: before the activation
    float* v;  // [B, S, O], where features are mixed: before the norm

    const float* dy;  // null in a forward pass
    const float *kept_z, *kept_v;
    float* dx;
    TsmixerParameters<float> gradients;
};

// How a call is cut into tasks. Results do not depend on how many threads there are.
struct TsmixerPlan {
    int64_t images;  // to a group, which is computed at once
    int64_t groups;
    int64_t tasks;  // forward: a group each; backward: groups in order, to one set of sums
    int64_t work;   // floats that a thread needs
    int64_t sums;   // floats of a set of sums
    int64_t packs;  // floats of the packed weights
    const float* packed;
};

// What tsmixer.cpp is, for one instruction set.
struct TsmixerKernels {
    TsmixerPlan (*plan)(const TsmixerCall&);
    void (*pack)(const TsmixerCall&, float* packs);
    void (*forward)(const TsmixerCall&, const TsmixerPlan&, int64_t task, float* work);
    void (*backward)(const TsmixerCall&, const TsmixerPlan&, int64_t task, float* work, float* sums);
    void (*add_sums)(const TsmixerCall&, const TsmixerPlan&, float* sums);  // of all tasks, into the gradients
};

extern const TsmixerKernels tsmixer_avx512_amx, tsmixer_avx512_bf16, tsmixer_avx512, tsmixer_avx2, tsmixer_baseline;

// The kernels called `name`; null if they were not built or do not run here.
const TsmixerKernels* find_tsmixer(const char* name);

void run_forward(const TsmixerKernels&, const TsmixerCall&, int threads);
void run_backward(const TsmixerKernels&, const TsmixerCall&, int threads);

}  // namespace mixer_kernels::cpu
