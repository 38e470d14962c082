"""Kernels of sm_90 in the CPU's model of a GPU: right ones, and the faults that it has to catch."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import pytest
import torch
from cuda_on_host import build
from cuda_on_host.samples import failure, load, pointer

# Enumerations of hopper_samples.cu.
FAULTS = [
    "none", "wrong stride", "wrong parity", "expects less", "expects nothing", "no fence", "no init fence",
    "releases early", "reads before wait", "writes before wait", "no wgmma fence", "no barrier before store",
    "returns with a store", "returns without commit", "returns with a product", "overwrites a store",
    "one arrival too many", "forgets a load", "named barrier of too many", "misaligned tile", "unmasked tail",
]  # fmt: skip
SMALL_FAULTS = [
    "nothing wrong", "laps a parity", "too many registers", "registers of one warp", "named barrier of a lane",
    "named barrier twice", "named barrier of two sizes", "no barrier made", "barrier overwritten",
    "barrier misaligned", "barrier made twice", "parity of two", "plain store without fence", "store from misaligned",
    "load outside of shared memory", "wrong number of axes", "no tensor map", "returns before a load",
    "product of one warp", "product of other operands", "product outside of shared memory", "operand off by 8",
    "shared operand without fence", "address of a local",
]  # fmt: skip
CLUSTER_FAULTS = ["none", "releases its own only", "no sync at the end", "no sync at the begin"]


@pytest.fixture(scope="module")
def samples() -> ctypes.CDLL:
    library = load("hopper_samples")
    counts = library.sample_faults(), library.sample_small_faults(), library.sample_cluster_faults()
    assert counts == (len(FAULTS), len(SMALL_FAULTS), len(CLUSTER_FAULTS))
    return library


@pytest.fixture(autouse=True)
def _default_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "samples" in request.fixturenames:
        build.configure(request.getfixturevalue("samples"))


# ----------------------------------------------------------------------------------------------------------- clusters


def share(samples: ctypes.CDLL, fault: str, blocks: int = 4, rounds: int = 3) -> tuple[int, bool]:
    rows = torch.randn(rounds * blocks * 8, 64).bfloat16()
    out = torch.full((rounds, blocks, blocks * 8, 64), torch.nan).bfloat16()
    error = samples.sample_share(CLUSTER_FAULTS.index(fault), blocks, blocks, rounds, pointer(rows), pointer(out))
    return error, torch.equal(out, rows.view(rounds, 1, -1, 64).expand_as(out))


@pytest.mark.parametrize("landing", build.LANDINGS)
def test_clusters(samples, landing) -> None:
    """Blocks of a cluster load for each other, and give slots back to each other."""
    for seed, blocks in enumerate((1, 2, 4, 8)):
        build.configure(samples, seed=seed, landing=landing)
        assert share(samples, "none", blocks) == (0, True)
    wrong = []
    for seed in range(4):
        build.configure(samples, seed=seed, landing=landing)
        assert "has returned, and its shared memory is gone" in failure(
            samples, share(samples, "no sync at the end")[0]
        )
        assert "no mbarrier has been made" in failure(samples, share(samples, "no sync at the begin")[0])
        wrong.append(share(samples, "releases its own only") != (0, True))
    assert any(wrong)


def test_clusters_that_are_refused(samples) -> None:
    rows = torch.zeros(6 * 8, 64).bfloat16()
    for blocks, cluster, message in [(6, 4, "gridDim.x is 6, not a multiple of the 4 blocks in a cluster"),
                                     (9, 9, "the number of blocks in a cluster is 9, not 1 to 8")]:  # fmt: skip
        error = samples.sample_share(0, blocks, cluster, 1, pointer(rows), pointer(rows))
        assert error == 9 and message in failure(samples, error)


# ------------------------------------------------------------------------------------------------------------- faults


def run_pipeline(samples: ctypes.CDLL, fault: str, M: int = 200, N: int = 136, K: int = 200) -> tuple[int, float]:
    """The error code, and the largest error in units of bfloat16's rounding."""
    torch.manual_seed(0)
    a, b = torch.randn(M, K + 8).bfloat16(), torch.randn(N, K + 8).bfloat16()
    d = torch.full((M, N), torch.nan).bfloat16()
    error = samples.sample_pipeline(FAULTS.index(fault), 2, pointer(a), pointer(b), pointer(d), M, N, K, K + 8)
    want = a[:, :K].double() @ b[:, :K].double().T
    return error, ((d.double() - want).abs() / (want.abs() / 256 + 1e-3)).max().item()


@pytest.mark.parametrize("landing", build.LANDINGS)
def test_faultless_pipeline(samples, landing) -> None:
    for seed in range(3):
        build.configure(samples, seed=seed, landing=landing)
        error, difference = run_pipeline(samples, "none")
        assert error == 0, failure(samples, error)
        assert difference < 1.01


PIPELINE_FAULTS = [
    ("wrong stride", "late", None),
    ("wrong parity", "early", r"deadlock; .* 1 thread waits in barrier_wait for parity 0 of the mbarrier at byte \d+ "
                              r"of shared memory, hopper_samples.cu:\d+: 128; the mbarrier at byte \d+ of shared "
                              r"memory is in phase 0, and waits for 1 of 1 arrivals and 0 bytes"),
    ("expects less", "late", r"all threads have returned before the box of the load_tile of hopper_samples.cu:\d+ has"),
    ("expects less", "early", r"deadlock; .* waits for 0 of 1 arrivals and -\d+ bytes"),
    ("expects nothing", "late", r"all threads have returned before the box of the load_tile"),
    ("expects nothing", "early", r"deadlock; .* waits for 0 of 1 arrivals and -\d+ bytes"),
    ("no fence", "late", r"store_tile reads byte \d+ of shared memory, which thread \d+ has written with no fence"),
    ("no init fence", "late", r"load_tile: no barrier_init_fence followed the barrier_init of the mbarrier at byte"),
    ("releases early", "late", None),
    ("reads before wait", "late", None),
    ("writes before wait", "late", r"accumulators of a wgmma under way were written"),
    ("no wgmma fence", "early", r"wgmma without a wgmma_fence since the last wgmma_wait"),
    ("no barrier before store", "early", r"store_tile reads byte \d+ of shared memory, which thread \d+ has written"),
    ("returns with a store", "late", r"thread \(0, 0, 0\): returns while a store_tile still reads shared memory"),
    ("returns without commit", "early", r"returns without a store_commit after a store_tile"),
    ("returns with a product", "late", r"returns while its wgmma is under way"),
    ("overwrites a store", "late", None),
    ("one arrival too many", "late", r"barrier_arrive: one arrival more than the 1 of a phase at the mbarrier at byte "
                                     r"\d+ of shared memory, which still waits for 16384 bytes"),
    ("forgets a load", "random", r"deadlock; .* waits for 0 of 1 arrivals and 8192 bytes"),
    ("named barrier of too many", "late", r"deadlock; .* 128 threads wait in named_barrier_sync, .*: 0-127; .*"
                                          r"128 of 160 threads have come to named barrier 1"),
    ("misaligned tile", "late", r"the pattern of an operand with a swizzle of 128 bytes begins at address \d+, not in"),
    ("unmasked tail", "early", None),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "landing", "message"), PIPELINE_FAULTS)
def test_faults_of_a_pipeline(samples, fault, landing, message) -> None:
    caught = []
    for seed in range(4):
        build.configure(samples, seed=seed, landing=landing)
        error, difference = run_pipeline(samples, fault)
        if message is not None:
            text = failure(samples, error)
            assert re.search(message, text), text
        caught.append(error != 0 or not difference < 1.01)  # NaN is not less
    assert all(caught), caught
    assert run_pipeline(samples, "none")[0] == 0  # and nothing of it stays


def test_every_fault_of_the_pipeline_is_planted() -> None:
    assert {fault for fault, _, _ in PIPELINE_FAULTS} == set(FAULTS) - {"none"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("laps a parity", r"waits for the end of phase (\d+) of the mbarrier at byte 0 of shared memory, but phase \d+ "
                          r"ended too before this thread looked"),
        ("too many registers", "its warps ask for 92160 registers, of 65536: increase_registers would wait forever"),
        ("registers of one warp", "the warps of a warpgroup ask for different numbers of registers"),
        ("named barrier of a lane", "named barrier 1: only 16 lanes of warp 2 have come"),
        ("named barrier twice", "comes to named barrier 3 again before 96 threads have"),
        ("named barrier of two sizes", r"named barrier 3 of \d+ threads, while others have come to it as one of \d+"),
        ("no barrier made", "barrier_arrive: no mbarrier has been made at byte 0 of shared memory"),
        ("barrier overwritten", "somebody wrote over the mbarrier at byte 0 of shared memory"),
        ("barrier misaligned", "barrier_init at byte 4, not a multiple of 8"),
        ("barrier made twice", "barrier_init again at byte 0 of shared memory"),
        ("parity of two", "barrier_wait for parity 2, not 0 or 1"),
        ("plain store without fence", "store_tile reads byte 896 of shared memory, which a thread has written with no"),
        ("store from misaligned", "store_tile at byte 960, not a multiple of 128"),
        ("load outside of shared memory", "load_tile at byte 9088 of 9216 bytes of shared memory"),
        ("wrong number of axes", "load_tile at 3 coordinates in a tensor of 2 axes"),
        ("no tensor map", "load_tile with a tensor map that make_tensor_map has not made"),
        ("returns before a load", "all threads have returned before the box of the load_tile"),
        ("product of one warp", r"deadlock; 352 threads returned: 32-383; 32 threads wait in wgmma_wait, .*: 0-31"),
        ("product of other operands", "wgmma of other operands than in other warps of the warpgroup"),
        ("product outside of shared memory", r"wgmma reads an operand at byte \d+ of shared memory, of 9216 bytes"),
        ("operand off by 8", r"operand: the start 2056, not a multiple of 16"),
        ("shared operand without fence", r"wgmma reads byte \d+ of shared memory, which thread \d+ has written with"),
        ("address of a local", "the address of what is not in shared memory"),
    ],
)  # fmt: skip
def test_faults_that_end_the_launch(samples, fault, message) -> None:
    rows = torch.zeros(8, 64).bfloat16()
    text = failure(samples, samples.sample_small_fault(SMALL_FAULTS.index(fault), pointer(rows)))
    assert re.search(message, text) and "mixer_kernels::small_fault: block (0, 0, 0)" in text, text
    assert samples.sample_small_fault(0, pointer(rows)) == 0


# --------------------------------------------------------------------------------------------------------- sanitizers


def test_address_sanitizer() -> None:
    program = build.build_samples("address,undefined", name="hopper_samples")
    clean = build.run(program, "0")
    assert clean.returncode == 0, clean.stdout
    result = build.run(program, str(FAULTS.index("no wgmma fence")))  # threads that wait are unwound, cleanly
    assert "wgmma_fence" in result.stdout and "Sanitizer" not in result.stdout.replace("ASan", ""), result.stdout


def test_thread_sanitizer() -> None:
    """Also where an order is harmless by chance: the asynchronous accesses race, or they are ordered."""
    program = build.build_samples("thread", name="hopper_samples")
    for landing in build.LANDINGS:
        clean = build.run(program, "0", CUDA_ON_HOST_LANDING=landing)
        assert clean.returncode == 0, clean.stdout
    for fault, landing in [("releases early", "late"), ("overwrites a store", "late"),
                           ("no barrier before store", "late")]:  # fmt: skip
        result = build.run(program, str(FAULTS.index(fault)), CUDA_ON_HOST_LANDING=landing)
        assert result.returncode != 0 and "data race" in result.stdout, result.stdout
