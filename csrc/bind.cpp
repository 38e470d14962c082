// The Python module mixer_kernels._C: the launchers of mixer_kernels.h and sm90/launchers.h, the forward passes of
// block.h.
//
// No PyTorch here: addresses and the stream come as integers, structs as tuples of their fields. Errors are
// RuntimeError. mixer_kernels/backends/cuda is what calls these functions, and what says which tensors they take.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"
#include "build_info.h"
#include "sm90/channel_schedule.h"

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
    : fields_caster<TokenWeights, int, int, int, Bytes, Floats, Bytes, Floats, Floats, Floats, int> {};
template <>
struct type_caster<FirstWeights>
    : fields_caster<FirstWeights, int, Bytes, Floats, Floats, Floats, Floats, Floats, Floats> {};
template <>
struct type_caster<SecondWeights> : fields_caster<SecondWeights, Bytes, Floats> {};
template <>
struct type_caster<mk_packing>
    : fields_caster<mk_packing, Bytes, mk_type, int, int, int64_t, int64_t, void*, mk_type, int, int> {};
template <>
struct type_caster<mk_vector> : fields_caster<mk_vector, Bytes, mk_type, int64_t> {};
template <>
struct type_caster<mk_folding>
    : fields_caster<mk_folding, mk_packing, mk_vector, mk_vector, mk_vector, float*, float*, float*> {};
template <>
struct type_caster<mk_sm90_schedule> : fields_caster<mk_sm90_schedule, mk_sm90_tile, int> {};

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

bool sm90_takes(mk_input x, mk_size size, mk_type type, bool tokens) {
    return mk_sm90_takes(x, size, type, tokens) != 0;
}

void token_forward(mk_input x, mk_size size, float eps, const TokenWeights& weights, mk_type type, bool tanh,
                   mk_noise noise, mk_device device, Address mean, Address rstd, Address a, Address u, Address stream) {
    token_half_forward(x, size, eps, weights, {type, tanh, noise, device, weights.sm90},
                       {at<float>(mean), at<float>(rstd)}, at(a), at(u), nullptr, at(stream));
}

void channel_forward(mk_input u, mk_size size, float eps, const FirstWeights& first, const SecondWeights& second,
                     mk_type type, bool tanh, mk_noise noise, mk_device device, bool sm90, Address mean, Address rstd,
                     Address a, Address z, int64_t row, Address y, Address stream) {
    channel_half_forward(u, size, eps, nullptr, first, second, {type, tanh, noise, device, sm90},
                         {at<float>(mean), at<float>(rstd)}, at(a), at(z), row, at(y), at(stream));
}

// statistics [4, B * S]; u [B, S, C] in x's type; partial as token_half_forward takes it.
void block_forward(mk_input x, mk_size size, float eps1, float eps2, const TokenWeights& tokens,
                   const FirstWeights& first, const SecondWeights& second, mk_type type, bool tanh, mk_device device,
                   bool sm90, Address statistics, Address partial, Address a_tokens, Address u, Address a_channels,
                   int64_t row, Address y, Address stream) {
    const Options options{type, tanh, {nullptr, 0.0f, 0.0f}, device, sm90};
    const int64_t rows = size.B * size.S;
    float* vectors = at<float>(statistics);
    token_half_forward(x, size, eps1, tokens, options, {vectors, vectors + rows}, at(a_tokens), at(u),
                       at<float>(partial), at(stream));
    const mk_input between{at(u), x.type, static_cast<int64_t>(size.S) * size.C, size.C, 1};
    channel_half_forward(between, size, eps2, at<float>(partial), first, second, options,
                         {vectors + 2 * rows, vectors + 3 * rows}, at(a_channels), nullptr, row, at(y), at(stream));
}

// A kernel of token mixing's data gradient; each takes W1 and W2 in a layout of its own.
template <class Arguments>
struct DataGradient {
    const void* Arguments::* w1;
    const void* Arguments::* w2;
    int (*launch)(const Arguments*, mk_stream);
    const char* name;

    void operator()(mk_input x, mk_size size, mk_norm norm, mk_type type, int S_pad, int D, int D_S, Address g,
                    Address first, Address b1, Address second, mk_noise noise, bool tanh, mk_device device, Address dn,
                    Address a, Address dz, Address stream) const {
        Arguments arguments{};
        arguments.x = x;
        arguments.size = size;
        arguments.norm = norm;
        arguments.type = type;
        arguments.S_pad = S_pad;
        arguments.D = D;
        arguments.D_S = D_S;
        arguments.g = at(g);
        arguments.*w1 = at(first);
        arguments.b1 = at<float>(b1);
        arguments.*w2 = at(second);
        arguments.noise = noise;
        arguments.tanh = tanh;
        arguments.device = device;
        arguments.dn = at(dn);
        arguments.a = at(a);
        arguments.dz = at(dz);
        check(launch(&arguments, at(stream)), name);
    }
};

const DataGradient<mk_token_data_gradient_arguments> token_data_gradient{
    &mk_token_data_gradient_arguments::w1, &mk_token_data_gradient_arguments::w2t, mk_token_data_gradient,
    "mk_token_data_gradient"};
const DataGradient<mk_sm90_token_data_gradient_arguments> sm90_token_data_gradient{
    &mk_sm90_token_data_gradient_arguments::w1t, &mk_sm90_token_data_gradient_arguments::w2,
    mk_sm90_token_data_gradient, "mk_sm90_token_data_gradient"};

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

void channel_hidden(mk_input u, mk_size size, const FirstWeights& weights, mk_type type, mk_device device, bool sm90,
                    Address mean, Address rstd, int64_t row, Address z, Address stream) {
    mk_channel_fc1_arguments arguments = first_product(u, size, weights, type, {at<float>(mean), at<float>(rstd)});
    arguments.row = row;
    arguments.z = at(z);
    channel_fc1_forward(arguments, sm90, device, at(stream));
}

mk_channel_gelu_backward_arguments gelu_backward(mk_size size, mk_type type, int D_C, Address g, Address w4t, Address z,
                                                 int64_t row, mk_noise noise, bool tanh, Address dz, Address a,
                                                 Address sums) {
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
    return arguments;
}

// sums: a row for each of sm90_gelu_backward_tiles or gelu_backward_tiles.
void channel_gelu_backward(mk_size size, mk_type type, int D_C, Address g, Address w4t, Address z, int64_t row,
                           mk_noise noise, bool tanh, mk_device device, bool sm90, Address dz, Address a, Address sums,
                           Address stream) {
    const auto arguments = gelu_backward(size, type, D_C, g, w4t, z, row, noise, tanh, dz, a, sums);
    if (sm90) {
        check(mk_sm90_channel_gelu_backward(&arguments, device, at(stream)), "mk_sm90_channel_gelu_backward");
    } else {
        check(mk_channel_gelu_backward(&arguments, at(stream)), "mk_channel_gelu_backward");
    }
}

// What sm90/ has in several variants, for tests and for tuning.

// variant: cluster, consumers, pipelined.
void sm90_token_mixing_forward(mk_input x, mk_size size, const TokenWeights& weights, mk_type type, mk_noise noise,
                               bool tanh, std::array<int, 3> variant, mk_device device, Address mean, Address rstd,
                               Address u, Address partial, Address stream) {
    mk_sm90_token_mixing_arguments arguments =
        sm90_token_mixing(x, size, weights, {type, tanh, noise, device, true}, {at<float>(mean), at<float>(rstd)},
                          at(u), at<float>(partial));
    arguments.cluster = variant[0];
    arguments.consumers = variant[1];
    arguments.pipelined = variant[2];
    check(mk_sm90_token_mixing_forward(&arguments, at(stream)), "mk_sm90_token_mixing_forward");
}

void sm90_channel_fc1(mk_input u, mk_size size, const FirstWeights& weights, mk_type type, mk_noise noise, bool tanh,
                      mk_sm90_schedule schedule, mk_device device, Address mean, Address rstd, int64_t row, Address a,
                      Address z, Address stream) {
    mk_channel_fc1_arguments arguments = first_product(u, size, weights, type, {at<float>(mean), at<float>(rstd)});
    arguments.noise = noise;
    arguments.tanh = tanh;
    arguments.row = row;
    arguments.a = at(a);
    arguments.z = at(z);
    check(mk_sm90_channel_fc1_scheduled(&arguments, schedule, device, at(stream)), "mk_sm90_channel_fc1_scheduled");
}

void sm90_channel_fc2(mk_input u, mk_size size, int D_C, const SecondWeights& weights, mk_type type, Address a,
                      int64_t row, mk_noise noise, mk_sm90_schedule schedule, mk_device device, Address y,
                      Address stream) {
    mk_channel_fc2_arguments arguments = second_product(u, size, D_C, weights, type, at(a), row);
    arguments.noise = noise;
    arguments.y = at(y);
    check(mk_sm90_channel_fc2_scheduled(&arguments, schedule, device, at(stream)), "mk_sm90_channel_fc2_scheduled");
}

void sm90_channel_gelu_backward(mk_size size, mk_type type, int D_C, Address g, Address w4t, Address z, int64_t row,
                                mk_noise noise, bool tanh, mk_sm90_schedule schedule, mk_device device, Address dz,
                                Address a, Address sums, Address stream) {
    const auto arguments = gelu_backward(size, type, D_C, g, w4t, z, row, noise, tanh, dz, a, sums);
    check(mk_sm90_channel_gelu_backward_scheduled(&arguments, schedule, device, at(stream)),
          "mk_sm90_channel_gelu_backward_scheduled");
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

void pack_weights(const std::vector<mk_packing>& packings, const std::optional<mk_folding>& folding, Address stream) {
    check(
        mk_pack_weights(packings.data(), static_cast<int>(packings.size()), folding ? &*folding : nullptr, at(stream)),
        "mk_pack_weights");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using py::operator""_a;
    describe_build(module);
    module.attr("HIDDEN_MULTIPLE") = static_cast<int>(MK_HIDDEN_MULTIPLE);
    module.attr("SM90_HIDDEN_MULTIPLE") = static_cast<int>(MK_SM90_HIDDEN_MULTIPLE);
    module.attr("K_MULTIPLE") = static_cast<int>(MK_K_MULTIPLE);
    module.def("padded_tokens", &mk_padded_tokens);
    module.def("sm90_padded_tokens", &mk_sm90_padded_tokens);
    module.def("sm90_takes", &sm90_takes, "x"_a, "size"_a, "type"_a, "tokens"_a);
    module.def("weight_gradient_splits", &mk_weight_gradient_splits);
    module.def("sm90_channel_schedule", [](int product, int64_t rows, int columns, int depth, mk_device device) {
        const auto schedule =
            mk_sm90_channel_schedule(static_cast<mk_sm90_channel_product>(product), rows, columns, depth, device);
        return std::make_pair(static_cast<int>(schedule.tile), schedule.cluster);
    });
    module.def("gelu_backward_tiles", &mk_gelu_backward_tiles);
    module.def("sm90_gelu_backward_tiles", &mk_sm90_gelu_backward_tiles);
    module.def("norm_backward_parts", &mk_norm_backward_parts);

    const auto define = [&](const char* name, auto function, auto... names) {
        module.def(name, function, names..., py::call_guard<py::gil_scoped_release>());
    };
    define("token_mixing_forward", &token_forward);
    define("channel_mixing_forward", &channel_forward);
    define("mixer_block_forward", &block_forward);
    define("pack_weights", &pack_weights);

    define("token_data_gradient", token_data_gradient, "x"_a, "size"_a, "norm"_a, "type"_a, "S_pad"_a, "D"_a, "D_S"_a,
           "g"_a, "w1"_a, "b1"_a, "w2t"_a, "noise"_a, "tanh"_a, "device"_a, "dn"_a, "a"_a, "dz"_a, "stream"_a);
    define("sm90_token_data_gradient", sm90_token_data_gradient, "x"_a, "size"_a, "norm"_a, "type"_a, "S_pad"_a, "D"_a,
           "D_S"_a, "g"_a, "w1t"_a, "b1"_a, "w2"_a, "noise"_a, "tanh"_a, "device"_a, "dn"_a, "a"_a, "dz"_a, "stream"_a);
    define("token_hidden", &token_hidden, "x"_a, "size"_a, "norm"_a, "type"_a, "D_S"_a, "w1"_a, "b1"_a, "z"_a,
           "stream"_a);
    define("token_gelu_backward", &token_gelu_backward, "size"_a, "type"_a, "D_S"_a, "g"_a, "w2t"_a, "z"_a, "noise"_a,
           "tanh"_a, "a"_a, "dz"_a, "stream"_a);
    define("token_weight_gradient", &token_weight_gradient, "size"_a, "type"_a, "D_S"_a, "left"_a, "C_left"_a,
           "right"_a, "norm"_a, "noise"_a, "splits"_a, "partial"_a, "bias"_a, "stream"_a);
    define("channel_hidden", &channel_hidden, "u"_a, "size"_a, "weights"_a, "type"_a, "device"_a, "sm90"_a, "mean"_a,
           "rstd"_a, "row"_a, "z"_a, "stream"_a);
    define("channel_gelu_backward", &channel_gelu_backward, "size"_a, "type"_a, "D_C"_a, "g"_a, "w4t"_a, "z"_a, "row"_a,
           "noise"_a, "tanh"_a, "device"_a, "sm90"_a, "dz"_a, "a"_a, "sums"_a, "stream"_a);
    define("sm90_token_mixing_forward", &sm90_token_mixing_forward, "x"_a, "size"_a, "weights"_a, "type"_a, "noise"_a,
           "tanh"_a, "variant"_a, "device"_a, "mean"_a, "rstd"_a, "u"_a, "partial"_a, "stream"_a);
    define("sm90_channel_fc1", &sm90_channel_fc1, "u"_a, "size"_a, "weights"_a, "type"_a, "noise"_a, "tanh"_a,
           "schedule"_a, "device"_a, "mean"_a, "rstd"_a, "row"_a, "a"_a, "z"_a, "stream"_a);
    define("sm90_channel_fc2", &sm90_channel_fc2, "u"_a, "size"_a, "D_C"_a, "weights"_a, "type"_a, "a"_a, "row"_a,
           "noise"_a, "schedule"_a, "device"_a, "y"_a, "stream"_a);
    define("sm90_channel_gelu_backward", &sm90_channel_gelu_backward, "size"_a, "type"_a, "D_C"_a, "g"_a, "w4t"_a,
           "z"_a, "row"_a, "noise"_a, "tanh"_a, "schedule"_a, "device"_a, "dz"_a, "a"_a, "sums"_a, "stream"_a);
    define("branch_gradient", &branch_gradient);
    define("norm_backward", &norm_backward, "x"_a, "size"_a, "norm"_a, "type"_a, "dn"_a, "dy"_a, "dx"_a, "n"_a,
           "parts"_a, "sums"_a, "stream"_a);
}
