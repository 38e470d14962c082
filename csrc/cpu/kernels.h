// The CPU kernels: PatchTSMixer's mixer and layer, forward and backward; equations (30) to (35) of docs/maths.md. A
// mixer of patches without a gate is the token half of an MLP-Mixer, (1) to (5). Torch-free: addresses, sizes, strides
// in elements. Numbers in memory are float32; those of a forward pass may be bfloat16, and multiplied as such.
//
// kernels.cpp is compiled once for each instruction set; run.cpp chooses one and puts the tasks of a call on threads.
#pragma once

#include <stdint.h>

namespace mixer_kernels::cpu {

// The parameters of one mixer, along an axis of K elements. Any but w1 and w2 may be null.
struct Mixer {
    const void* gamma;   // [F]
    const void* beta;    // [F]
    const void* w1;      // [H, K]
    const void* b1;      // [H]
    const void* w2;      // [K, H]
    const void* b2;      // [K]
    const void* w_gate;  // [K, K]
    const void* b_gate;  // [K]
    int64_t hidden;      // H
    float eps;
};

// Where their gradients go; null where none is wanted.
struct Gradients {
    float *gamma, *beta, *w1, *b1, *w2, *b2, *w_gate, *b_gate;
};

struct Options {
    bool gate_first;  // of a single mixer
    bool sigmoid;     // the gate, else softmax
    bool affine;      // gamma * x + beta in the place of LayerNorm
    bool tanh;        // GELU's form
    bool bf16;        // products of a forward pass, where the instruction set has them
    float dropout_p;
    const int64_t* seeds;  // one to a mixer; null without dropout
};

// x [B, C, P, F] with features side by side.
struct Input {
    const void* data;
    bool bf16;  // and so are results; else float32
    int64_t sizes[4];
    int64_t strides[3];  // of the first three axes
};

// One call. All results are contiguous. A layer, of two mixers, mixes axis 2 and then axis 3.
struct Call {
    Input x;
    int axis;  // 1, 2 or 3, that a single mixer mixes
    int mixers;
    Mixer mixer[2];
    bool bf16;  // the parameters; else float32
    Options options;

    void* y;
    float* u;  // what the first mixer of a layer gives; null if it is not kept

    // Backward, all in float32: u may be null, then it is computed again.
    const float* dy;
    const float* kept_u;
    float* dx;
    Gradients gradients[2];
};

// How a call is cut into tasks. Results do not depend on how many threads there are: backward's sums are cut by size
// alone, forward has none.
struct Plan {
    int64_t tile;  // images to a tile, or rows where features are mixed
    int64_t tiles;
    int64_t slice;    // features to a task, in a forward pass that does not mix them
    int64_t tasks;    // forward: a slice of a tile each; backward: tiles in order, to one set of sums
    int64_t work;     // floats that a thread needs
    int64_t sums[2];  // floats of a mixer's sums in a task
    int64_t packs;    // floats of the packed weights; 0 where they are read as they are
    const float* packed;
};

// What kernels.cpp is, for one instruction set.
struct Kernels {
    Plan (*plan_forward)(const Call&, int threads);
    Plan (*plan_backward)(const Call&);
    int64_t (*pack_size)(const Call&);  // floats
    void (*pack)(const Call&, float* packs);
    void (*forward)(const Call&, const Plan&, int64_t task, float* work);
    void (*backward)(const Call&, const Plan&, int64_t task, float* work, float* sums);
    void (*add_sums)(const Call&, const Plan&, float* sums);  // of all tasks, in order, into the gradients
};

extern const Kernels kernels_avx512_amx, kernels_avx512_bf16, kernels_avx512, kernels_avx2, kernels_baseline;

// ---------------------------------------------------------------------------------------------------- what run.cpp has

// The instruction sets that were compiled, best first; the last runs on every CPU of this architecture.
const char* const* built();  // ends with null
bool runs_here(const char* name);
// The kernels called `name`; null if they were not built or do not run here.
const Kernels* find(const char* name);

// `packs`, if there are, are of the weights of this call, for these kernels; else it packs where that pays.
void run_forward(const Kernels&, const Call&, int threads, const float* packs = nullptr);
void run_backward(const Kernels&, const Call&, int threads);

// Whether there is a pool of threads, that of the OpenMP runtime which PyTorch has loaded.
bool has_pool();

}  // namespace mixer_kernels::cpu
