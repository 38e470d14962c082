"""The launchers of csrc/sm90 under sanitizers, and with faults planted in their sources: driver_sm90.cpp."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_on_host import build


@pytest.mark.parametrize(("sanitizer", "runs"), [(None, "6"), ("address,undefined", "2"), ("thread", "1")])
def test_launchers(sanitizer, runs) -> None:
    """Every launcher over small shapes, in so many orders: driver_sm90.cpp."""
    result = build.run(build.build_driver(sanitizer, name="driver_sm90"), runs)
    assert result.returncode == 0, result.stdout


WAIT = "            wgmma_wait<0>();\n            keep(o);\n"
RELEASE = "            release_item(item + 1);\n"
FENCED = "fence_async_shared();\n        named_barrier_sync"
PLANTED = {  # file of csrc/sm90, what is there, what is planted, what the driver says
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
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the driver says of each bug; two at a time, for most change one file."""
    faulty = tmp_path_factory.mktemp("faulty")  # not by the threads: pytest's folders are made by one at a time

    def output(bug: str) -> str:
        name, old, new, _ = PLANTED[bug]
        csrc = faulty / bug.replace(" ", "_") / "csrc"
        shutil.copytree(build.CSRC, csrc)
        text = (csrc / "sm90" / name).read_text()
        assert text.count(old) == 1, f"{bug}: {name} has changed, bring the test up to date"
        (csrc / "sm90" / name).write_text(text.replace(old, new))
        result = build.run(build.build_driver(csrc=csrc, name="driver_sm90"))
        return result.stdout if result.returncode != 0 else "nothing"

    with ThreadPoolExecutor(2) as workers:
        return dict(zip(PLANTED, workers.map(output, PLANTED), strict=True))


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_noticed(planted, bug) -> None:
    assert re.search(PLANTED[bug][3], planted[bug]), planted[bug]
