"""Breakages of csrc/sm90, the kernels with TMA and wgmma, which run on the CPU's model of a GPU."""

from .breakage import seen_by
from .copies import Check

WAIT = "            wgmma_wait<0>();\n            keep(o);\n"
RELEASE = "            release_item(item + 1);\n"
FENCED = "fence_async_shared();\n        named_barrier_sync"

LAUNCHERS = Check("test_cuda_sm90_launchers", "test_launchers and None")
BREAKAGES = seen_by(LAUNCHERS, "csrc/sm90", {  # and what the driver says
    "descriptor's stride, of hidden units": (
        "token_unit.cuh", "(tile, 16, 8 * static_cast<int>(S))", "(tile, 16, 4 * static_cast<int>(S))", "u of sm90"),
    "descriptor's stride, of a stage": (
        "product.cuh", "(right + place.stage * L::kStage, 16, 8 * kStepBytes)",
        "(right + place.stage * L::kStage, 16, 4 * kStepBytes)", "a of sm90"),
    "descriptor's step": (
        "token_data_gradient.cu", "<G::kSwizzle>(w1, k)", "<G::kSwizzle>(w1, 2 * k)",
        "dn of sm90|pattern of an operand"),
    "parity of what has left": (
        "token_data_gradient.cu", "staged_empty(consumer_), staged_parity_ ^ 1",
        "staged_empty(consumer_), staged_parity_", "deadlock"),
    "parity after the other's tile": (
        "product_tile.cuh", "parity ^= to / stages & 1;", "", "of sm90|deadlock|has landed"),
    "bytes of the bias not expected": (
        "token_mixing_block.cuh", "next_slot(F::kW1Bytes + F::kB1Bytes);", "next_slot(F::kW1Bytes);",
        "u of sm90|deadlock|has landed"),
    "bytes of the rows not expected": (
        "product.cuh", "barrier_expect(full, L::kStage);", "barrier_expect(full, L::kStage - L::kLeft);",
        "of sm90|deadlock|has landed"),
    "fence before u leaves": (
        "token_mixing_kernel.cuh", FENCED + "(barrier, kConsumerThreads);\n        store(out",
        "named_barrier_sync(barrier, kConsumerThreads);\n        store(out", "no fence_async_shared"),
    "fence before n is multiplied": (
        "token_data_gradient.cu", FENCED + "(1 + consumer_", "named_barrier_sync(1 + consumer_",
        "no fence_async_shared"),
    "fence before chunks leave": (
        "product_results.cuh", "        fence_async_shared();\n        if (thread_ == 0) store_wait",
        "        if (thread_ == 0) store_wait", "no fence_async_shared"),
    "weights released before they are multiplied": (
        "token_mixing_kernel.cuh", WAIT + RELEASE, RELEASE + WAIT, "u of sm90 .* is -?nan"),
    "stage released before it is multiplied": (
        "product.cuh", "        wgmma_wait<1>();\n        if (step > 0) release(before);\n",
        "        if (step > 0) release(before);\n        wgmma_wait<1>();\n", "of sm90.* is -?nan"),
    "statistics read past S": (
        "token_unit.cuh", "if (unit.exists && s < size.S)", "if (unit.exists)", "u of sm90 .* is -?nan"),
    "statistics written past S": (
        "token_mixing_kernel.cuh", "s < size.S; s += kConsumerThreads", "s <= size.S; s += kConsumerThreads",
        "partial: a write|of u, merged"),
    "sums past D_C": (
        "channel_gelu_backward.cu", "chunk.n + column < p.N &&", "chunk.n + column <= p.N &&", "sums of dz|db3"),
    "elements past D_C": (
        "channel_gelu_backward.cu", "|| n + column >= N) continue", ") continue", "dz of sm90|a again"),
    "weights of dropped images not skipped": (
        "token_data_gradient.cu", "if (turn.works(noise_)) skip(chunks);", "", "deadlock|has landed"),
})  # fmt: skip
