// Runs the launchers of csrc/sm90 over small shapes: in several orders of blocks and threads, with asynchronous copies
// and products that land late, early or at random. Results must be those of the launchers for every GPU but for
// rounding, the same bit by bit whatever the order, and nothing outside of an array may be written. Sanitizers see the
// rest. How accurate the numbers are is for the tests in Python.
//
//   driver_sm90 [runs]

#include <list>

#include "arrays.h"
#include "problems.h"
#include "sm90/channel_schedule.h"
#include "sm90/launchers.h"

namespace {

struct Problem {
    const char* name;
    int64_t B;
    int S, C, D_S, D_C;  // D_C 0: token mixing alone
    mk_type type;
    bool affine, tanh;
    float dropout_p, drop_path_p;
    int multiprocessors;  // 1: a block goes over all there is
};

constexpr Problem PROBLEMS[] = {
    {"64 tokens", 2, 16, 64, 64, 64, MK_BFLOAT16, true, false, 0.0f, 0.0f, 132},
    {"64 tokens, tails, dropout", 4, 61, 72, 130, 197, MK_FLOAT16, false, true, 0.1f, 0.5f, 1},
    {"208 tokens", 2, 100, 136, 96, 0, MK_BFLOAT16, true, false, 0.0f, 0.0f, 1},
    {"208 tokens, the last 8", 1, 203, 72, 130, 0, MK_FLOAT16, true, true, 0.0f, 0.0f, 1},
    {"256 tokens", 2, 230, 72, 96, 0, MK_BFLOAT16, true, false, 0.0f, 0.0f, 1},
};

constexpr mk_sm90_tile TILES[] = {MK_SM90_WIDE, MK_SM90_WIDE_PING_PONG, MK_SM90_PING_PONG, MK_SM90_NARROW};

// Two arrays that should hold the same, within a few roundings of the largest number; apart from rows that need not be
// computed.
void compare(const Array& actual, const Array& expected, mk_type type, const std::vector<bool>& needless = {}) {
    const auto skips = [&](int64_t row) { return expected.skips(row) || (!needless.empty() && needless[row]); };
    float largest = 0.0f;
    for (int64_t row = 0; row < expected.rows(); ++row) {
        if (skips(row)) continue;
        for (int64_t column = 0; column < expected.columns(); ++column) {
            largest = std::max(largest, std::abs(expected.at(row, column)));
        }
    }
    const float allowed = largest * (type == MK_FLOAT32 ? 0x1p-10f : type == MK_FLOAT16 ? 0x1p-8f : 0x1p-5f);
    for (int64_t row = 0; row < expected.rows(); ++row) {
        if (skips(row)) continue;
        for (int64_t column = 0; column < expected.columns(); ++column) {
            const float value = actual.at(row, column), other = expected.at(row, column);
            if (!(std::abs(value - other) <= allowed)) {
                throw std::runtime_error(actual.name() + " [" + std::to_string(row) + ", " + std::to_string(column) +
                                         "] is " + std::to_string(value) + ", expected " + std::to_string(other));
            }
        }
    }
}

// Both halves, forward and backward, twice: by the launchers for every GPU and by those of csrc/sm90.
class Block {
  public:
    explicit Block(const Problem& problem) : p_(problem), random_(1) {
        noise_ = {p_.dropout_p > 0 || p_.drop_path_p > 0 ? &seed_ : nullptr, p_.dropout_p, p_.drop_path_p};
        token_half();
        if (p_.D_C > 0) channel_half();
    }

    std::list<Array>& arrays() { return arrays_; }

  private:
    Array& add(std::string name, mk_type type, int64_t rows, int64_t columns, int64_t stride = 0) {
        return arrays_.emplace_back(std::move(name), type, rows, columns, stride);
    }
    Array& random(const char* name, mk_type type, int64_t rows, int64_t columns, float scale = 1.0f) {
        return add(name, type, rows, columns).fill(random_, -scale, scale);
    }
    float* vector(const char* name, int64_t length) { return random(name, MK_FLOAT32, 1, length).floats(); }
    mk_size size() const { return {p_.B, p_.S, p_.C}; }
    int64_t rows() const { return p_.B * p_.S; }
    mk_device device() const { return {p_.multiprocessors, 227 << 10}; }
    mk_input contiguous(const void* data) const {
        const int64_t S = p_.S, C = p_.C;
        return {data, p_.type, S * C, C, 1};
    }

    mk_norm statistics(mk_input of) {
        float* mean = add("mean", MK_FLOAT32, 1, rows()).floats();
        float* rstd = add("rstd", MK_FLOAT32, 1, rows()).floats();
        check("mk_row_statistics", mk_row_statistics(of, size(), 1e-6f, mean, rstd, nullptr));
        return {mean, rstd, p_.affine ? vector("gamma", p_.C) : nullptr, p_.affine ? vector("beta", p_.C) : nullptr};
    }

    // w [rows, columns] zero-padded, transposed if asked.
    void* packed(void* w, int64_t rows, int64_t columns, int64_t rows_padded, int64_t columns_padded,
                 bool transposed = false) {
        Array& result = add("weight", p_.type, rows_padded, columns_padded);
        const mk_packing packing{w,
                                 MK_FLOAT32,
                                 static_cast<int>(transposed ? columns : rows),
                                 static_cast<int>(transposed ? rows : columns),
                                 transposed ? 1 : columns,
                                 transposed ? columns : 1,
                                 result,
                                 p_.type,
                                 static_cast<int>(rows_padded),
                                 static_cast<int>(columns_padded)};
        check("mk_pack_weights", mk_pack_weights(&packing, 1, nullptr, nullptr));
        return result;
    }

    // A vector [length], zeros behind it.
    float* padded_vector(const char* name, int64_t length, int64_t padded_length) {
        float* v = add(name, MK_FLOAT32, 1, padded_length).floats();
        std::fill(v, v + padded_length, 0.0f);
        std::copy_n(vector(name, length), length, v);
        return v;
    }

    // 0 for images that are dropped.
    Array& branch_gradient() {
        Array& g = add("g", p_.type, rows(), p_.C);
        check("mk_branch_gradient",
              mk_branch_gradient(random("dy", p_.type, rows(), p_.C), p_.type, size(), noise_, g, p_.type, nullptr));
        return g;
    }

    void token_half() {
        const mk_input x = contiguous(random("x", p_.type, rows(), p_.C));
        if (!mk_sm90_takes(x, size(), p_.type, 1)) throw std::runtime_error("mk_sm90_takes: not this x");
        const mk_norm norm = statistics(x);
        void* g = branch_gradient();
        void* w1 = random("W1", MK_FLOAT32, p_.D_S, p_.S, 0.2f);
        void* w2 = random("W2", MK_FLOAT32, p_.S, p_.D_S, 0.2f);
        const int S_pad = mk_padded_tokens(p_.S), D = static_cast<int>(padded(p_.D_S, MK_HIDDEN_MULTIPLE));
        const int S90 = mk_sm90_padded_tokens(p_.S), D90 = static_cast<int>(padded(p_.D_S, MK_SM90_HIDDEN_MULTIPLE));
        float* b1 = padded_vector("b1", p_.D_S, D90);
        float* b2 = padded_vector("b2", p_.S, std::max(S_pad, S90));
        void* w1_packed = packed(w1, p_.D_S, p_.S, D, S_pad);
        void* w1t = packed(w1, p_.D_S, p_.S, S90, D90, true);
        void* w2_sm90 = packed(w2, p_.S, p_.D_S, S90, D90);

        Array& u = add("u", p_.type, rows(), p_.C);
        const mk_token_mixing_arguments forward{
            x,  size(), norm,    p_.type,  S_pad, D, w1_packed, b1, packed(w2, p_.S, p_.D_S, S_pad, D),
            b2, noise_, p_.tanh, device(), u};
        check("mk_token_mixing_forward", mk_token_mixing_forward(&forward, nullptr));
        Array& u_sm90 = add("u of sm90", p_.type, rows(), p_.C);
        Array& partial = add("partial", MK_FLOAT32, (p_.C + 63) / 64 * rows(), 2);
        const mk_sm90_token_mixing_arguments forward_sm90{
            x,       size(),   norm,   p_.type,          S90, D90, w1t, b1, w2_sm90, b2, noise_,
            p_.tanh, device(), u_sm90, partial.floats(), 0,   0,   0};
        check("mk_sm90_token_mixing_forward", mk_sm90_token_mixing_forward(&forward_sm90, nullptr));
        compare(u_sm90, u, p_.type);
        merge_statistics(u_sm90, partial);

        Array *dn[2], *a[2], *dz[2];
        for (const int sm90 : {0, 1}) {
            const std::string of = sm90 ? " of sm90" : "";
            dn[sm90] = &add("dn" + of, p_.type, rows(), p_.C);
            a[sm90] = &add("a" + of, p_.type, p_.B * p_.D_S, p_.C).skips_rows(p_.drop_path_p > 0);
            dz[sm90] = &add("dz" + of, p_.type, p_.B * p_.D_S, p_.C).skips_rows(p_.drop_path_p > 0);
        }
        const mk_token_data_gradient_arguments backward{x,
                                                        size(),
                                                        norm,
                                                        p_.type,
                                                        S_pad,
                                                        D,
                                                        p_.D_S,
                                                        g,
                                                        w1_packed,
                                                        b1,
                                                        packed(w2, p_.S, p_.D_S, D, S_pad, true),
                                                        noise_,
                                                        p_.tanh,
                                                        device(),
                                                        *dn[0],
                                                        *a[0],
                                                        *dz[0]};
        check("mk_token_data_gradient", mk_token_data_gradient(&backward, nullptr));
        const mk_sm90_token_data_gradient_arguments backward_sm90{x,       size(),   norm,   p_.type, S90,     D90,
                                                                  p_.D_S,  g,        w1t,    b1,      w2_sm90, noise_,
                                                                  p_.tanh, device(), *dn[1], *a[1],   *dz[1]};
        check("mk_sm90_token_data_gradient", mk_sm90_token_data_gradient(&backward_sm90, nullptr));
        compare(*dn[1], *dn[0], p_.type);
        compare(*a[1], *a[0], p_.type);
        compare(*dz[1], *dz[0], p_.type);
    }

    void merge_statistics(Array& u, Array& partial) {
        Array& mean = add("mean of u", MK_FLOAT32, 1, rows());
        Array& rstd = add("rstd of u", MK_FLOAT32, 1, rows());
        check("mk_row_statistics",
              mk_row_statistics(contiguous(u), size(), 1e-6f, mean.floats(), rstd.floats(), nullptr));
        Array& merged_mean = add("mean of u, merged", MK_FLOAT32, 1, rows());
        Array& merged_rstd = add("rstd of u, merged", MK_FLOAT32, 1, rows());
        check("mk_merge_statistics", mk_merge_statistics(partial.floats(), size(), 1e-6f, merged_mean.floats(),
                                                         merged_rstd.floats(), nullptr));
        compare(merged_mean, mean, MK_FLOAT32);
        compare(merged_rstd, rstd, MK_FLOAT32);
    }

    void channel_half() {
        Array& u_in = random("u in", p_.type, rows(), p_.C);
        const mk_input u = contiguous(u_in);
        const int64_t row = padded(p_.D_C, 8), C_pad = padded(p_.C, MK_K_MULTIPLE);
        mk_norm norm = statistics(u);
        norm.gamma = norm.beta = nullptr;  // folded
        void* w3 = packed(random("W3", MK_FLOAT32, p_.D_C, p_.C, 0.2f), p_.D_C, p_.C, p_.D_C, C_pad);
        void* w4 = random("W4", MK_FLOAT32, p_.C, p_.D_C, 0.2f);
        Array& a = add("a", p_.type, rows(), p_.D_C, row);
        Array& z = add("z", p_.type, rows(), p_.D_C, row);
        const mk_channel_fc1_arguments fc1{u,
                                           size(),
                                           norm,
                                           p_.type,
                                           p_.D_C,
                                           w3,
                                           nullptr,
                                           vector("wg", p_.D_C),
                                           vector("wb", p_.D_C),
                                           p_.type == MK_FLOAT16 ? vector("scale", p_.D_C) : nullptr,
                                           noise_,
                                           p_.tanh,
                                           row,
                                           a,
                                           z};
        check("mk_channel_fc1_forward", mk_channel_fc1_forward(&fc1, nullptr));

        Array& y = add("y", p_.type, rows(), p_.C);
        const mk_channel_fc2_arguments fc2{u,
                                           size(),
                                           p_.type,
                                           p_.D_C,
                                           a,
                                           row,
                                           packed(w4, p_.C, p_.D_C, p_.C, padded(p_.D_C, MK_K_MULTIPLE)),
                                           vector("b4", p_.C),
                                           noise_,
                                           y};
        check("mk_channel_fc2_forward", mk_channel_fc2_forward(&fc2, nullptr));
        std::vector<bool> dropped(rows());  // with its image, so nobody needs its hidden units
        for (int64_t m = 0; m < rows(); ++m) {
            dropped[m] = p_.drop_path_p > 0;
            for (int64_t c = 0; c < p_.C; ++c) dropped[m] = dropped[m] && y.at(m, c) == u_in.at(m, c);
        }

        Array& dz = add("dz", p_.type, rows(), p_.D_C);
        Array& again = add("a again", p_.type, rows(), p_.D_C);
        Array& sums = add("sums of dz", MK_FLOAT32, mk_gelu_backward_tiles(rows()), p_.D_C);
        const mk_channel_gelu_backward_arguments backward{
            size(),  p_.type, p_.D_C, branch_gradient(), packed(w4, p_.C, p_.D_C, p_.D_C, C_pad, true), z, row, noise_,
            p_.tanh, dz,      again,  sums.floats()};
        check("mk_channel_gelu_backward", mk_channel_gelu_backward(&backward, nullptr));

        for (const int i : {0, 1, 2, 3, 4, 5, 6, 7}) {
            const mk_sm90_schedule schedule{TILES[i / 2], 1 + i % 2};
            const std::string of =
                " of sm90, tile " + std::to_string(schedule.tile) + ", cluster " + std::to_string(schedule.cluster);
            Array& a_sm90 = add("a" + of, p_.type, rows(), p_.D_C, row);
            Array& z_sm90 = add("z" + of, p_.type, rows(), p_.D_C, row);
            mk_channel_fc1_arguments fc1_sm90 = fc1;
            fc1_sm90.a = a_sm90;
            fc1_sm90.z = z_sm90;
            check("mk_sm90_channel_fc1", mk_sm90_channel_fc1_scheduled(&fc1_sm90, schedule, device(), nullptr));
            compare(a_sm90, a, p_.type, dropped);
            compare(z_sm90, z, p_.type, dropped);

            Array& y_sm90 = add("y" + of, p_.type, rows(), p_.C);
            mk_channel_fc2_arguments fc2_sm90 = fc2;
            fc2_sm90.y = y_sm90;
            check("mk_sm90_channel_fc2", mk_sm90_channel_fc2_scheduled(&fc2_sm90, schedule, device(), nullptr));
            compare(y_sm90, y, p_.type);

            Array& dz_sm90 = add("dz" + of, p_.type, rows(), p_.D_C);
            Array& again_sm90 = add("a again" + of, p_.type, rows(), p_.D_C);
            Array& sums_sm90 = add("sums of dz" + of, MK_FLOAT32, mk_sm90_gelu_backward_tiles(rows()), p_.D_C);
            mk_channel_gelu_backward_arguments backward_sm90 = backward;
            backward_sm90.dz = dz_sm90;
            backward_sm90.a = again_sm90;
            backward_sm90.sums = sums_sm90.floats();
            check("mk_sm90_channel_gelu_backward",
                  mk_sm90_channel_gelu_backward_scheduled(&backward_sm90, schedule, device(), nullptr));
            compare(dz_sm90, dz, p_.type);
            compare(again_sm90, again, p_.type);
            compare(column_sums(sums_sm90, of), column_sums(sums, ""), p_.type);
        }
    }

    Array& column_sums(const Array& rows, const std::string& of) {
        Array& result = add("db3" + of, MK_FLOAT32, 1, rows.columns());
        for (int64_t column = 0; column < rows.columns(); ++column) {
            result.floats()[column] = 0.0f;
            for (int64_t row = 0; row < rows.rows(); ++row) result.floats()[column] += rows.at(row, column);
        }
        return result;
    }

    const Problem& p_;
    Random random_;
    const int64_t seed_ = 0x123456789abcdef;
    mk_noise noise_{};
    std::list<Array> arrays_;
};

}  // namespace

int main(int argc, char** argv) { return run_problems<Block>(PROBLEMS, argc, argv); }
