#include "block.h"

#include <stdexcept>
#include <string>

namespace mixer_kernels {

void check(int error, const char* launcher) {
    if (error == 0) return;
    throw std::runtime_error(std::string(launcher) + ": " + mk_error_string(error) + " (CUDA error " +
                             std::to_string(error) + ")");
}

mk_sm90_token_mixing_arguments sm90_token_mixing(mk_input x, mk_size size, const TokenWeights& weights,
                                                 const Options& options, Statistics statistics, void* u,
                                                 float* partial) {
    mk_sm90_token_mixing_arguments mixing{};
    mixing.x = x;
    mixing.size = size;
    mixing.norm = {statistics.mean, statistics.rstd, weights.gamma, weights.beta};
    mixing.type = options.type;
    mixing.S_pad = weights.S_pad;
    mixing.D = weights.D;
    mixing.w1t = weights.w1;
    mixing.b1 = weights.b1;
    mixing.w2 = weights.w2;
    mixing.b2 = weights.b2;
    mixing.noise = options.noise;
    mixing.tanh = options.tanh;
    mixing.device = options.device;
    mixing.u = u;
    mixing.partial = partial;
    return mixing;
}

void token_half_forward(mk_input x, mk_size size, float eps, const TokenWeights& weights, const Options& options,
                        Statistics statistics, void* a, void* u, float* partial, mk_stream stream) {
    check(mk_row_statistics(x, size, eps, statistics.mean, statistics.rstd, stream), "mk_row_statistics");
    const mk_norm norm{statistics.mean, statistics.rstd, weights.gamma, weights.beta};
    if (weights.sm90) {
        const auto mixing = sm90_token_mixing(x, size, weights, options, statistics, u, partial);
        check(mk_sm90_token_mixing_forward(&mixing, stream), "mk_sm90_token_mixing_forward");
        return;
    }
    if (mk_padded_tokens(size.S) != 0) {
        mk_token_mixing_arguments mixing{};
        mixing.x = x;
        mixing.size = size;
        mixing.norm = norm;
        mixing.type = options.type;
        mixing.S_pad = weights.S_pad;
        mixing.D = weights.D;
        mixing.w1 = weights.w1;
        mixing.b1 = weights.b1;
        mixing.w2 = weights.w2;
        mixing.b2 = weights.b2;
        mixing.noise = options.noise;
        mixing.tanh = options.tanh;
        mixing.device = options.device;
        mixing.u = u;
        check(mk_token_mixing_forward(&mixing, stream), "mk_token_mixing_forward");
        return;
    }
    mk_token_products_arguments products{};
    products.x = x;
    products.size = size;
    products.norm = norm;
    products.type = options.type;
    products.D_S = weights.D_S;
    products.w1 = weights.w1;
    products.b1 = weights.b1;
    products.w2 = weights.w2;
    products.b2 = weights.b2;
    products.noise = options.noise;
    products.tanh = options.tanh;
    products.a = a;
    products.u = u;
    check(mk_token_products_forward(&products, stream), "mk_token_products_forward");
}

mk_channel_fc1_arguments first_product(mk_input u, mk_size size, const FirstWeights& weights, mk_type type,
                                       Statistics statistics) {
    mk_channel_fc1_arguments fc1{};
    fc1.u = u;
    fc1.size = size;
    fc1.norm = {statistics.mean, statistics.rstd, weights.gamma, weights.beta};
    fc1.type = type;
    fc1.D_C = weights.D_C;
    fc1.w3 = weights.w3;
    fc1.b3 = weights.b3;
    fc1.wg = weights.wg;
    fc1.wb = weights.wb;
    fc1.scale = weights.scale;
    return fc1;
}

mk_channel_fc2_arguments second_product(mk_input u, mk_size size, int D_C, const SecondWeights& weights, mk_type type,
                                        const void* a, int64_t row) {
    mk_channel_fc2_arguments fc2{};
    fc2.u = u;
    fc2.size = size;
    fc2.type = type;
    fc2.D_C = D_C;
    fc2.a = a;
    fc2.row = row;
    fc2.w4 = weights.w4;
    fc2.b4 = weights.b4;
    return fc2;
}

void channel_fc1_forward(const mk_channel_fc1_arguments& fc1, int sm90, mk_device device, mk_stream stream) {
    if (sm90 && mk_sm90_takes(fc1.u, fc1.size, fc1.type, 0)) {
        check(mk_sm90_channel_fc1_forward(&fc1, device, stream), "mk_sm90_channel_fc1_forward");
    } else {
        check(mk_channel_fc1_forward(&fc1, stream), "mk_channel_fc1_forward");
    }
}

void channel_half_forward(mk_input u, mk_size size, float eps, const float* partial, const FirstWeights& first,
                          const SecondWeights& second, const Options& options, Statistics statistics, void* a, void* z,
                          int64_t row, void* y, mk_stream stream) {
    if (partial != nullptr) {
        check(mk_merge_statistics(partial, size, eps, statistics.mean, statistics.rstd, stream), "mk_merge_statistics");
    } else {
        check(mk_row_statistics(u, size, eps, statistics.mean, statistics.rstd, stream), "mk_row_statistics");
    }
    mk_channel_fc1_arguments fc1 = first_product(u, size, first, options.type, statistics);
    fc1.noise = options.noise;
    fc1.tanh = options.tanh;
    fc1.row = row;
    fc1.a = a;
    fc1.z = z;
    channel_fc1_forward(fc1, options.sm90, options.device, stream);
    mk_channel_fc2_arguments fc2 = second_product(u, size, first.D_C, second, options.type, a, row);
    fc2.noise = options.noise;
    fc2.y = y;
    if (options.sm90 && mk_sm90_takes(u, size, options.type, 0)) {
        check(mk_sm90_channel_fc2_forward(&fc2, options.device, stream), "mk_sm90_channel_fc2_forward");
    } else {
        check(mk_channel_fc2_forward(&fc2, stream), "mk_channel_fc2_forward");
    }
}

}  // namespace mixer_kernels
