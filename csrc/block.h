// The forward pass of a half of a block, and of a whole block, as one call: which launchers run, in which order.
#pragma once

#include "mixer_kernels.h"
#include "sm90/launchers.h"

namespace mixer_kernels {

// As mk_token_mixing_arguments takes them for up to 256 tokens, as mk_token_products_arguments for more; if sm90, as
// mk_sm90_token_mixing_arguments does, with w1t in w1.
struct TokenWeights {
    int D_S;
    int D, S_pad;
    const void* w1;
    const float* b1;
    const void* w2;
    const float *b2, *gamma, *beta;
    int sm90;
};

// As mk_channel_fc1_arguments and mk_channel_fc2_arguments take them.
struct FirstWeights {
    int D_C;
    const void* w3;
    const float *b3, *wg, *wb, *scale, *gamma, *beta;
};
struct SecondWeights {
    const void* w4;
    const float* b4;
};

struct Options {
    mk_type type;
    int tanh;
    mk_noise noise;
    mk_device device;
    int sm90;  // whether the channel products may be those of sm90/
};

struct Statistics {
    float *mean, *rstd;  // [B * S]
};

// Throws std::runtime_error if a launcher returned an error, with the launcher's name.
void check(int error, const char* launcher);

// fc1 without options and results: the same for the forward pass and for z recomputed.
mk_channel_fc1_arguments first_product(mk_input u, mk_size size, const FirstWeights& weights, mk_type type,
                                       Statistics statistics);

// fc2 without noise and result.
mk_channel_fc2_arguments second_product(mk_input u, mk_size size, int D_C, const SecondWeights& weights, mk_type type,
                                        const void* a, int64_t row);

// By the product of sm90/ if that is allowed and takes u, else by the one for every GPU.
void channel_fc1_forward(const mk_channel_fc1_arguments& fc1, int sm90, mk_device device, mk_stream stream);

// Token mixing by csrc/sm90, in the variant that is expected to be fastest.
mk_sm90_token_mixing_arguments sm90_token_mixing(mk_input x, mk_size size, const TokenWeights& weights,
                                                 const Options& options, Statistics statistics, void* u,
                                                 float* partial);

// u from x; a is scratch for more than 256 tokens, see mk_token_products_arguments; partial is what
// mk_sm90_token_mixing_arguments says, null without weights.sm90.
void token_half_forward(mk_input x, mk_size size, float eps, const TokenWeights& weights, const Options& options,
                        Statistics statistics, void* a, void* u, float* partial, mk_stream stream);

// y from u, whose statistics are merged from partial if it is given; a is scratch, z is kept if it is given:
// [B * S, D_C] with rows of `row` elements.
void channel_half_forward(mk_input u, mk_size size, float eps, const float* partial, const FirstWeights& first,
                          const SecondWeights& second, const Options& options, Statistics statistics, void* a, void* z,
                          int64_t row, void* y, mk_stream stream);

}  // namespace mixer_kernels
