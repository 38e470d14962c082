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

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats random_floats(int64_t size, float scale, float offset = 0.0f) {
    std::normal_distribution<float> normal(offset, scale);
    Floats values(size);
    for (float& value : values) value = normal(generator);
    return values;
}

struct Parameters {
    Floats of[8];  // gamma, beta, w1, b1, w2, b2, w_gate, b_gate; empty where there is none
    int64_t hidden;

    Mixer mixer() const {
        const auto at = [&](int i) { return of[i].empty() ? nullptr : of[i].data(); };
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

bool close(const char* what, const float* actual, const Doubles& expected, double tolerance) {
    double scale = 1e-30;
    for (double value : expected) scale = fmax(scale, fabs(value));
    for (size_t i = 0; i < expected.size(); ++i)
        if (!(fabs(actual[i] - expected[i]) <= tolerance * scale)) {
            printf("%s[%zu] is %.8g, expected %.8g\n", what, i, actual[i], expected[i]);
            return false;
        }
    return true;
}

Doubles wide(const Floats& values) { return Doubles(values.begin(), values.end()); }

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
    call.options = {gate_first, sigmoid, affine, tanh_form, 0.0f, nullptr};
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
            const Floats& gradient = i == 0 ? dx : gradients[i];
            for (size_t j = 0; j < direction.size(); ++j) {
                along += static_cast<double>(gradient[j]) * direction[j];
                magnitude += fabs(static_cast<double>(gradient[j]) * direction[j]);
            }
            if (!(fabs(along - difference) <= 2e-5 * magnitude + 1e-5)) {
                printf("gradient %d along a direction is %.8g, expected %.8g\n", i, along, difference);
                return false;
            }
        }
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
    puts("right");
    return 0;
}
