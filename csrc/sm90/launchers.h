// The launchers for sm_90a: TMA, wgmma and warp specialisation, beside those of mixer_kernels.h.
//
// They compute what their namesakes there compute, for what TMA reads and writes: streams in the dtype of the products,
// channels side by side, addresses and strides multiples of 16 bytes. mk_sm90_takes says whether a tensor is such a
// one; a launcher returns cudaErrorInvalidValue for one that is not.
#pragma once

#include "../mixer_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Whether the launchers below take x: in `type`, C a multiple of 8, stride_c 1, the address and the other strides
// multiples of 16 bytes; for those of token mixing, if `tokens`, S at most 256, for the others rows equally far apart.
int mk_sm90_takes(mk_input x, mk_size size, mk_type type, int tokens);

// The padded token axis for S tokens (64, 208 or 256), or 0 where S is more than 256.
int mk_sm90_padded_tokens(int S);
enum { MK_SM90_HIDDEN_MULTIPLE = 64 };  // D_S is padded to a multiple of this

// u = x + W2 . GELU(W1 . LN(x) + b1) + b2: equations (2) to (5).
typedef struct {
    mk_input x;
    mk_size size;
    mk_norm norm;
    mk_type type;     // of the products and of x
    int S_pad, D;     // mk_sm90_padded_tokens(S); D_S padded to MK_SM90_HIDDEN_MULTIPLE
    const void* w1t;  // [S_pad, D] in type: the transpose of W1, zero-padded, 16-byte aligned
    const float* b1;  // [D], zero-padded, 16-byte aligned
    const void* w2;   // [S_pad, D] in type, zero-padded, 16-byte aligned
    const float* b2;  // [S_pad], zero-padded
    mk_noise noise;
    int tanh;
    mk_device device;
    void* u;  // [B, S, C] contiguous, in type
    // (mean, sum of squared deviations) of u over each 64 channels of a token, the last ones fewer: what
    // mk_merge_statistics takes. [ceil(C / 64), B * S, 2], or null.
    float* partial;
    // How it is computed, for tuning; the result is the same. 0 stands for what is expected to be fastest.
    int cluster;    // blocks that share the weights by multicast: 1 or 2
    int consumers;  // warpgroups that compute in a block: 2, or for S_pad 64 also 3
    int pipelined;  // whether GELU is computed while a product runs: 1, or 2 if it waits for the product
} mk_sm90_token_mixing_arguments;
int mk_sm90_token_mixing_forward(const mk_sm90_token_mixing_arguments* arguments, mk_stream stream);

// mean and rstd [B * S] from the statistics of each 64 channels: equation (10).
int mk_merge_statistics(const float* partial, mk_size size, float eps, float* mean, float* rstd, mk_stream stream);

// dn = W1' . dz with dz = (W2' . g) * GELU'(z), z recomputed: equations (14), (15).
typedef struct {
    mk_input x;
    mk_size size;
    mk_norm norm;
    mk_type type;
    int S_pad, D, D_S;
    const void* g;    // [B, S, C] contiguous, in type: gradient of the branch
    const void* w1t;  // [S_pad, D], as forward
    const float* b1;  // [D], as forward
    const void* w2;   // [S_pad, D], as forward
    mk_noise noise;
    int tanh;
    mk_device device;
    void* dn;  // [B, S, C] contiguous, in type
    void* a;   // [B, D_S, C] contiguous, in type, or null
    void* dz;  // [B, D_S, C] contiguous, in type, or null
} mk_sm90_token_data_gradient_arguments;
int mk_sm90_token_data_gradient(const mk_sm90_token_data_gradient_arguments* arguments, mk_stream stream);

// The channel products, with the arguments and the padding of those in mixer_kernels.h. device: for the persistent
// grid.
int mk_sm90_channel_fc1_forward(const mk_channel_fc1_arguments* arguments, mk_device device, mk_stream stream);
int mk_sm90_channel_fc2_forward(const mk_channel_fc2_arguments* arguments, mk_device device, mk_stream stream);
int mk_sm90_channel_gelu_backward(const mk_channel_gelu_backward_arguments* arguments, mk_device device,
                                  mk_stream stream);
// Rows of sums of the latter: one for each 64 rows, whatever the schedule.
int64_t mk_sm90_gelu_backward_tiles(int64_t rows);

#ifdef __cplusplus
}
#endif
