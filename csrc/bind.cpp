// The Python module mixer_kernels._C: the launchers of mixer_kernels.h and the forward passes of block.h.
//
// No PyTorch here: addresses and the stream come as integers, structs as tuples of their fields. Errors are
// RuntimeError. mixer_kernels/backends/cuda is what calls these functions, and what says which tensors they take.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <type_traits>
#include <utility>

#include "block.h"
#include "build_info.h"

namespace py = pybind11;
using namespace mixer_kernels;

namespace pybind11 {
namespace detail {

// A struct as a tuple of its fields, in their order; addresses are integers.
template <class Struct, class... Fields>
struct fields_caster {
    PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));

    bool load(handle source, bool) {
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != sizeof...(Fields)) return false;
        return load_fields(source, std::index_sequence_for<Fields...>{});
    }

  private:
    template <size_t... Is>
    bool load_fields(handle source, std::index_sequence<Is...>) {
        value = Struct{field<Fields>(PyTuple_GET_ITEM(source.ptr(), Is))...};
        return true;
    }

    template <class Field>
    static Field field(handle item) {
        if constexpr (std::is_pointer_v<Field>) {
            return reinterpret_cast<Field>(item.cast<uintptr_t>());
        } else if constexpr (std::is_enum_v<Field>) {
            return static_cast<Field>(item.cast<int>());
        } else {
            return item.cast<Field>();
        }
    }
};

using Floats = const float*;
using Bytes = const void*;

template <>
struct type_caster<mk_input> : fields_caster<mk_input, Bytes, mk_type, int64_t, int64_t, int64_t> {};
template <>
struct type_caster<mk_size> : fields_caster<mk_size, int64_t, int, int> {};
template <>
struct type_caster<mk_noise> : fields_caster<mk_noise, const int64_t*, float, float> {};
template <>
struct type_caster<mk_device> : fields_caster<mk_device, int, int> {};
template <>
struct type_caster<mk_norm> : fields_caster<mk_norm, Floats, Floats, Floats, Floats> {};
template <>
struct type_caster<TokenWeights>
    : fields_caster<TokenWeights, int, int, int, Bytes, Floats, Bytes, Floats, Floats, Floats> {};
template <>
struct type_caster<FirstWeights>
    : fields_caster<FirstWeights, int, Bytes, Floats, Floats, Floats, Floats, Floats, Floats> {};
template <>
struct type_caster<SecondWeights> : fields_caster<SecondWeights, Bytes, Floats> {};

template <>
struct type_caster<mk_type> {
    PYBIND11_TYPE_CASTER(mk_type, const_name("int"));

    bool load(handle source, bool) {
        value = static_cast<mk_type>(source.cast<int>());
        return value >= MK_FLOAT32 && value <= MK_BFLOAT16;
    }
};

}  // namespace detail
}  // namespace pybind11

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void token_forward(mk_input x, mk_size size, float eps, const TokenWeights& weights, mk_type type, bool tanh,
                   mk_noise noise, mk_device device, Address mean, Address rstd, Address a, Address u, Address stream) {
    token_half_forward(x, size, eps, weights, {type, tanh, noise, device}, {at<float>(mean), at<float>(rstd)}, at(a),
                       at(u), at(stream));
}

void channel_forward(mk_input u, mk_size size, float eps, const FirstWeights& first, const SecondWeights& second,
                     mk_type type, bool tanh, mk_noise noise, mk_device device, Address mean, Address rstd, Address a,
                     Address z, int64_t row, Address y, Address stream) {
    channel_half_forward(u, size, eps, first, second, {type, tanh, noise, device}, {at<float>(mean), at<float>(rstd)},
                         at(a), at(z), row, at(y), at(stream));
}

// statistics [4, B * S]; u [B, S, C] in x's type.
void block_forward(mk_input x, mk_size size, float eps1, float eps2, const TokenWeights& tokens,
                   const FirstWeights& first, const SecondWeights& second, mk_type type, bool tanh, mk_device device,
                   Address statistics, Address a_tokens, Address u, Address a_channels, int64_t row, Address y,
                   Address stream) {
    const Options options{type, tanh, {nullptr, 0.0f, 0.0f}, device};
    const int64_t rows = size.B * size.S;
    float* vectors = at<float>(statistics);
    token_half_forward(x, size, eps1, tokens, options, {vectors, vectors + rows}, at(a_tokens), at(u), at(stream));
    const mk_input between{at(u), x.type, static_cast<int64_t>(size.S) * size.C, size.C, 1};
    channel_half_forward(between, size, eps2, first, second, options, {vectors + 2 * rows, vectors + 3 * rows},
                         at(a_channels), nullptr, row, at(y), at(stream));
}

void token_data_gradient(mk_input x, mk_size size, mk_norm norm, mk_type type, int S_pad, int D, int D_S, Address g,
                         Address w1, Address b1, Address w2t, mk_noise noise, bool tanh, mk_device device, Address dn,
                         Address a, Address dz, Address stream) {
    mk_token_data_gradient_arguments arguments{};
    arguments.x = x;
    arguments.size = size;
    arguments.norm = norm;
    arguments.type = type;
    arguments.S_pad = S_pad;
    arguments.D = D;
    arguments.D_S = D_S;
    arguments.g = at(g);
    arguments.w1 = at(w1);
    arguments.b1 = at<float>(b1);
    arguments.w2t = at(w2t);
    arguments.noise = noise;
    arguments.tanh = tanh;
    arguments.device = device;
    arguments.dn = at(dn);
    arguments.a = at(a);
    arguments.dz = at(dz);
    check(mk_token_data_gradient(&arguments, at(stream)), "mk_token_data_gradient");
}

void token_hidden(mk_input x, mk_size size, mk_norm norm, mk_type type, int D_S, Address w1, Address b1, Address z,
                  Address stream) {
    mk_token_products_arguments arguments{};
    arguments.x = x;
    arguments.size = size;
    arguments.norm = norm;
    arguments.type = type;
    arguments.D_S = D_S;
    arguments.w1 = at(w1);
    arguments.b1 = at<float>(b1);
    arguments.a = at(z);
    check(mk_token_products_forward(&arguments, at(stream)), "mk_token_products_forward");
}

void token_gelu_backward(mk_size size, mk_type type, int D_S, Address g, Address w2t, Address z, mk_noise noise,
                         bool tanh, Address a, Address dz, Address stream) {
    mk_token_gelu_backward_arguments arguments{};
    arguments.size = size;
    arguments.type = type;
    arguments.D_S = D_S;
    arguments.g = at(g);
    arguments.w2t = at(w2t);
    arguments.z = at(z);
    arguments.noise = noise;
    arguments.tanh = tanh;
    arguments.a = at(a);
    arguments.dz = at(dz);
    check(mk_token_gelu_backward(&arguments, at(stream)), "mk_token_gelu_backward");
}

void token_weight_gradient(mk_size size, mk_type type, int D_S, Address left, int64_t C_left, mk_input right,
                           std::optional<mk_norm> norm, mk_noise noise, int splits, Address partial, Address bias,
                           Address stream) {
    mk_token_weight_gradient_arguments arguments{};
    arguments.size = size;
    arguments.type = type;
    arguments.D_S = D_S;
    arguments.left = at(left);
    arguments.C_left = C_left;
    arguments.right = right;
    arguments.norm = norm ? &*norm : nullptr;
    arguments.noise = noise;
    arguments.splits = splits;
    arguments.partial = at<float>(partial);
    arguments.bias = at<float>(bias);
    check(mk_token_weight_gradient(&arguments, at(stream)), "mk_token_weight_gradient");
}

void channel_hidden(mk_input u, mk_size size, const FirstWeights& weights, mk_type type, Address mean, Address rstd,
                    int64_t row, Address z, Address stream) {
    mk_channel_fc1_arguments arguments = first_product(u, size, weights, type, {at<float>(mean), at<float>(rstd)});
    arguments.row = row;
    arguments.z = at(z);
    check(mk_channel_fc1_forward(&arguments, at(stream)), "mk_channel_fc1_forward");
}

void channel_gelu_backward(mk_size size, mk_type type, int D_C, Address g, Address w4t, Address z, int64_t row,
                           mk_noise noise, bool tanh, Address dz, Address a, Address sums, Address stream) {
    mk_channel_gelu_backward_arguments arguments{};
    arguments.size = size;
    arguments.type = type;
    arguments.D_C = D_C;
    arguments.g = at(g);
    arguments.w4t = at(w4t);
    arguments.z = at(z);
    arguments.row = row;
    arguments.noise = noise;
    arguments.tanh = tanh;
    arguments.dz = at(dz);
    arguments.a = at(a);
    arguments.sums = at<float>(sums);
    check(mk_channel_gelu_backward(&arguments, at(stream)), "mk_channel_gelu_backward");
}

void branch_gradient(Address dy, mk_type dy_type, mk_size size, mk_noise noise, Address g, mk_type type,
                     Address stream) {
    check(mk_branch_gradient(at(dy), dy_type, size, noise, at(g), type, at(stream)), "mk_branch_gradient");
}

void norm_backward(mk_input x, mk_size size, mk_norm norm, mk_type type, Address dn, Address dy, Address dx, Address n,
                   int parts, Address sums, Address stream) {
    mk_norm_backward_arguments arguments{};
    arguments.x = x;
    arguments.size = size;
    arguments.norm = norm;
    arguments.type = type;
    arguments.dn = at(dn);
    arguments.dy = at(dy);
    arguments.dx = at(dx);
    arguments.n = at(n);
    arguments.parts = parts;
    arguments.sums = at<float>(sums);
    check(mk_norm_backward(&arguments, at(stream)), "mk_norm_backward");
}

void pack_weight(Address w, mk_type w_type, int64_t rows, int64_t columns, bool transposed, Address packed,
                 mk_type type, int64_t rows_padded, int64_t columns_padded, Address stream) {
    check(mk_pack_weight(at(w), w_type, rows, columns, transposed, at(packed), type, rows_padded, columns_padded,
                         at(stream)),
          "mk_pack_weight");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    describe_build(module);
    module.attr("HIDDEN_MULTIPLE") = static_cast<int>(MK_HIDDEN_MULTIPLE);
    module.attr("K_MULTIPLE") = static_cast<int>(MK_K_MULTIPLE);
    module.def("padded_tokens", &mk_padded_tokens);
    module.def("weight_gradient_splits", &mk_weight_gradient_splits);
    module.def("gelu_backward_tiles", &mk_gelu_backward_tiles);
    module.def("norm_backward_parts", &mk_norm_backward_parts);

    const auto define = [&](const char* name, auto function, auto... names) {
        module.def(name, function, names..., py::call_guard<py::gil_scoped_release>());
    };
    define("token_mixing_forward", &token_forward);
    define("channel_mixing_forward", &channel_forward);
    define("mixer_block_forward", &block_forward);
    define("pack_weight", &pack_weight);

    using py::operator""_a;
    define("token_data_gradient", &token_data_gradient, "x"_a, "size"_a, "norm"_a, "type"_a, "S_pad"_a, "D"_a, "D_S"_a,
           "g"_a, "w1"_a, "b1"_a, "w2t"_a, "noise"_a, "tanh"_a, "device"_a, "dn"_a, "a"_a, "dz"_a, "stream"_a);
    define("token_hidden", &token_hidden, "x"_a, "size"_a, "norm"_a, "type"_a, "D_S"_a, "w1"_a, "b1"_a, "z"_a,
           "stream"_a);
    define("token_gelu_backward", &token_gelu_backward, "size"_a, "type"_a, "D_S"_a, "g"_a, "w2t"_a, "z"_a, "noise"_a,
           "tanh"_a, "a"_a, "dz"_a, "stream"_a);
    define("token_weight_gradient", &token_weight_gradient, "size"_a, "type"_a, "D_S"_a, "left"_a, "C_left"_a,
           "right"_a, "norm"_a, "noise"_a, "splits"_a, "partial"_a, "bias"_a, "stream"_a);
    define("channel_hidden", &channel_hidden, "u"_a, "size"_a, "weights"_a, "type"_a, "mean"_a, "rstd"_a, "row"_a,
           "z"_a, "stream"_a);
    define("channel_gelu_backward", &channel_gelu_backward, "size"_a, "type"_a, "D_C"_a, "g"_a, "w4t"_a, "z"_a, "row"_a,
           "noise"_a, "tanh"_a, "dz"_a, "a"_a, "sums"_a, "stream"_a);
    define("branch_gradient", &branch_gradient);
    define("norm_backward", &norm_backward, "x"_a, "size"_a, "norm"_a, "type"_a, "dn"_a, "dy"_a, "dx"_a, "n"_a,
           "parts"_a, "sums"_a, "stream"_a);
}
