// Runs every launcher over small shapes, forward and backward: in several orders of blocks and threads and with
// asynchronous copies that land late, early or at random. Results must be finite and the same bit by bit, and nothing
// outside of an array may be written. Sanitizers see the rest. What the numbers should be is for the tests in Python.
//
//   driver [runs]

#include <list>

#include "arrays.h"
#include "problems.h"

namespace {

struct Problem {
    const char* name;
    int64_t B;
    int S, C, D_S, D_C;
    mk_type type, stream;
    bool channels_first;  // x and u lie as [B, C, S]
    bool affine, folded, tanh;
    float dropout_p, drop_path_p;
};

// A block's forward and backward pass, launcher by launcher, each fed with what went before or with random numbers.
class Block {
  public:
    explicit Block(const Problem& problem) : p_(problem), random_(1) {
        noise_ = {p_.dropout_p > 0 || p_.drop_path_p > 0 ? &seed_ : nullptr, p_.dropout_p, p_.drop_path_p};
        x_ = stream("x");
        u_ = stream("u in");
        token_half();
        channel_half();
    }

    std::list<Array>& arrays() { return arrays_; }

  private:
    Array& add(const char* name, mk_type type, int64_t rows, int64_t columns, int64_t stride = 0) {
        return arrays_.emplace_back(name, type, rows, columns, stride);
    }
    Array& random(const char* name, mk_type type, int64_t rows, int64_t columns, int64_t stride = 0) {
        return add(name, type, rows, columns, stride).fill(random_, -1.0f, 1.0f);
    }
    float* vector(const char* name, int64_t length) { return random(name, MK_FLOAT32, 1, length).floats(); }

    mk_input stream(const char* name) {
        const int64_t S = p_.S, C = p_.C;
        void* data = random(name, p_.stream, p_.B * S, C);
        return {data, p_.stream, S * C, p_.channels_first ? 1 : C, p_.channels_first ? S : 1};
    }

    mk_norm statistics(mk_input of) {
        float* mean = add("mean", MK_FLOAT32, 1, p_.B * p_.S).floats();
        float* rstd = add("rstd", MK_FLOAT32, 1, p_.B * p_.S).floats();
        check("mk_row_statistics", mk_row_statistics(of, size(), 1e-6f, mean, rstd, nullptr));
        return {mean, rstd, p_.affine ? vector("gamma", p_.C) : nullptr, p_.affine ? vector("beta", p_.C) : nullptr};
    }

    // Zero-padded to [rows_padded, columns_padded], of a weight of the other orientation if transposed.
    void* packed(const char* name, int rows, int columns, int64_t rows_padded, int64_t columns_padded,
                 bool transposed = false) {
        Array& result = add(name, p_.type, rows_padded, columns_padded);
        const mk_packing packing = packing_of(rows, columns, transposed, result, rows_padded, columns_padded);
        check("mk_pack_weights", mk_pack_weights(&packing, 1, nullptr, nullptr));
        return result;
    }
    mk_packing packing_of(int rows, int columns, bool transposed, void* result, int64_t rows_padded,
                          int64_t columns_padded) {
        void* w = random("weight", p_.stream, transposed ? columns : rows, transposed ? rows : columns);
        return {w,
                p_.stream,
                rows,
                columns,
                transposed ? 1 : columns,
                transposed ? rows : 1,
                result,
                p_.type,
                static_cast<int>(rows_padded),
                static_cast<int>(columns_padded)};
    }

    // W' and what goes with it, and in the same launch a vector.
    void fold(mk_channel_fc1_arguments& fc1) {
        const int columns = static_cast<int>(padded(p_.C, MK_K_MULTIPLE));
        Array& w = add("w3", p_.type, p_.D_C, columns);
        float* wg = add("wg", MK_FLOAT32, 1, p_.D_C).floats();
        float* wb = add("wb", MK_FLOAT32, 1, p_.D_C).floats();
        float* scale = p_.type == MK_FLOAT16 ? add("scale", MK_FLOAT32, 1, p_.D_C).floats() : nullptr;
        const auto affine = [&](const char* name, int64_t length) {
            return p_.affine ? mk_vector{random(name, p_.stream, 1, length), p_.stream, 1} : mk_vector{};
        };
        const mk_folding folding{packing_of(p_.D_C, p_.C, false, w, p_.D_C, columns),
                                 affine("gamma", p_.C),
                                 affine("beta", p_.C),
                                 affine("b3", p_.D_C),
                                 wg,
                                 wb,
                                 scale};
        const mk_packing vector = packing_of(1, p_.D_C, false, add("b", p_.type, 1, p_.D_C + 3), 1, p_.D_C + 3);
        check("mk_pack_weights", mk_pack_weights(&vector, 1, &folding, nullptr));
        fc1.w3 = w;
        fc1.wg = wg;
        fc1.wb = wb;
        fc1.scale = scale;
    }

    mk_size size() const { return {p_.B, p_.S, p_.C}; }
    mk_input contiguous(const void* data, mk_type type) const {
        const int64_t S = p_.S, C = p_.C;
        return {data, type, S * C, C, 1};
    }

    void* branch_gradient() {
        const int64_t rows = p_.B * p_.S;
        Array& g = add("g", p_.type, rows, p_.C);
        Array& dy = random("dy", p_.stream, rows, p_.C);
        check("mk_branch_gradient", mk_branch_gradient(dy, p_.stream, size(), noise_, g, p_.type, nullptr));
        return g;
    }

    void norm_backward(mk_input of, mk_norm norm, const void* dn) {
        const int64_t rows = p_.B * p_.S;
        const int parts = mk_norm_backward_parts(size(), 2);
        Array& dx = add("dx", p_.stream, rows, p_.C);
        Array& n = add("n", p_.type, rows, p_.C);
        Array& sums = add("norm sums", MK_FLOAT32, parts * 3, p_.C);
        const mk_norm_backward_arguments arguments{
            of, size(), norm, p_.type, dn, random("dy", p_.stream, rows, p_.C), dx, n, parts, sums.floats()};
        check("mk_norm_backward", mk_norm_backward(&arguments, nullptr));
    }

    void weight_gradient(const void* left, int64_t C_left, mk_input right, const mk_norm* norm) {
        const int splits = mk_weight_gradient_splits(size(), p_.D_S, 4);
        Array& partial = add("weight gradient", MK_FLOAT32, splits * p_.D_S, p_.S);
        Array& bias = add("bias gradient", MK_FLOAT32, splits, norm != nullptr ? p_.D_S : p_.S);
        const mk_token_weight_gradient_arguments arguments{
            size(), p_.type, p_.D_S, left, C_left, right, norm, noise_, splits, partial.floats(), bias.floats()};
        check("mk_token_weight_gradient", mk_token_weight_gradient(&arguments, nullptr));
    }

    void token_half() {
        const mk_norm norm = statistics(x_);
        void* g = branch_gradient();
        token_fused(norm, g);
        token_products(norm, g);
    }

    void token_fused(mk_norm norm, void* g) {
        const int S_pad = mk_padded_tokens(p_.S), D = static_cast<int>(padded(p_.D_S, MK_HIDDEN_MULTIPLE));
        const int64_t rows = p_.B * p_.S;
        void* w1 = packed("w1", p_.D_S, p_.S, D, S_pad);
        float* b1 = vector("b1", D);
        void* w2 = packed("w2", p_.S, p_.D_S, S_pad, D);
        Array& u = add("u", p_.stream, rows, p_.C);
        const mk_token_mixing_arguments forward{
            x_, size(), norm, p_.type, S_pad, D, w1, b1, w2, vector("b2", S_pad), noise_, p_.tanh, mk_device{}, u};
        check("mk_token_mixing_forward", mk_token_mixing_forward(&forward, nullptr));

        void* w2t = packed("w2t", p_.D_S, p_.S, D, S_pad, true);
        Array& dn = add("dn", p_.type, rows, p_.C);
        const bool drops = p_.drop_path_p > 0;
        Array& a = add("a", p_.type, p_.B * p_.D_S, p_.C).skips_rows(drops);
        Array& dz = add("dz", p_.type, p_.B * p_.D_S, p_.C).skips_rows(drops);
        const mk_token_data_gradient_arguments backward{x_, size(), norm,   p_.type, S_pad,       D,  p_.D_S, g, w1,
                                                        b1, w2t,    noise_, p_.tanh, mk_device{}, dn, a,      dz};
        check("mk_token_data_gradient", mk_token_data_gradient(&backward, nullptr));
        weight_gradient(dz, p_.C, x_, &norm);
        weight_gradient(a, p_.C, contiguous(g, p_.type), nullptr);
        norm_backward(x_, norm, dn);
    }

    void token_products(mk_norm norm, void* g) {
        const int64_t S_pad = padded(p_.S, MK_K_MULTIPLE), D_pad = padded(p_.D_S, MK_K_MULTIPLE);
        const int64_t C_pad = padded(p_.C, 8), hidden = p_.B * p_.D_S;
        void* w1 = packed("w1", p_.D_S, p_.S, p_.D_S, S_pad);
        void* w2 = packed("w2", p_.S, p_.D_S, p_.S, D_pad);
        Array& scratch = add("a", p_.type, hidden, p_.C, C_pad);
        Array& u = add("u", p_.stream, p_.B * p_.S, p_.C);
        mk_token_products_arguments forward{
            x_,     size(),  norm,    p_.type, p_.D_S, w1, vector("b1", p_.D_S), w2, vector("b2", p_.S),
            noise_, p_.tanh, scratch, u};
        check("mk_token_products_forward", mk_token_products_forward(&forward, nullptr));
        Array& z = add("z", p_.type, hidden, p_.C, C_pad);
        forward.a = z;
        forward.u = nullptr;
        check("mk_token_products_forward", mk_token_products_forward(&forward, nullptr));

        void* w2t = packed("w2t", p_.D_S, p_.S, p_.D_S, S_pad, true);
        Array& a = add("a", p_.type, hidden, p_.C, C_pad);
        Array& dz = add("dz", p_.type, hidden, p_.C, C_pad);
        const mk_token_gelu_backward_arguments backward{size(), p_.type, p_.D_S, g, w2t, z, noise_, p_.tanh, a, dz};
        check("mk_token_gelu_backward", mk_token_gelu_backward(&backward, nullptr));
        weight_gradient(dz, C_pad, x_, &norm);
    }

    void channel_half() {
        const int64_t rows = p_.B * p_.S, row = padded(p_.D_C, 8), C_pad = padded(p_.C, MK_K_MULTIPLE);
        const mk_norm norm = statistics(u_);
        Array& a = add("a", p_.type, rows, p_.D_C, row);
        Array& z = add("z", p_.type, rows, p_.D_C, row);
        mk_channel_fc1_arguments fc1{u_,      size(),  norm,   p_.type, p_.D_C, nullptr, nullptr, nullptr,
                                     nullptr, nullptr, noise_, p_.tanh, row,    a,       z};
        if (p_.folded) {
            fc1.norm.gamma = fc1.norm.beta = nullptr;
            fold(fc1);
        } else {
            fc1.w3 = packed("w3", p_.D_C, p_.C, p_.D_C, C_pad);
            fc1.b3 = vector("b3", p_.D_C);
        }
        check("mk_channel_fc1_forward", mk_channel_fc1_forward(&fc1, nullptr));

        void* w4 = packed("w4", p_.C, p_.D_C, p_.C, padded(p_.D_C, MK_K_MULTIPLE));
        Array& y = add("y", p_.stream, rows, p_.C);
        const mk_channel_fc2_arguments fc2{u_, size(), p_.type, p_.D_C, a, row, w4, vector("b4", p_.C), noise_, y};
        check("mk_channel_fc2_forward", mk_channel_fc2_forward(&fc2, nullptr));

        void* g = branch_gradient();
        void* w4t = packed("w4t", p_.D_C, p_.C, p_.D_C, C_pad, true);
        Array& dz = add("dz", p_.type, rows, p_.D_C);
        Array& again = add("a again", p_.type, rows, p_.D_C);
        Array& sums = add("sums of dz", MK_FLOAT32, mk_gelu_backward_tiles(rows), p_.D_C);
        const mk_channel_gelu_backward_arguments backward{size(), p_.type, p_.D_C,  g,  w4t,   z,
                                                          row,    noise_,  p_.tanh, dz, again, sums.floats()};
        check("mk_channel_gelu_backward", mk_channel_gelu_backward(&backward, nullptr));
        norm_backward(u_, norm, random("dn", p_.type, rows, p_.C));
    }

    const Problem& p_;
    Random random_;
    const int64_t seed_ = 0x123456789abcdef;
    mk_noise noise_{};
    mk_input x_{}, u_{};
    std::list<Array> arrays_;
};

constexpr Problem PROBLEMS[] = {
    {"whole tiles", 1, 64, 64, 128, 128, MK_BFLOAT16, MK_BFLOAT16, false, true, true, false, 0.0f, 0.0f},
    {"ragged tiles", 2, 19, 40, 72, 24, MK_FLOAT16, MK_FLOAT16, false, true, true, true, 0.0f, 0.5f},
    {"counted tiles", 1, 50, 24, 40, 24, MK_BFLOAT16, MK_BFLOAT16, false, true, true, false, 0.0f, 0.0f},
    {"odd strides", 3, 9, 13, 11, 21, MK_BFLOAT16, MK_FLOAT32, true, false, false, false, 0.25f, 0.0f},
    {"odd channels", 1, 3, 13, 5, 9, MK_FLOAT16, MK_FLOAT16, false, true, true, false, 0.0f, 0.0f},
    {"one of each", 1, 1, 1, 1, 1, MK_FLOAT16, MK_FLOAT32, false, true, false, true, 0.0f, 0.0f},
};

}  // namespace

int main(int argc, char** argv) { return run_problems<Block>(PROBLEMS, argc, argv); }
