"""Breakages of csrc/cpu, the CPU kernels: compiled with a driver that compares them with the equations in double."""

from .breakage import seen_by
from .copies import Check

BREAKAGES = seen_by(Check("test_cpu_kernels", "test_right and 4 and plain"), "csrc/cpu", {
    "b1 dropped": ("mixing.h", "in, in_stride, b1, false, hidden", "in, in_stride, nullptr, false, hidden"),
    "b2 dropped forward": ("mixing.h", "hidden, stride, b2, false, value", "hidden, stride, nullptr, false, value"),
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
    "the first slice's gamma": ("kernels.cpp", "widened(of_gamma[at])", "widened(of_gamma[f])"),
    "statistics of a slice": ("kernels.cpp", "number, shape.row, mixer.eps", "number, shape.F, mixer.eps"),
    "a slice on the first one's place": ("kernels.cpp", "shape.first + f,\n", "f,\n"),
    "x as if contiguous": (
        "kernels.cpp", "axis, false).addresses(static_cast<const T*>(call.x",
        "axis, true).addresses(static_cast<const T*>(call.x"),
    "x as if contiguous backward": (
        "kernels.cpp", "axis, false).addresses(static_cast<const float*>(call.x",
        "axis, true).addresses(static_cast<const float*>(call.x"),
    "images of another axis": ("kernels.cpp", "image / inner_size * outer", "image / inner_size * inner"),
    "w2's gradient not turned": ("kernels.cpp", "H, K, width, true)", "H, K, width)"),
    "sums of the first task only": ("kernels.cpp", "task < plan.tasks; ++task", "task < 1; ++task"),
    "one set of sums for all tasks": ("run.cpp", "sums.get() + task * size : nullptr", "sums.get() : nullptr"),
    "one term of the joint norm's gradient": ("joint_norm.h", "(d - a - xhat * b)", "(d - a)"),
    "channels behind the end in the joint statistics": (
        "joint_norm.h", "only(function(load(x + (s + i) * stride + c, C - c)), C - c)",
        "function(load(x + (s + i) * stride + c, C - c))"),
    "features' residual dropped": ("feature_mixing.h", "p.w_skip ? p.b_skip : x;", "p.w_skip ? p.b_skip : nullptr;"),
    "tokens' residual dropped backward": ("time_mixing.h", "load(g_ + at) + load(dn + at)", "load(dn + at)"),
    "kept rows of whole vectors": ("feature_mixing.h", "call_.kept_v ? O : whole(O)", "whole(O)"),
    "weights packed in another order": ("product.h", "to[k * rows + r] =", "to[r * K + k] ="),
}) | seen_by(Check("test_cpu_kernels", "test_right and 4 and tiles"), "csrc/cpu", {
    "the last pair forgotten": ("product_bf16.h", "round_up(divided_up(K, 2), kTile)", "round_up(K / 2, kTile)"),
    "what lies behind an odd K": ("product_bf16.h", "k + 1 < K ? function", "true ? function"),
    "bias of a tile dropped": ("product_bf16.h", "(bias ? bias[m + r] : 0.0f)", "0.0f"),
    "rows of the first tile twice": ("product_bf16.h", "a + (words + k) * kTile", "a + k * kTile"),
    "no tiles configured": ("kernels.cpp", "const TilesInUse tiles;", ""),
}) | seen_by(Check("test_cpu_kernels", "test_threads_share"), "csrc/cpu", {
    "one work memory for all": (
        "run.cpp", "work.get() + thread * plan.work, sums ? ", "work.get(), sums ? ", "data race"),
    "tasks counted without care": ("run.cpp", "std::atomic<int64_t> next_task{0}", "int64_t next_task{0}", "data race"),
})  # fmt: skip
