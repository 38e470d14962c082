// The C interface: one launcher per kernel, from pointers, sizes and strides to a launch on a stream.
//
// Symbols are those of docs/maths.md: x and u [B, S, C]; W1 [D_S, S], W2 [S, D_S], W3 [D_C, C], W4 [C, D_C]. Sizes and
// strides are in elements. Products run in float16 or bfloat16 with float32 accumulation; the residual stream has the
// dtype of the products or float32. Pointers are device pointers; where one may be null it says so. Launchers allocate
// nothing, do not synchronise, and return 0 or a cudaError_t (mk_error_string).
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { MK_FLOAT32 = 0, MK_FLOAT16 = 1, MK_BFLOAT16 = 2 } mk_type;

// A tensor [B, S, C] as it lies in memory.
typedef struct {
    const void* data;
    mk_type type;
    int64_t stride_b, stride_s, stride_c;
} mk_input;

typedef struct {
    int64_t B;
    int S, C;
} mk_size;

// Dropout and stochastic depth, equations (11) and (12). seed may be null if both probabilities are 0.
typedef struct {
    const int64_t* seed;
    float dropout_p, drop_path_p;
} mk_noise;

// Row statistics of a tensor and LayerNorm's affine; gamma and beta [C] may be null.
typedef struct {
    const float* mean;  // [B * S]
    const float* rstd;  // [B * S]
    const float* gamma;
    const float* beta;
} mk_norm;

// What launchers choose their blocks by; 0: not known, as for the least of the supported GPUs.
typedef struct {
    int multiprocessors;
    int shared_memory;  // bytes that a block may have
} mk_device;

typedef void* mk_stream;  // cudaStream_t

const char* mk_error_string(int error);  // of the calling thread's latest error, valid until its next
void mk_note_error(const char* text);    // what mk_error_string adds the next time, in this thread

// mean and rstd [B * S] of x: equation (1).
int mk_row_statistics(mk_input x, mk_size size, float eps, float* mean, float* rstd, mk_stream stream);

// ---------------------------------------------------------------------------------------------------- token mixing

// The padded token axis of the fused kernels for S tokens, a multiple of 16, or 0 where S is more than 256.
int mk_padded_tokens(int S);
enum { MK_HIDDEN_MULTIPLE = 32 };  // D_S is padded to a multiple of this for the fused kernels

// u = x + W2 . GELU(W1 . LN(x) + b1) + b2 in one kernel, S <= 256: equations (2) to (5).
typedef struct {
    mk_input x;
    mk_size size;
    mk_norm norm;
    mk_type type;     // of the products
    int S_pad, D;     // mk_padded_tokens(S); D_S padded to MK_HIDDEN_MULTIPLE
    const void* w1;   // [D, S_pad] in type, zero-padded, 16-byte aligned
    const float* b1;  // [D], zero-padded, 16-byte aligned
    const void* w2;   // [S_pad, D] in type, zero-padded, 16-byte aligned
    const float* b2;  // [S_pad], zero-padded
    mk_noise noise;
    int tanh;  // GELU's tanh form instead of the erf form
    mk_device device;
    void* u;  // [B, S, C] contiguous, in x.type
} mk_token_mixing_arguments;
int mk_token_mixing_forward(const mk_token_mixing_arguments* arguments, mk_stream stream);

// dn = W1' . dz with dz = (W2' . g) * GELU'(z), z recomputed, S <= 256: equations (14), (15).
typedef struct {
    mk_input x;
    mk_size size;
    mk_norm norm;
    mk_type type;
    int S_pad, D, D_S;
    const void* g;    // [B, S, C] contiguous, in type: gradient of the branch
    const void* w1;   // [D, S_pad] as forward
    const float* b1;  // [D] as forward
    const void* w2t;  // [D, S_pad]: the transpose of W2, zero-padded
    mk_noise noise;
    int tanh;
    mk_device device;
    void* dn;  // [B, S, C] contiguous, in type
    void* a;   // [B, D_S, C] contiguous, in type, or null
    void* dz;  // [B, D_S, C] contiguous, in type, or null
} mk_token_data_gradient_arguments;
int mk_token_data_gradient(const mk_token_data_gradient_arguments* arguments, mk_stream stream);

// The two products of token mixing for any S, with the interface of the fused kernel; a is scratch between them.
enum { MK_K_MULTIPLE = 64 };  // zero-padded along the summed axis to a multiple of this, weights need no mask
typedef struct {
    mk_input x;
    mk_size size;
    mk_norm norm;
    mk_type type;
    int D_S;
    const void* w1;   // [D_S, S_pad] in type, S_pad = S padded to MK_K_MULTIPLE
    const float* b1;  // [D_S]
    const void* w2;   // [S, D_pad] in type, D_pad = D_S padded to MK_K_MULTIPLE
    const float* b2;  // [S]
    mk_noise noise;
    int tanh;
    void* a;  // [B, D_S, C_pad] in type, C_pad = C padded to 8; z and no more is written to it if u is null
    void* u;  // [B, S, C] contiguous, in x.type, or null
} mk_token_products_arguments;
int mk_token_products_forward(const mk_token_products_arguments* arguments, mk_stream stream);

// a = GELU(z) and dz = (W2' . g) * GELU'(z) for any S; dz may be z.
typedef struct {
    mk_size size;
    mk_type type;
    int D_S;
    const void* g;    // [B, S, C] contiguous, in type
    const void* w2t;  // [D_S, S_pad] in type: the transpose of W2, S_pad = S padded to MK_K_MULTIPLE
    const void* z;    // [B, D_S, C_pad], as mk_token_products_forward left it
    mk_noise noise;
    int tanh;
    void* a;   // [B, D_S, C_pad]
    void* dz;  // [B, D_S, C_pad]
} mk_token_gelu_backward_arguments;
int mk_token_gelu_backward(const mk_token_gelu_backward_arguments* arguments, mk_stream stream);

// One weight's gradient and its bias's: equation (16). Partial sums in a fixed order; the caller adds them up.
typedef struct {
    mk_size size;
    mk_type type;
    int D_S;
    const void* left;     // [B, D_S, C_left] in type: dz for W1, a for W2
    int64_t C_left;       // row stride of left
    mk_input right;       // x for W1, g for W2
    const mk_norm* norm;  // of right for W1; null for W2
    mk_noise noise;       // left of dropped images is not read
    int splits;           // from mk_weight_gradient_splits
    float* partial;       // [splits, D_S, S]: dW1, or dW2 transposed
    float* bias;          // [splits, D_S] for W1 (db1), [splits, S] for W2 (db2)
} mk_token_weight_gradient_arguments;
int mk_weight_gradient_splits(mk_size size, int D_S, int multiprocessors);
int mk_token_weight_gradient(const mk_token_weight_gradient_arguments* arguments, mk_stream stream);

// -------------------------------------------------------------------------------------------------- channel mixing

// a = GELU(z), z = LN(u) . W3' + b3: equations (6), (8). LayerNorm is folded if wg is given, else applied to u.
typedef struct {
    mk_input u;
    mk_size size;
    mk_norm norm;  // mean and rstd; gamma and beta where LayerNorm is applied
    mk_type type;
    int D_C;
    const void* w3;      // [D_C, C_pad] in type: W3, or W' folded; C_pad = C padded to MK_K_MULTIPLE
    const float* b3;     // [D_C], applied; may be null
    const float* wg;     // [D_C], folded, or null
    const float* wb;     // [D_C], folded
    const float* scale;  // [D_C], folded; null for 1
    mk_noise noise;
    int tanh;
    int64_t row;  // row stride of a and z: D_C padded to 8
    void* a;      // [B * S, D_C] in type, or null
    void* z;      // [B * S, D_C] in type, or null
} mk_channel_fc1_arguments;
int mk_channel_fc1_forward(const mk_channel_fc1_arguments* arguments, mk_stream stream);

// y = u + a . W4' + b4: equation (7).
typedef struct {
    mk_input u;
    mk_size size;
    mk_type type;
    int D_C;
    const void* a;  // [B * S, D_C] in type, row stride row
    int64_t row;
    const void* w4;   // [C, D_pad] in type, D_pad = D_C padded to MK_K_MULTIPLE
    const float* b4;  // [C], or null
    mk_noise noise;
    void* y;  // [B, S, C] contiguous, in u.type
} mk_channel_fc2_arguments;
int mk_channel_fc2_forward(const mk_channel_fc2_arguments* arguments, mk_stream stream);

// dz = (g . W4) * GELU'(z), and a = GELU(z); sums of dz over each tile of rows, for db3: equation (20).
typedef struct {
    mk_size size;
    mk_type type;
    int D_C;
    const void* g;    // [B, S, C] contiguous, in type
    const void* w4t;  // [D_C, C_pad] in type: the transpose of W4, C_pad = C padded to MK_K_MULTIPLE
    const void* z;    // [B * S, D_C] in type, row stride row
    int64_t row;
    mk_noise noise;
    int tanh;
    void* dz;     // [B * S, D_C] contiguous
    void* a;      // [B * S, D_C] contiguous, or null
    float* sums;  // [mk_gelu_backward_tiles(B * S), D_C]
} mk_channel_gelu_backward_arguments;
int64_t mk_gelu_backward_tiles(int64_t rows);
int mk_channel_gelu_backward(const mk_channel_gelu_backward_arguments* arguments, mk_stream stream);

// ------------------------------------------------------------------------------------------------------ both halves

// g = the gradient of the branch, in type, from dy [B, S, C] contiguous: equation (12).
int mk_branch_gradient(const void* dy, mk_type dy_type, mk_size size, mk_noise noise, void* g, mk_type type,
                       mk_stream stream);

// dx = dy + LayerNorm'(dn), and n = LN(x) if it is wanted: equations (17) to (19).
typedef struct {
    mk_input x;
    mk_size size;
    mk_norm norm;
    mk_type type;    // of dn and n
    const void* dn;  // [B, S, C] contiguous, in type
    const void* dy;  // [B, S, C] contiguous, in x.type
    void* dx;        // [B, S, C] contiguous, in x.type
    void* n;         // [B, S, C] contiguous, in type, or null
    int parts;       // rows of sums: mk_norm_backward_parts
    float* sums;     // [parts, 3, C]: for dgamma, dbeta and the column sums of dy
} mk_norm_backward_arguments;
int mk_norm_backward_parts(mk_size size, int multiprocessors);
int mk_norm_backward(const mk_norm_backward_arguments* arguments, mk_stream stream);

// ------------------------------------------------------------------------------------------------------- packing

// packed [rows_padded, columns_padded] = w [rows, columns] cast to type and zero-padded. A transpose is a matter of
// strides. Vectors are matrices of one row.
typedef struct {
    const void* w;  // null: zeros, with rows = 0
    mk_type w_type;
    int rows, columns;
    int64_t stride_row, stride_column;
    void* packed;  // contiguous
    mk_type type;
    int rows_padded, columns_padded;
} mk_packing;

typedef struct {
    const void* data;  // or null
    mk_type type;
    int64_t stride;
} mk_vector;

// LayerNorm folded into fc1: equation (8). W' = round(W3 * gamma * 2^k), wg = the sum of W' over the channels,
// wb = W3 . beta + b3.
typedef struct {
    mk_packing w3;          // to W', 16 bits, rows_padded = rows
    mk_vector gamma, beta;  // [columns]; null for ones and zeros
    mk_vector b3;           // [rows]; null for zeros
    float* wg;              // [rows]
    float* wb;              // [rows]
    float* scale;           // [rows]: 2^-k, k by the row's largest element; null for k = 0
} mk_folding;

// All of `packings`, and `folding` if it is not null, in one launch.
enum { MK_MOST_PACKINGS = 12 };
int mk_pack_weights(const mk_packing* packings, int count, const mk_folding* folding, mk_stream stream);

#ifdef __cplusplus
}
#endif
