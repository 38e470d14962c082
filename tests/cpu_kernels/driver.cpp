// csrc/cpu's kernels against the equations of docs/maths.md in double, element by element, on arrays that end where
// they should: for sanitizers, planted bugs, and instruction sets that this machine lacks as far as vectors of their
// length go. Prints the first element that is wrong; exit status 1.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"
#include "tsmixer.h"

using namespace mixer_kernels::cpu;

// Tasks begin together, as many as there are threads: each thread gets one, on a machine with other work too.
static std::atomic<unsigned> begun{0}, together{0};

static void begin() {
    for (++begun; begun < together;) std::this_thread::yield();
}

// The pool of threads that run.cpp looks for: of threads that ThreadSanitizer knows, unlike those of an OpenMP runtime.
extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
    begun = 0;
    together = threads;
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < threads; ++i) pool.emplace_back(run, data);
    for (std::thread& thread : pool) thread.join();
    together = 0;
}

namespace {

std::mt19937 generator(1);

#ifdef MIXER_KERNELS_BF16
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats random_floats(int64_t size, float scale, float offset = 0.0f) {
    std::normal_distribution<float> normal(offset, scale);
    Floats values(size);
    for (float& value : values) value = normal(generator);
    return values;
}

using Halves = std::vector<uint16_t>;  // bfloat16

Halves halves_of(const Floats& values) {
    Halves halves(values.size());
    for (size_t i = 0; i < values.size(); ++i) memcpy(&halves[i], reinterpret_cast<const char*>(&values[i]) + 2, 2);
    return halves;
}

Floats floats_of(const Halves& halves) {
    Floats values(halves.size());
    for (size_t i = 0; i < halves.size(); ++i) memcpy(reinterpret_cast<char*>(&values[i]) + 2, &halves[i], 2);
    return values;
}

struct Parameters {
    Floats of[8];  // gamma, beta, w1, b1, w2, b2, w_gate, b_gate; empty where there is none
    int64_t hidden;

    Mixer mixer() const { return mixer_of(of); }

    template <class T>
    Mixer mixer_of(const T* tensors) const {
        const auto at = [&](int i) { return tensors[i].empty() ? nullptr : tensors[i].data(); };
        return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), hidden, 1e-5f};
    }
};

Parameters random_parameters(int64_t K, int64_t F, int64_t H, unsigned present) {
    Parameters p;
    const int64_t sizes[8] = {F, F, H * K, H, K * H, K, K * K, K};
    const float scales[8] = {0.3f, 0.3f, powf(K, -0.5f), 0.3f, powf(H, -0.5f), 0.3f, powf(K, -0.5f), 0.3f};
    for (int i = 0; i < 8; ++i)
        if (i == 2 || i == 4 || present >> i & 1) p.of[i] = random_floats(sizes[i], scales[i], i == 0 ? 1.0f : 0.0f);
    if (p.of[6].empty()) p.of[7].clear();
    p.hidden = H;
    return p;
}

double gelu(double z, bool tanh_form) {
    if (tanh_form) return 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)));
    return 0.5 * z * erfc(-z * M_SQRT1_2);
}

// y of x [B, C, P, F], mixed along `axis`; parameters in double, so that they can be varied.
struct Reference {
    int64_t B, C, P, F;
    bool gate_first, sigmoid, affine, tanh_form;

    void gate(Doubles& v, const Doubles* p) const {
        if (p[6].empty()) return;
        const size_t K = v.size();
        Doubles e(K);
        double most = -INFINITY, total = 0.0;
        for (size_t j = 0; j < K; ++j) {
            e[j] = p[7].empty() ? 0.0 : p[7][j];
            for (size_t k = 0; k < K; ++k) e[j] += p[6][j * K + k] * v[k];
            most = fmax(most, e[j]);
        }
        for (size_t k = 0; k < K && sigmoid; ++k) v[k] *= 1.0 / (1.0 + exp(-e[k]));
        if (sigmoid) return;
        for (double& one : e) total += one = exp(one - most);
        for (size_t k = 0; k < K; ++k) v[k] *= e[k] / total;
    }

    Doubles operator()(const Doubles& x, const Doubles* p, int64_t H, int axis) const {
        const int64_t sizes[4] = {B, C, P, F}, strides[4] = {C * P * F, P * F, F, 1};
        Doubles n(x.size()), y = x;
        for (size_t row = 0; row < x.size() / F; ++row) {
            double mean = 0.0, variance = 0.0;
            for (int64_t f = 0; f < F && !affine; ++f) mean += x[row * F + f] / F;
            for (int64_t f = 0; f < F; ++f) variance += (x[row * F + f] - mean) * (x[row * F + f] - mean) / F;
            for (int64_t f = 0; f < F; ++f)
                n[row * F + f] =
                    (x[row * F + f] - mean) / (affine ? 1.0 : sqrt(variance + 1e-5f)) * (p[0].empty() ? 1.0 : p[0][f]) +
                    (p[1].empty() ? 0.0 : p[1][f]);
        }
        const int64_t K = sizes[axis], stride = strides[axis];
        for (size_t first = 0; first < x.size(); ++first) {
            if (first / stride % K != 0) continue;
            Doubles v(K), out(K);
            for (int64_t k = 0; k < K; ++k) v[k] = n[first + k * stride];
            if (gate_first) gate(v, p);
            for (int64_t k = 0; k < K; ++k) out[k] = p[5].empty() ? 0.0 : p[5][k];
            for (int64_t h = 0; h < H; ++h) {
                double z = p[3].empty() ? 0.0 : p[3][h];
                for (int64_t k = 0; k < K; ++k) z += p[2][h * K + k] * v[k];
                const double a = gelu(z, tanh_form);
                for (int64_t k = 0; k < K; ++k) out[k] += p[4][k * H + h] * a;
            }
            if (!gate_first) gate(out, p);
            for (int64_t k = 0; k < K; ++k) y[first + k * stride] += out[k];
        }
        return y;
    }
};

bool close(const char* what, const float* actual, const Doubles& expected, double tolerance, double scale = 1e-30) {
    for (double value : expected) scale = fmax(scale, fabs(value));
    for (size_t i = 0; i < expected.size(); ++i)
        if (!(fabs(actual[i] - expected[i]) <= tolerance * scale)) {
            printf("%s[%zu] is %.8g, expected %.8g\n", what, i, actual[i], expected[i]);
            return false;
        }
    return true;
}

Doubles wide(const Floats& values) { return Doubles(values.begin(), values.end()); }

// The call with x, its parameters and its products in bfloat16, by the bits of `which`.
bool check_bf16(Call call, unsigned which, Floats x, const Parameters* parameters,
                const std::function<Doubles(const Doubles*)>& evaluate, int64_t size) {
    const bool of_x = which & 1, of_parameters = which & 2;
    const Halves x_halves = halves_of(x);
    Halves halves[2][8], y_halves(size, 0x7FC0);
    Floats y(size, NAN);
    Doubles point[17];
    if (of_x) x = floats_of(x_halves);
    for (int64_t i = 0; i < size; ++i) {  // as check() has laid it out
        const int64_t F = call.x.sizes[3], P = call.x.sizes[2], C = call.x.sizes[1];
        point[0].push_back(x[i / (C * P * F) * call.x.strides[0] + i / (P * F) % C * call.x.strides[1] +
                             i / F % P * call.x.strides[2] + i % F]);
    }
    for (int i = 0; i < 8 * call.mixers; ++i) {
        halves[i / 8][i % 8] = halves_of(parameters[i / 8].of[i % 8]);
        point[1 + i] = wide(of_parameters ? floats_of(halves[i / 8][i % 8]) : parameters[i / 8].of[i % 8]);
    }
    call.x.bf16 = of_x;
    call.x.data = of_x ? static_cast<const void*>(x_halves.data()) : x.data();
    call.y = of_x ? static_cast<void*>(y_halves.data()) : y.data();
    call.u = nullptr;
    call.bf16 = of_parameters;
    call.options.bf16 = which & 4;
    for (int i = 0; i < call.mixers && of_parameters; ++i) call.mixer[i] = parameters[i].mixer_of(halves[i]);
    run_forward(kernels_baseline, call, 3);
    if (of_x) y = floats_of(y_halves);
    // Half a unit in the last place of the largest, or what products lose of terms about 1.
    const double tolerance = kMultipliesBf16 && which & 4 ? 1.5e-2 : (of_x ? 4e-3 : 2e-5);
    return close("y in bfloat16", y.data(), evaluate(point), tolerance, which & 4 ? 1.0 : 1e-30);
}

// Gradient number i, of point[i], along one random direction, beside differences of `evaluate`.
template <class EVALUATE>
bool right_along_a_direction(int i, const Floats& gradient, const Doubles (&point)[17], const Floats& dy,
                             EVALUATE evaluate) {
    const Floats direction = random_floats(point[i].size(), 1.0f);
    Doubles ends[2][17];
    double along = 0.0, magnitude = 0.0, difference = 0.0;
    const double step = 1e-5;
    for (int side = 0; side < 2; ++side) {
        for (int j = 0; j < 17; ++j) ends[side][j] = point[j];
        for (size_t j = 0; j < direction.size(); ++j) ends[side][i][j] += (side ? step : -step) * direction[j];
    }
    const Doubles low = evaluate(ends[0]), high = evaluate(ends[1]);
    for (size_t j = 0; j < dy.size(); ++j) difference += dy[j] * (high[j] - low[j]) / (2 * step);
    for (size_t j = 0; j < direction.size(); ++j) {
        along += static_cast<double>(gradient[j]) * direction[j];
        magnitude += fabs(static_cast<double>(gradient[j]) * direction[j]);
    }
    if (fabs(along - difference) <= 2e-5 * magnitude + 1e-5) return true;
    printf("gradient %d along a direction is %.8g, expected %.8g\n", i, along, difference);
    return false;
}

// One call forward and backward; gradients are checked along one random direction in each of their tensors.
bool check(int64_t B, int64_t C, int64_t P, int64_t F, int axis, bool gate_first, bool sigmoid, bool affine,
           bool tanh_form, unsigned present) {
    const bool layer = axis == 0;
    const int64_t sizes[4] = {B, C, P, F};
    const int mixers = layer ? 2 : 1, axes[2] = {layer ? 2 : axis, 3};
    Parameters parameters[2];
    Call call{};
    // x with gaps between its rows, images and channels
    const int64_t strides[3] = {C * (P * (F + 2) + 1) + 3, P * (F + 2) + 1, F + 2};
    Floats dense = random_floats(B * C * P * F, 1.0f, 0.5f), x(B > 0 ? (B - 1) * strides[0] + C * strides[1] : 0, NAN);
    for (int64_t i = 0; i < B * C * P * F; ++i)
        x[i / (C * P * F) * strides[0] + i / (P * F) % C * strides[1] + i / F % P * strides[2] + i % F] = dense[i];
    x.resize(x.size() - 3);  // its end is that of the last row
    call.x.data = x.data();
    for (int i = 0; i < 4; ++i) call.x.sizes[i] = sizes[i];
    for (int i = 0; i < 3; ++i) call.x.strides[i] = strides[i];
    call.axis = axes[0];
    call.mixers = mixers;
    for (int i = 0; i < mixers; ++i) {
        parameters[i] = random_parameters(sizes[axes[i]], F, 2 * sizes[axes[i]] + 1, present >> (8 * i));
        call.mixer[i] = parameters[i].mixer();
    }
    call.options = {gate_first, sigmoid, affine, tanh_form, false, 0.0f, nullptr};
    Floats y(dense.size(), NAN), u(dense.size(), NAN), dx(dense.size(), NAN), dy = random_floats(dense.size(), 1.0f);
    call.y = y.data();
    call.u = layer ? u.data() : nullptr;

    const Reference reference{B, C, P, F, gate_first, sigmoid, affine, tanh_form};
    Doubles point[17] = {wide(dense)};
    for (int i = 0; i < 8 * mixers; ++i) point[1 + i] = wide(parameters[i / 8].of[i % 8]);
    const auto evaluate = [&](const Doubles* at) {
        Doubles value = reference(at[0], at + 1, parameters[0].hidden, axes[0]);
        return layer ? reference(value, at + 9, parameters[1].hidden, 3) : value;
    };
    Kernels kernels = kernels_baseline;
    kernels.forward = [](const Call& call, const Plan& plan, int64_t task, float* work) {
        begin();
        kernels_baseline.forward(call, plan, task, work);
    };
    kernels.backward = [](const Call& call, const Plan& plan, int64_t task, float* work, float* sums) {
        begin();
        kernels_baseline.backward(call, plan, task, work, sums);
    };
    const Doubles expected = evaluate(point);
    Floats packs(kernels.pack_size(call), NAN);
    kernels.pack(call, packs.data());
    for (int threads : {1, 3, 2}) {  // two: on packs that were made before
        y.assign(y.size(), NAN);
        run_forward(kernels, call, threads, threads == 2 ? packs.data() : nullptr);
        if (!close("y", y.data(), expected, 2e-5)) return false;
    }
    static unsigned calls = 0;
    const unsigned which = 1 + calls++ % 7;
    if (!check_bf16(call, which, x, parameters, evaluate, dense.size())) {
        printf("in bfloat16: %u (1: x, 2: parameters, 4: products)\n", which);
        return false;
    }

    Floats gradients[17];
    float* addresses[17];
    for (int i = 1; i <= 8 * mixers; ++i) {
        gradients[i].assign(point[i].size(), NAN);
        addresses[i] = point[i].empty() ? nullptr : gradients[i].data();
    }
    for (int i = 0; i < mixers; ++i) {
        float** a = addresses + 1 + 8 * i;
        call.gradients[i] = {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
    }
    call.dy = dy.data();
    call.dx = dx.data();
    for (const float* kept : {static_cast<const float*>(u.data()), static_cast<const float*>(nullptr)}) {
        call.kept_u = layer ? kept : nullptr;
        run_backward(kernels, call, 3);
        for (int i = 0; i <= 8 * mixers; ++i) {
            if (point[i].empty()) continue;
            if (!right_along_a_direction(i, i == 0 ? dx : gradients[i], point, dy, evaluate)) return false;
        }
    }
    return true;
}

double activated(double z, Activation kind) {
    if (kind == Activation::kRelu) return z > 0.0 ? z : 0.0;
    return kind == Activation::kSilu ? z / (1.0 + exp(-z)) : gelu(z, kind == Activation::kGeluTanh);
}

// y of p[0], x, and the eight parameters behind it.
struct TsmixerReference {
    const TsmixerCall& call;

    void norm(Doubles& v, int64_t C, const Doubles* p) const {
        const int64_t size = call.S * C;
        for (int64_t image = 0; image < call.B; ++image) {
            double mean = 0.0, variance = 0.0;
            double* values = v.data() + image * size;
            for (int64_t i = 0; i < size && !call.affine; ++i) mean += values[i] / size;
            for (int64_t i = 0; i < size; ++i) variance += (values[i] - mean) * (values[i] - mean) / size;
            for (int64_t i = 0; i < size; ++i)
                values[i] = (values[i] - mean) / (call.affine ? 1.0 : sqrt(variance + call.eps)) *
                                (p[1].empty() ? 1.0 : p[1][i]) +
                            (p[2].empty() ? 0.0 : p[2][i]);
        }
    }

    // x . w' + b, of rows of `columns`
    static Doubles linear(const Doubles& x, const Doubles& w, const Doubles& b, int64_t columns) {
        const int64_t rows = x.size() / columns, results = w.size() / columns;
        Doubles y(rows * results);
        for (int64_t i = 0; i < rows * results; ++i) {
            y[i] = b.empty() ? 0.0 : b[i % results];
            for (int64_t k = 0; k < columns; ++k) y[i] += x[i / results * columns + k] * w[i % results * columns + k];
        }
        return y;
    }

    Doubles turned(const Doubles& x, int64_t rows, int64_t columns) const {
        Doubles y(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            const int64_t place = i % (rows * columns);
            y[i - place + place % columns * rows + place / columns] = x[i];
        }
        return y;
    }

    Doubles operator()(const Doubles* p) const {
        Doubles n = p[0], y = p[0];
        if (call.norm_first) norm(n, call.C, p);
        Doubles branch =
            linear(call.features ? n : turned(n, call.S, call.C), p[3], p[4], call.features ? call.C : call.S);
        for (double& z : branch) z = activated(z, call.activation);
        branch = call.features ? linear(branch, p[5], p[6], call.H) : turned(branch, call.C, call.S);
        if (!p[7].empty()) y = linear(y, p[7], p[8], call.C);
        for (size_t i = 0; i < y.size(); ++i) y[i] += branch[i];
        if (!call.norm_first) norm(y, call.O, p);
        return y;
    }
};

bool check_tsmixer(int64_t B, int64_t S, int64_t C, int64_t H, int64_t O, Activation activation, unsigned form,
                   unsigned present) {
    TsmixerCall call{};
    call.B = B, call.S = S, call.C = C;
    call.features = form & 1, call.norm_first = form & 2, call.affine = form & 4;
    call.H = call.features ? H : S, call.O = call.features ? O : C;
    call.activation = activation;
    call.eps = 1e-5f;
    const int64_t of_norm = S * (call.norm_first ? C : call.O), skip = call.features && C != O ? O : 0;
    const int64_t in = call.features ? C : S;
    const int64_t sizes[8] = {of_norm,  of_norm, call.H * in, call.H, call.features ? O * H : 0, call.features ? O : 0,
                              skip * C, skip};
    Floats x = random_floats(B * S * C, 1.0f, 0.5f), parameters[8], gradients[9], y(B * S * call.O, NAN);
    Doubles point[17] = {wide(x)};
    const float* given[8];
    float* wanted[8];
    gradients[0].assign(x.size(), NAN);
    for (int i = 0; i < 8; ++i) {
        const float scale = i == 2 || i == 6 ? powf(in, -0.5f) : i == 4 ? powf(H, -0.5f) : 0.3f;
        if (i == 2 || i == 4 || i == 6 || present >> i & 1) parameters[i] = random_floats(sizes[i], scale, i == 0);
        point[1 + i] = wide(parameters[i]);
        gradients[1 + i].assign(parameters[i].size(), NAN);
        given[i] = parameters[i].empty() ? nullptr : parameters[i].data();
        wanted[i] = parameters[i].empty() ? nullptr : gradients[1 + i].data();
    }
    call.x = x.data();
    call.parameters = {given[0], given[1], given[2], given[3], given[4], given[5], given[6], given[7]};
    const TsmixerReference reference{call};
    const TsmixerKernels& kernels = tsmixer_baseline;
    const Doubles expected = reference(point);
    Floats z(B * S * (call.features ? H : C), NAN), v(y.size(), NAN);
    call.y = y.data();
    for (int threads : {1, 3}) {
        y.assign(y.size(), NAN);
        run_forward(kernels, call, threads);
        if (!close("y", y.data(), expected, 2e-5)) return false;
        call.z = z.data(), call.v = v.data();
    }
    const Floats dy = random_floats(y.size(), 1.0f);
    call.dy = dy.data();
    call.dx = gradients[0].data();
    call.gradients = {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5], wanted[6], wanted[7]};
    for (bool is_kept : {false, true}) {
        call.kept_z = is_kept ? z.data() : nullptr;
        call.kept_v = is_kept ? v.data() : nullptr;
        run_backward(kernels, call, 3);
        for (int i = 0; i <= 8; ++i)
            if (!point[i].empty() && !right_along_a_direction(i, gradients[i], point, dy, reference)) return false;
    }
    return true;
}

}  // namespace

int main() {
    if (!has_pool()) {
        puts("expected a pool of threads");
        return 1;
    }
    const int64_t shapes[][4] = {{2, 3, 4, 8}, {1, 7, 13, 20}, {1, 2, 5, 37}, {1, 1, 1, 1}, {2, 2, 33, 16},
                                 {1, 3, 3, 3}, {1, 1, 3, 200}, {40, 1, 2, 16}};  // the last two on several threads
    for (const auto& s : shapes)
        for (int axis = 0; axis <= 3; ++axis)  // 0: a layer
            for (unsigned variant = 0; variant < 6; ++variant) {
                const unsigned variants[] = {0xFFFF, 0x3F3F, 0x42FE, 0x0143, 0xFFFF, 0xFFFF};
                const unsigned present = variants[variant];
                if (!check(s[0], s[1], s[2], s[3], axis, axis == 1, variant == 4, variant == 5, variant & 1, present)) {
                    printf("x [%d, %d, %d, %d], axis %d, parameters %x\n", int(s[0]), int(s[1]), int(s[2]), int(s[3]),
                           axis, present);
                    return 1;
                }
            }
    const int64_t series[][5] = {{2, 5, 21, 9, 6}, {1, 13, 64, 16, 16}, {3, 1, 1, 1, 2}, {120, 7, 5, 11, 5}};
    const Activation kinds[] = {Activation::kGelu, Activation::kGeluTanh, Activation::kSilu};  // ReLU has no slope at 0
    for (const auto& s : series)
        for (unsigned form = 0; form < 8; ++form)
            for (unsigned present : {0xFFu, 0x29u})
                if (!check_tsmixer(s[0], s[1], s[2], s[3], s[4], kinds[form % 3], form, present)) {
                    printf("x [%d, %d, %d], form %x, parameters %x\n", int(s[0]), int(s[1]), int(s[2]), form, present);
                    return 1;
                }
    puts("right");
    return 0;
}
