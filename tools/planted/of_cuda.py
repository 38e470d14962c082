"""Breakages of the CUDA sources, which run on the CPU's model of a GPU (tests/cuda_on_host).

Most are seen by the driver, which wants results that are finite, the same in every order of threads, and inside their
arrays; what numbers they are is seen by the tests of the backend, for which the extension module is compiled again.
"""

from .breakage import in_folder, seen_by
from .copies import Check

LAUNCHERS = Check("test_cuda_on_host", "test_launchers and None")
NUMBERS = ("test_kernels", "test_matches_eager and below and cuda")
GRADIENTS = ("test_backward", "test_matches_eager and below and fast and cuda")
WAIT = "    copy_async_wait<0>();\n"
BARRIER = "    __syncthreads();\n"
LANES = "                __syncwarp();\n"

BREAKAGES = seen_by(LAUNCHERS, "csrc", {  # and what the driver says
    "tokens read past S": (
        "token_tile.cuh", "if (s < size.S && valid > 0) {", "if (s <= size.S && valid > 0) {", "is -?nan"),
    "tokens stored past S": ("token_mixing.cu", "if (s >= S || valid", "if (s > S || valid", "u: a write at byte"),
    "hidden units stored past D_S": (
        "token_data_gradient.cu", "if (d < p.D_S && valid", "if (d <= p.D_S && valid", "(a|dz): a write at byte"),
    "rows stored past the last": (
        "product.cuh", "row >= rows_left) continue", "row > rows_left) continue", "a write at byte"),
    "rows packed past the last": (
        "pack_weights.cu", "there = row < p.rows && column", "there = row <= p.rows && column", "w1 .* is -?nan"),
    "vectors packed past the last row": (
        "pack_weights.cu", "if (row < p.rows && column < p.columns) {", "if (column < p.columns) {", "w. .* is -?nan"),
    "tiles read before they are there": (
        "pack_weights.cu", f"{BARRIER}#pragma unroll", "#pragma unroll", "w.t .* is -?(nan|inf)"),
    "columns folded past the last": ("pack_weights.cu", "if (column >= f.w3.columns) return;", "", "a .* is -?nan"),
    "dropped images read": ("token_weight_gradient.cu", "if (!noise_.drop_path()) return;", "return;", "is -?nan"),
    "token mixing waits for one copy less": (
        "token_mixing.cu", "turn < steps; ++turn) {\n            copy_async_wait<kStages - 2>",
        "turn < steps; ++turn) {\n            copy_async_wait<kStages - 1>", "u .* is -?nan"),
    "products wait for one copy less": (
        "product.cuh", "copy_async_wait<TILE::kStages - 2>", "copy_async_wait<TILE::kStages - 1>", "is -?nan"),
    "token mixing reads before all have waited": (
        "token_mixing.cu", f"    {BARRIER}            copy_turn(turn + ", "            copy_turn(turn + ",
        "u .* is -?(nan|inf)"),
    "products read before all have waited": (
        "product.cuh", "__syncthreads();  // everybody's", "// everybody's", "is -?(nan|inf)"),
    "weights over x that others still read": (
        "token_mixing.cu", f"{BARRIER}#pragma unroll\n    for (int turn = 1", "#pragma unroll\n    for (int turn = 1",
        "u .* is -?(nan|inf)"),
    "staging over weights that others still read": (
        "token_mixing.cu", f"{WAIT}{BARRIER}\n    float", f"{WAIT}\n    float",
        "u .* is -?(nan|inf)|changes with the order"),
    "results over stages that others still read": (
        "product.cuh", WAIT + BARRIER, WAIT, "is -?(nan|inf)|changes with the order"),
    "moments read before they are there": (
        "norm_backward.cu", f"    {BARRIER}        for (int c = first_c", "        for (int c = first_c",
        "dx .* is -?nan"),
    "sums read before they are there": (
        "row_statistics.cu", f"{BARRIER}    float sum", "    float sum", "mean .* is -?nan"),
    "staging read before it is there": (
        "token_tile.cuh", "    __syncwarp();\n    const float4* row", "    const float4* row", "is -?(nan|inf)"),
    "staging written while others read": (
        "token_tile.cuh", "    __syncwarp();\n#pragma unroll\n    for (int i = 0; i < 4",
        "#pragma unroll\n    for (int i = 0; i < 4", "changes with the order"),
    "hidden units staged but not yet there": (
        "token_data_gradient.cu", f"{LANES}                const T* staged", "                const T* staged",
        "is -?(nan|inf)|changes with the order"),
    "g over n that others still read": (
        "token_data_gradient.cu", f"{BARRIER}    fill_tile<Tile::kPadded>(g_tile, GradientReader",
        "    fill_tile<Tile::kPadded>(g_tile, GradientReader", "changes with the order"),
}) | in_folder("csrc", {
    "eps dropped, of CUDA": (
        "row_statistics.cu", "m2 / C + eps", "m2 / C + 0.0f * eps", "test_kernels", "test_eps and cuda"),
    "channels past the last in the statistics": (
        "row_statistics.cu", "(i * 32 + lane) * 8 + j < C ? v[i][j]", "(i * 32 + lane) * 8 + j >= 0 ? v[i][j]",
        "test_cuda_backend", "test_row_statistics and contiguous"),
    "b1 dropped, of CUDA": (
        "token_mixing.cu", "z[j][0] = z[j][2] = bias.x", "z[j][0] = z[j][2] = 0.0f * bias.x", *NUMBERS),
    "b2 dropped, of CUDA": ("token_mixing.cu", "v[j] += b2[i];", "v[j] += 0.0f * b2[i];", *NUMBERS),
    "residual dropped, of CUDA": ("channel_products.cu", "v[i] = u[i] + kept * v[i];", "v[i] = kept * v[i];", *NUMBERS),
    "a coefficient's sign, of CUDA": (
        "device/gelu.cuh", "constexpr double erf[5] = {1.5956563, 0.07293758, -2.4972143e-4",
        "constexpr double erf[5] = {1.5956563, 0.07293758, 2.4972143e-4", "test_cuda_on_host",
        "test_gelu"),
    "sum of the unrounded weight, of CUDA": (
        "pack_weights.cu", "wg += at.w[i];  // of what", "wg += w;  // of what", "test_cuda_packs",
        "test_the_fold_equals"),
    "one term of LayerNorm backward dropped, of CUDA": (
        "norm_backward.cu", " - xhat[j] * moments[r].v)", ")", *GRADIENTS),
    "another key in the second round of the random numbers": (
        "device/noise.cuh", "k1 += 0xBB67AE85u", "k1 += 0xBB67AE86u", "test_noise", "test_all_kernels_draw"),
    "branch and hidden units of one site": (
        "device/noise.cuh", "kBranch = 1", "kBranch = 0", "test_noise", "test_all_kernels_draw"),
    "32-bit image offset, of CUDA": (
        "token_mixing.cu", "return block.image * p.x.stride_b + s",
        "return static_cast<int>(block.image * p.x.stride_b) + s", "test_cuda_backend", "test_offsets and image"),
})  # fmt: skip
