// Time mixing of TSMixer on a group of images: equations (36), (37), (39) of docs/maths.md.
//
// Images lie side by side in a plane, tokens down: columns are (image, channel).
#pragma once

#include "activations.h"
#include "arena.h"
#include "joint_norm.h"
#include "noise.h"
#include "plane.h"
#include "product.h"

namespace {

using mixer_kernels::cpu::TsmixerCall;

// Where a task's sums for the gradients lie.
struct TimeSums {
    float *w, *b, *gamma, *beta;

    TimeSums(Arena& arena, const TsmixerCall& call)
        : w(arena.take(call.S * round_up(call.S, kLanes))),
          b(arena.take(call.S)),
          gamma(arena.take(call.S * call.C)),
          beta(arena.take(call.S * call.C)) {}
};

// W as the products read it: packed where that pays.
struct TimeWeights {
    Left w, w_back;

    TimeWeights(Arena& arena, const TsmixerCall& call, bool fill)
        : w(by_rows(call.parameters.w1, call.S)), w_back(transposed(call.parameters.w1, call.S)) {
        constexpr int64_t kPackedColumns = 128;
        if (call.B * call.C < kPackedColumns) return;
        to_packed(w, call.S, arena, fill);
        if (call.dy) to_packed(w_back, call.S, arena, fill);
    }

  private:
    static void to_packed(Left& matrix, int64_t S, Arena& arena, bool fill) {
        float* place = arena.take(S * S);
        if (fill)
            pack(S, S, [=](int64_t m, int64_t k) { return matrix.data[m * matrix.row + k * matrix.column]; }, place);
        matrix = {place, 0, 0};
    }
};

class TimeMixing {
  public:
    using Sums = TimeSums;

    static int64_t images_of(const TsmixerCall& call) {
        constexpr int64_t kEnough = 48, kColumns = 96;
        return call.C >= kEnough ? 1 : divided_up(kColumns, call.C);
    }

    TimeMixing(Arena& arena, const TsmixerCall& call, const TimeWeights& weights, int64_t images)
        : call_(call),
          weights_(weights),
          norm_{call.S, call.C, call.parameters.gamma, call.parameters.beta, call.affine, call.eps} {
        // Backward takes images whole, for the sums over them.
        constexpr int64_t kPanel = kBlockVectors * kLanes, kFloats = 8192;
        width_ = call.dy || images > 1 ? call.C : least(largest(kFloats / call.S / kPanel, 1) * kPanel, call.C);
        stride_ = plane_stride(images * width_);
        n_ = arena.take(call.S * stride_);
        z_ = arena.take(call.S * stride_);
        moments_ = reinterpret_cast<Moments*>(arena.take(2 * images));
        noise_rows_ = reinterpret_cast<uint32_t*>(arena.take(call.dropout_p > 0.0f ? stride_ : 0));
        noise_images_ = reinterpret_cast<uint32_t*>(arena.take(call.dropout_p > 0.0f ? stride_ : 0));
        slope_ = g_ = across_ = nullptr;
        if (!call.dy) return;
        slope_ = arena.take(call.S * stride_);
        g_ = arena.take(call.S * stride_);
        across_ = arena.take(round_up(images * width_, kLanes) * round_up(call.S, kLanes));
    }

    // y of `count` images from number `first`.
    void forward(int64_t first, int64_t count) {
        const int64_t S = call_.S, C = call_.C;
        take_moments(first, count);
        for (int64_t channel = 0; channel < C; channel += width_) {
            const int64_t width = least(width_, C - channel);
            branch(first, count, channel, width, nullptr);
            each_row(first, count, channel, width, [&](int64_t memory, int64_t plane) {
                for (int64_t c = 0; c < width; c += kLanes)
                    store(call_.y + memory + c, load(call_.x + memory + c, width - c) + load(z_ + plane + c),
                          width - c);
            });
        }
        if (call_.norm_first) return;
        for (int64_t k = first; k < first + count; ++k) {
            float* y = call_.y + k * S * C;
            norm_.apply(norm_.moments(y, C), y, C, y, C, 0, C);
        }
    }

    // dx, and what is added to the sums.
    void backward(int64_t first, int64_t count, const Sums& sums) {
        const int64_t S = call_.S, C = call_.C, columns = count * C;
        take_moments(first, count);
        branch(first, count, 0, C, slope_);
        for (int64_t k = 0; k < count; ++k) {
            const float *x = call_.x + (first + k) * S * C, *dy = call_.dy + (first + k) * S * C;
            float *v = z_ + k * C, *g = g_ + k * C;
            for (int64_t s = 0; s < S; ++s)
                for (int64_t c = 0; c < C; c += kLanes) {
                    const int64_t at = s * stride_ + c, left = C - c;
                    if (call_.norm_first)
                        store(g + at, load(dy + s * C + c, left), left);
                    else
                        store(v + at, load(x + s * C + c, left) + load(v + at), left);
                }
            if (!call_.norm_first)
                norm_.backward(norm_.moments(v, stride_), v, stride_, dy, C, nullptr, 0, g, stride_, sums.gamma,
                               sums.beta);
        }
        for (int64_t s = 0; s < S; ++s)  // z becomes its gradient
            for (int64_t c = 0; c < columns; c += kLanes) {
                const int64_t at = s * stride_ + c;
                store(z_ + at, load(g_ + at) * load(slope_ + at));
            }
        add_rows(S, columns, z_, stride_, sums.b);
        turn(n_, stride_, S, columns, across_);
        const int64_t across = round_up(S, kLanes);
        product(S, S, columns, by_rows(z_, stride_), across_, across, nullptr, true, sums.w, across);
        float* dn = slope_;
        product(S, columns, S, weights_.w_back, z_, stride_, nullptr, false, dn, stride_);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t image = (first + k) * S * C;
            if (call_.norm_first) {
                norm_.backward(moments_[k], call_.x + image, C, dn + k * C, stride_, call_.dy + image, C,
                               call_.dx + image, C, sums.gamma, sums.beta);
                continue;
            }
            for (int64_t s = 0; s < S; ++s)
                for (int64_t c = 0; c < C; c += kLanes) {
                    const int64_t at = s * stride_ + k * C + c;
                    store(call_.dx + image + s * C + c, load(g_ + at) + load(dn + at), C - c);
                }
        }
    }

  private:
    void take_moments(int64_t first, int64_t count) {
        for (int64_t k = 0; call_.norm_first && k < count; ++k)
            moments_[k] = norm_.moments(call_.x + (first + k) * call_.S * call_.C, call_.C);
    }

    // z = dropout(act(W n + b)) of columns [channel, channel + width) of each image; `slope` may be null.
    void branch(int64_t first, int64_t count, int64_t channel, int64_t width, float* slope) {
        const int64_t S = call_.S, C = call_.C, columns = count * width;
        const float* n = n_;
        int64_t n_stride = stride_;
        if (!slope && !call_.norm_first && count == 1 && width % kLanes == 0) {
            n = call_.x + first * S * C + channel;
            n_stride = C;
        } else {
            fill(first, count, channel, width);
        }
        if (call_.kept_z)
            each_row(first, count, channel, width,
                     [&](int64_t memory, int64_t plane) { copy(call_.kept_z + memory, z_ + plane, width); });
        else
            product(S, columns, S, weights_.w, n, n_stride, call_.parameters.b1, false, z_, stride_);
        if (call_.z)
            each_row(first, count, channel, width,
                     [&](int64_t memory, int64_t plane) { copy(z_ + plane, call_.z + memory, width); });
        activate(call_.activation, S, columns, z_, slope, stride_);
        if (call_.dropout_p == 0.0f) return;
        for (int64_t c = 0; c < round_up(columns, kLanes); ++c) {
            noise_rows_[c] = static_cast<uint32_t>(channel + c % width);
            noise_images_[c] = static_cast<uint32_t>(first + c / width);
        }
        const Dropout dropout{call_.dropout_p, static_cast<uint64_t>(*call_.seed), noise_rows_, noise_images_};
        for (int64_t s = 0; s < S; ++s)
            for (int64_t c = 0; c < columns; c += kLanes) {
                const Vector kept = dropout.kept(s, c, kHidden);
                const int64_t at = s * stride_ + c;
                store(z_ + at, load(z_ + at) * kept);
                if (slope) store(slope + at, load(slope + at) * kept);
            }
    }

    void fill(int64_t first, int64_t count, int64_t channel, int64_t width) {
        each_row(first, count, channel, width, [&](int64_t memory, int64_t plane) {
            const int64_t row = memory / call_.C;
            if (call_.norm_first)
                norm_.row(moments_[row / call_.S - first], row % call_.S, call_.x + memory, n_ + plane, channel, width);
            else
                copy(call_.x + memory, n_ + plane, width);
        });
    }

    // `use(memory, plane)` with the places of each row of `width` channels.
    template <class USE>
    void each_row(int64_t first, int64_t count, int64_t channel, int64_t width, USE use) const {
        for (int64_t k = 0; k < count; ++k)
            for (int64_t s = 0; s < call_.S; ++s)
                use(((first + k) * call_.S + s) * call_.C + channel, s * stride_ + k * width);
    }

    static void copy(const float* from, float* to, int64_t width) {
        for (int64_t c = 0; c < width; c += kLanes) store(to + c, load(from + c, width - c), width - c);
    }

    const TsmixerCall& call_;
    const TimeWeights& weights_;
    JointNorm norm_;
    int64_t width_;   // channels to a block
    int64_t stride_;  // of planes
    float *n_, *z_, *slope_, *g_, *across_;
    Moments* moments_;
    uint32_t *noise_rows_, *noise_images_;
};

}  // namespace
