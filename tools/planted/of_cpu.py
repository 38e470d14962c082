"""Breakages of csrc/cpu, the CPU kernels: compiled with a driver that compares them with the equations in double."""

from .breakage import seen_by
from .copies import Check

BREAKAGES = seen_by(Check("test_cpu_kernels", "test_right and 4 and plain"), "csrc/cpu", {
    "b1 dropped": ("mixing.h", "in, in_stride, mixer.b1, false, hidden", "in, in_stride, nullptr, false, hidden"),
    "b2 dropped forward": ("mixing.h", "stride, mixer.b2, false, n, n_stride", "stride, nullptr, false, n, n_stride"),
    "the last vector forgotten": ("product.h", "divided_up(N, kLanes)", "N / kLanes"),
    "rows left forgotten": ("product.h", "m += done;", "m += M;"),
    "eps dropped": ("norm.h", "Vector{}) + eps;", "Vector{}) + 300 * eps;"),
    "features behind the end in the statistics": (
        "norm.h", "only(load(x[i] + f, F - f) - s.mean[i], F - f)", "load(x[i] + f, F - f) - s.mean[i]"),
    "a coefficient's sign": ("functions.h", "-0.459212065f", "0.459212065f"),
    "slope without density": ("functions.h", "+ z * density", "+ 0.0f * density"),
    "softmax not divided": ("mixing.h", "= 1.0f / total", "= 1.0f + 0.0f * total"),
    "one term of the softmax's gradient": ("mixing.h", "of_gate - total))", "of_gate))"),
    "one factor of the sigmoid's gradient": ("mixing.h", "(1.0f - p) * of_gate :", "of_gate :"),
    "the sigmoid turned round": ("mixing.h", "1.0f / (1.0f + exp(-z))", "1.0f / (1.0f + exp(z))"),
    "the gate's own gradient dropped": ("mixing.h", "sums->w_gate);", "sums->w1);"),
    "one term of LayerNorm's gradient": ("norm.h", "(dxhat - m[i] - xhat * v[i])", "(dxhat - m[i])"),
    "LayerNorm's gradient in the affine map's place": (
        "norm.h", "store(m, affine ? Vector{} :", "store(m, false ? Vector{} :"),
    "residual dropped": (
        "kernels.cpp", "load(in[row + i] + shape.first + f, shape.F - f) + load(branch[i] + f)", "load(branch[i] + f)"),
    "the first slice's gamma": ("kernels.cpp", "mixer.gamma ? mixer.gamma[at]", "mixer.gamma ? mixer.gamma[f]"),
    "statistics of a slice": ("kernels.cpp", "number, shape.row, mixer.eps", "number, shape.F, mixer.eps"),
    "a slice on the first one's place": ("kernels.cpp", "shape.first + f,\n", "f,\n"),
    "x as if contiguous": (
        "kernels.cpp", "axis, false).addresses(call.x.data, first, count, work.in);\n    Layout",
        "axis, true).addresses(call.x.data, first, count, work.in);\n    Layout"),
    "x as if contiguous backward": (
        "kernels.cpp", "axis, false).addresses(call.x.data, first, count, work.in);\n        Layout",
        "axis, true).addresses(call.x.data, first, count, work.in);\n        Layout"),
    "images of another axis": ("kernels.cpp", "image / inner_size * outer", "image / inner_size * inner"),
    "w2's gradient not turned": ("kernels.cpp", "H, K, width, true)", "H, K, width)"),
    "sums of the first task only": ("kernels.cpp", "task < plan.tasks; ++task", "task < 1; ++task"),
    "one set of sums for all tasks": ("run.cpp", "sums.get() + task * size : nullptr", "sums.get() : nullptr"),
    "weights packed in another order": ("product.h", "to[k * rows + r] =", "to[r * K + k] ="),
}) | seen_by(Check("test_cpu_kernels", "test_threads_share"), "csrc/cpu", {
    "one work memory for all": (
        "run.cpp", "task, work.get() + thread * plan.work);", "task, work.get());", "data race"),
    "tasks counted without care": ("run.cpp", "std::atomic<int64_t> next_task{0}", "int64_t next_task{0}", "data race"),
})  # fmt: skip
