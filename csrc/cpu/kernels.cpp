// The tasks of a call, for the instruction set that this file is compiled for; MIXER_KERNELS_ISA is its name.
#include "kernels.h"

#include "mixing.h"

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)

namespace {

using namespace mixer_kernels::cpu;

constexpr int64_t kTileFloats = 8192;   // of x in a tile: it and what is around it stay in the L2 cache
constexpr int64_t kLeastRows = 96;      // of a layer's tile: or the weights of the second mixer would be read too often
constexpr int64_t kLeastColumns = 128;  // of a tile, where there are as many
constexpr int64_t kLeastSlice = 96;     // of a row's features: each slice has the statistics of whole rows to make
constexpr int64_t kBackwardTasks = 16;  // sets of sums, at most
constexpr int64_t kSumsColumns =
    256;  // to a set of sums: fewer would cost less than the set, which is written and read
constexpr int64_t kPackedColumns = 128;  // of a mixer, from which packing its weights pays

// A mixer of a call with all that it needs for tiles of up to `most` images or rows.
struct Tile {
    Mixer mixer;
    bool affine;
    Shape shape;
    int64_t most, stride;
    float *plane, *gradient, *rows, *gamma, *beta;
    Statistics* statistics;
    float *dgamma, *dbeta;
    uint32_t *noise_rows, *noise_images;
    Dropout dropout;
    Mlp mlp;

    Tile(Arena& arena, const Call& call, const Plan& plan, int which, int64_t most, bool backward)
        : Tile(arena, call, plan, which, most, backward, shape_of(call, which)) {}

    Tile(Arena& arena, const Call& call, const Plan& plan, int which, int64_t most, bool backward, Shape shape)
        : mixer(call.mixer[which]),
          affine(call.options.affine),
          shape(shape),
          most(most),
          stride(plane_stride(columns_of(shape, most))),
          plane(arena.take(shape.K * stride)),
          gradient(backward ? arena.take(shape.K * stride) : nullptr),
          rows(arena.take(kLanes * round_up(shape.F, kLanes))),
          gamma(arena.take(round_up(shape.F, kLanes))),
          beta(arena.take(round_up(shape.F, kLanes))),
          statistics(reinterpret_cast<Statistics*>(backward ? arena.take(2 * round_up(rows_of(shape, most), kLanes))
                                                            : nullptr)),
          dgamma(backward ? arena.take(round_up(shape.F, kLanes)) : nullptr),
          dbeta(backward ? arena.take(round_up(shape.F, kLanes)) : nullptr),
          noise_rows(reinterpret_cast<uint32_t*>(arena.take(call.options.dropout_p > 0.0f ? stride : 0))),
          noise_images(reinterpret_cast<uint32_t*>(arena.take(call.options.dropout_p > 0.0f ? stride : 0))),
          mlp(arena, mixer, matrices_of(call, plan, which), shape, storage_of(call, which, backward),
              call.mixers == 1 && call.options.gate_first, call.options.sigmoid, call.options.tanh,
              columns_of(shape, most)) {
        if (call.options.dropout_p > 0.0f && call.options.seeds)
            dropout = {call.options.dropout_p, static_cast<uint64_t>(call.options.seeds[which]), noise_rows,
                       noise_images};
        if (!gamma) return;
        if (call.bf16)
            read_norm<Bf16>();
        else
            read_norm<float>();
    }

    static Shape shape_of(const Call& call, int which) {
        const int axis = call.mixers == 2 ? 2 + which : call.axis;
        return {call.x.sizes[axis], call.x.sizes[3], axis == 3, 0, call.x.sizes[3]};
    }

    static Storage storage_of(const Call& call, [[maybe_unused]] int which, bool backward) {
#ifdef MIXER_KERNELS_BF16
        return {call.bf16, call.options.bf16 && call.dy == nullptr, backward};
#else
        return {call.bf16, false, backward};
#endif
    }

    // The matrices of mixer `which`, packed behind those of the one before it.
    static Matrices packed_matrices(Arena& arena, const Call& call, int which) {
        return Matrices::packed(arena, call.mixer[which], shape_of(call, which).K,
                                storage_of(call, which, call.dy != nullptr));
    }

    static Matrices matrices_of(const Call& call, const Plan& plan, int which) {
        if (!plan.packed) return Matrices::of(call.mixer[which], shape_of(call, which).K);
        Arena arena(const_cast<float*>(plan.packed));
        for (int i = 0; i < which; ++i) packed_matrices(arena, call, i);
        return packed_matrices(arena, call, which);
    }

    // out = in + branch, of `count` images or rows; the first of all that there are is number `first`.
    template <class IN, class OUT>
    void forward(int64_t first, int64_t count, const IN* const* in, OUT* const* out) {
        normalised(first, count, in, false);
        for (int64_t c = 0, all = columns_of(shape, count); c < all; c += mlp.columns)
            mlp.forward(plane, stride, c, least(mlp.columns, all - c), dropout);
        Plane{shape, count, stride, plane, rows}.read([&](int64_t row, int64_t number, float** branch) {
            for (int64_t i = 0; i < number; ++i)
                for (int64_t f = 0; f < shape.F; f += kLanes)
                    store(out[row + i] + shape.first + f,
                          load(in[row + i] + shape.first + f, shape.F - f) + load(branch[i] + f), shape.F - f);
        });
    }

    // `sums` may be null
    void backward(int64_t first, int64_t count, const float* const* in, const float* const* dy, float* const* dx,
                  const Sums* sums) {
        normalised(first, count, in, true);
        const Plane of_gradient{shape, count, stride, gradient, rows};
        of_gradient.fill([&](int64_t row, int64_t number, float** places) {
            for (int64_t i = 0; i < number; ++i)
                for (int64_t f = 0; f < shape.F; f += kLanes) store(places[i] + f, load(dy[row + i] + f, shape.F - f));
        });
        for (int64_t c = 0, all = columns_of(shape, count); c < all; c += mlp.columns)
            mlp.backward(plane, gradient, stride, c, least(mlp.columns, all - c), dropout, sums);
        const int64_t F = round_up(shape.F, kLanes);
        for (int64_t f = 0; f < F; ++f) dgamma[f] = dbeta[f] = 0.0f;
        of_gradient.read([&](int64_t row, int64_t number, float** dn) {
            normalise_backward(in + row, statistics[row / kLanes], affine, number, shape.F, gamma, dn, dy + row,
                               dx + row, dgamma, dbeta);
        });
        if (!sums) return;
        for (int64_t f = 0; f < F; ++f) {
            sums->gamma[f] += dgamma[f];
            sums->beta[f] += dbeta[f];
        }
    }

  private:
    template <class T>
    void read_norm() {
        const T *of_gamma = static_cast<const T*>(mixer.gamma), *of_beta = static_cast<const T*>(mixer.beta);
        for (int64_t f = 0; f < round_up(shape.F, kLanes); ++f) {
            const int64_t at = shape.first + f;
            gamma[f] = f < shape.F && of_gamma ? widened(of_gamma[at]) : (f < shape.F ? 1.0f : 0.0f);
            beta[f] = f < shape.F && of_beta ? widened(of_beta[at]) : 0.0f;
        }
    }

    template <class T>
    void normalised(int64_t first, int64_t count, const T* const* in, bool keep) {
        Plane{shape, count, stride, plane, rows}.fill([&](int64_t row, int64_t number, float** places) {
            const Statistics s = affine ? no_statistics() : statistics_of(in + row, number, shape.row, mixer.eps);
            for (int64_t i = 0; i < number; ++i)
                normalise(in[row + i] + shape.first, s.mean[i], s.rstd[i], shape.F, gamma, beta, places[i]);
            if (keep) statistics[row / kLanes] = s;
        });
        if (!dropout.on()) return;
        const int64_t columns = columns_of(shape, count);
        for (int64_t c = 0; c < round_up(columns, kLanes); ++c) {
            noise_rows[c] = static_cast<uint32_t>(shape.features ? first + c : shape.first + c % shape.F);
            noise_images[c] = static_cast<uint32_t>(shape.features ? 0 : first + c / shape.F);
        }
    }
};

// Where the rows of x are: along the two outer axes of images, and within an image; or one by one.
struct Layout {
    int64_t outer, inner, row;  // strides
    int64_t inner_size, rows;   // images along the inner of the two; rows of an image
    int64_t last, last_size;    // where features are mixed: a third axis

    // of what mixes `axis`, with x's strides or contiguous ones
    static Layout of(const Call& call, int axis, bool contiguous) {
        const int64_t* size = call.x.sizes;
        const int64_t dense[3] = {size[1] * size[2] * size[3], size[2] * size[3], size[3]};
        const int64_t* stride = contiguous ? dense : call.x.strides;
        if (axis == 3) return {stride[0], stride[1], 0, size[1], 1, stride[2], size[2]};
        return {stride[0], stride[3 - axis], stride[axis], size[3 - axis], size[axis], 0, 1};
    }

    int64_t offset(int64_t number) const {
        const int64_t place = number % last_size, image = number / last_size;
        return image / inner_size * outer + image % inner_size * inner + place * last;
    }

    // Addresses of the rows of `count` images, or of `count` rows, from number `first`.
    template <class POINTER>
    void addresses(POINTER data, int64_t first, int64_t count, POINTER* to) const {
        for (int64_t i = 0; i < count; ++i) {
            const POINTER image = data + offset(first + i);
            for (int64_t k = 0; k < rows; ++k) *to++ = image + k * row;
        }
    }
};

int64_t count_of(const Call& call) {
    const int64_t* size = call.x.sizes;
    if (call.mixers == 2 || call.axis == 2) return size[0] * size[1];
    return call.axis == 1 ? size[0] * size[2] : size[0] * size[1] * size[2];
}

int64_t elements_of(const Call& call) {
    const int64_t* size = call.x.sizes;
    return size[0] * size[1] * size[2] * size[3];
}

// What a thread has: pointers to rows, one or two mixers, u of a layer and its gradient.
struct Work {
    int64_t rows;
    const float **in, **dy;
    float **out, **u, **du;
    float *u_values, *du_values;

    Work(Arena& arena, const Call& call, const Plan& plan, bool backward) {
        const Shape shape = Tile::shape_of(call, 0);
        rows = rows_of(shape, plan.tile);
        in = reinterpret_cast<const float**>(arena.take(2 * rows));
        out = reinterpret_cast<float**>(arena.take(2 * rows));
        dy = reinterpret_cast<const float**>(arena.take(2 * rows));
        u = du = nullptr;
        u_values = du_values = nullptr;
        if (call.mixers == 2) {
            u = reinterpret_cast<float**>(arena.take(2 * rows));
            u_values = arena.take(rows * shape.F);
            if (backward) {
                du = reinterpret_cast<float**>(arena.take(2 * rows));
                du_values = arena.take(rows * shape.F);
            }
        }
    }
};

int64_t work_of(const Call& call, const Plan& plan, bool backward) {
    Arena arena(nullptr);
    Work(arena, call, plan, backward);
    const int64_t used = arena.used();
    for (int i = 0; i < call.mixers; ++i) {
        arena.back_to(used);
        Tile(arena, call, plan, i, call.mixers == 2 && i == 1 ? plan.tile * call.x.sizes[2] : plan.tile, backward);
    }
    return arena.most();
}

// Images or rows to a tile, so that there are `parts` tiles if tiles stay wide enough.
int64_t tile_of(const Call& call, int64_t parts) {
    const Shape shape = Tile::shape_of(call, 0);
    const int64_t columns = shape.features ? 1 : shape.F;
    const int64_t most =
        largest(kTileFloats / (columns * shape.K), call.mixers == 2 ? divided_up(kLeastRows, shape.K) : 1);
    const int64_t fewest = divided_up(kLeastColumns, columns);
    return least(largest(divided_up(count_of(call), parts), fewest), largest(most, shape.features ? fewest : 1));
}

int64_t pack_size(const Call& call) {
    Arena arena(nullptr);
    for (int i = 0; i < call.mixers; ++i) Tile::packed_matrices(arena, call, i);
    return arena.used();
}

// What a call packs for itself: all that is not read as it is, and where it pays.
int64_t packs_of(const Call& call) {
    for (int i = 0; i < call.mixers; ++i)
        if (!call.bf16 && !Tile::storage_of(call, i, false).pairs &&
            elements_of(call) / Tile::shape_of(call, i).K < kPackedColumns)
            return 0;
    return pack_size(call);
}

void pack(const Call& call, float* packs) {
    Arena arena(packs);
    for (int i = 0; i < call.mixers; ++i)
        Matrices::pack(arena, call.mixer[i], Tile::shape_of(call, i).K, Tile::storage_of(call, i, call.dy != nullptr));
}

// Features to a task: fewer than there are where tiles alone would leave threads without work.
int64_t slice_of(const Call& call, int64_t tiles, int64_t threads) {
    const int64_t F = call.x.sizes[3], most = call.mixers == 2 || call.axis == 3 ? 1 : F / kLeastSlice;
    int64_t slices = 1;
    while (slices < most && tiles * slices % threads != 0 && tiles * slices < 4 * threads) ++slices;
    constexpr int64_t kPanel = kBlockVectors * kLanes;
    return slices == 1 ? F : round_up(divided_up(F, slices), kPanel);
}

Plan plan_forward(const Call& call, int threads) {
    Plan plan{};
    plan.tile = least(tile_of(call, threads), count_of(call));
    plan.tiles = divided_up(count_of(call), plan.tile);
    plan.slice = slice_of(call, plan.tiles, threads);
    plan.tasks = plan.tiles * divided_up(call.x.sizes[3], plan.slice);
    plan.work = work_of(call, plan, false);
    plan.packs = packs_of(call);
    return plan;
}

Plan plan_backward(const Call& call) {
    Plan plan{};
    int64_t work = 0;  // sums times the columns that are added to them
    for (int i = 0; i < call.mixers; ++i) {
        Arena arena(nullptr);
        const Shape shape = Tile::shape_of(call, i);
        Sums::at(arena, shape, call.mixer[i].hidden, call.mixer[i].w_gate != nullptr);
        plan.sums[i] = arena.most();
        work += plan.sums[i] * (elements_of(call) / shape.K);
    }
    const int64_t sets = least(work / ((plan.sums[0] + plan.sums[1]) * kSumsColumns), kBackwardTasks);
    plan.tile = least(tile_of(call, largest(sets, 1)), count_of(call));
    plan.tiles = divided_up(count_of(call), plan.tile);
    plan.tasks = least(plan.tiles, largest(sets, 1));
    plan.work = work_of(call, plan, true);
    plan.packs = packs_of(call);
    return plan;
}

// Consecutive rows of a tile's own memory, or of a contiguous tensor.
template <class POINTER>
void consecutive(POINTER data, int64_t rows, int64_t F, POINTER* to) {
    for (int64_t r = 0; r < rows; ++r) to[r] = data + r * F;
}

// x and y are of T's
template <class T>
void forward_of(const Call& call, const Plan& plan, int64_t task, float* memory) {
    Arena arena(memory);
    Work work(arena, call, plan, false);
    const int64_t used = arena.used();
    const int64_t first = task % plan.tiles * plan.tile, count = least(plan.tile, count_of(call) - first);
    const int axis = call.mixers == 2 ? 2 : call.axis;
    const T** in = reinterpret_cast<const T**>(work.in);
    T** out = reinterpret_cast<T**>(work.out);
    Layout::of(call, axis, false).addresses(static_cast<const T*>(call.x.data), first, count, in);
    Layout::of(call, axis, true).addresses(static_cast<T*>(call.y), first, count, out);
    if (call.mixers == 1) {
        Shape shape = Tile::shape_of(call, 0);
        shape.first = task / plan.tiles * plan.slice;
        shape.F = least(plan.slice, shape.row - shape.first);
        return Tile(arena, call, plan, 0, plan.tile, false, shape).forward(first, count, in, out);
    }

    const int64_t patches = call.x.sizes[2], F = call.x.sizes[3], rows = count * patches;
    consecutive(call.u ? call.u + first * patches * F : work.u_values, rows, F, work.u);
    Tile(arena, call, plan, 0, plan.tile, false).forward(first, count, in, work.u);
    arena.back_to(used);
    Tile(arena, call, plan, 1, plan.tile * patches, false)
        .forward(first * patches, rows, const_cast<const float* const*>(work.u), out);
}

void forward(const Call& call, const Plan& plan, int64_t task, float* memory) {
#ifdef MIXER_KERNELS_AMX
    const TilesInUse tiles;
#endif
    if (call.x.bf16)
        forward_of<Bf16>(call, plan, task, memory);
    else
        forward_of<float>(call, plan, task, memory);
}

void backward(const Call& call, const Plan& plan, int64_t task, float* memory, float* memory_of_sums) {
    Sums sums[2];
    Arena arena_of_sums(memory_of_sums);
    if (memory_of_sums) {
        for (int64_t i = 0; i < plan.sums[0] + plan.sums[1]; ++i) memory_of_sums[i] = 0.0f;
        for (int i = 0; i < call.mixers; ++i)
            sums[i] =
                Sums::at(arena_of_sums, Tile::shape_of(call, i), call.mixer[i].hidden, call.mixer[i].w_gate != nullptr);
    }
    const auto sums_of = [&](int i) { return memory_of_sums ? &sums[i] : nullptr; };
    const int axis = call.mixers == 2 ? 2 : call.axis;
    const int64_t patches = call.x.sizes[2], F = call.x.sizes[3];
    for (int64_t tile = task * plan.tiles / plan.tasks; tile < (task + 1) * plan.tiles / plan.tasks; ++tile) {
        Arena arena(memory);
        Work work(arena, call, plan, true);
        const int64_t used = arena.used();
        const int64_t first = tile * plan.tile, count = least(plan.tile, count_of(call) - first);
        Layout::of(call, axis, false).addresses(static_cast<const float*>(call.x.data), first, count, work.in);
        Layout::of(call, axis, true).addresses(call.dy, first, count, work.dy);
        Layout::of(call, axis, true).addresses(call.dx, first, count, work.out);
        if (call.mixers == 1) {
            Tile(arena, call, plan, 0, plan.tile, true).backward(first, count, work.in, work.dy, work.out, sums_of(0));
            continue;
        }
        const int64_t rows = count * patches;
        if (call.kept_u) {
            consecutive(const_cast<float*>(call.kept_u) + first * patches * F, rows, F, work.u);
        } else {
            consecutive(work.u_values, rows, F, work.u);
            Tile(arena, call, plan, 0, plan.tile, true).forward(first, count, work.in, work.u);
            arena.back_to(used);
        }
        consecutive(work.du_values, rows, F, work.du);
        Tile(arena, call, plan, 1, plan.tile * patches, true)
            .backward(first * patches, rows, work.u, work.dy, work.du, sums_of(1));
        arena.back_to(used);
        Tile(arena, call, plan, 0, plan.tile, true).backward(first, count, work.in, work.du, work.out, sums_of(0));
    }
}

// to [rows, columns], or its transpose, from rows of `width`
void copy(float* to, const float* from, int64_t rows, int64_t columns, int64_t width, bool transposed = false) {
    if (!to) return;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) to[transposed ? c * rows + r : r * columns + c] = from[r * width + c];
}

void add_sums(const Call& call, const Plan& plan, float* memory) {
    const int64_t size = plan.sums[0] + plan.sums[1];
    for (int64_t task = 1; task < plan.tasks; ++task) {
        const float* sums = memory + task * size;
        for (int64_t i = 0; i < size; i += kLanes) store(memory + i, load(memory + i) + load(sums + i));
    }
    Arena arena(memory);
    for (int i = 0; i < call.mixers; ++i) {
        const Shape shape = Tile::shape_of(call, i);
        const int64_t H = call.mixer[i].hidden, K = shape.K, width = round_up(K, kLanes);
        const Gradients& to = call.gradients[i];
        const Sums from = Sums::at(arena, shape, H, call.mixer[i].w_gate != nullptr);
        copy(to.w1, from.w1, H, K, width);
        copy(to.w2, from.w2, H, K, width, true);
        copy(to.w_gate, from.w_gate, K, K, width);
        copy(to.b1, from.b1, 1, H, H);
        copy(to.b2, from.b2, 1, K, K);
        copy(to.b_gate, from.b_gate, 1, K, K);
        copy(to.gamma, from.gamma, 1, shape.F, shape.F);
        copy(to.beta, from.beta, 1, shape.F, shape.F);
    }
}

}  // namespace

namespace mixer_kernels::cpu {

const Kernels JOINED(kernels_, MIXER_KERNELS_ISA) = {plan_forward, plan_backward, pack_size, pack,
                                                     forward,      backward,      add_sums};

}  // namespace mixer_kernels::cpu
