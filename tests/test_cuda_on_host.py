"""The CPU's model of a GPU: its instructions, against the PTX ISA's formulas, and the faults that it has to catch.

csrc/'s launchers run under sanitizers too; with faults in their sources: tools/planted/of_cuda.py.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cuda_on_host import build
from cuda_on_host.samples import BFLOAT16, DTYPES, FLOAT16, FLOAT32, failure, load, pointer

FAULTS = [  # samples.cu's enum Fault
    "none", "row mask one too far", "store mask one too far", "no wait", "no barrier after wait",
    "no barrier before overwrite", "tail not zeroed", "barrier in half a block", "barrier in two places",
    "early return", "misaligned ldmatrix", "ldmatrix out of bounds", "misaligned copy", "copy out of bounds",
    "write out of bounds", "too much shared memory", "divergent warp", "no warp barrier",
]  # fmt: skip


@pytest.fixture(scope="module")
def samples() -> ctypes.CDLL:
    library = load("samples")
    assert library.sample_faults() == len(FAULTS)
    return library


@pytest.fixture(autouse=True)
def _default_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "samples" in request.fixturenames:
        build.configure(request.getfixturevalue("samples"))


# ------------------------------------------------------------------------------------------------------- instructions


def halves(registers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """uint32 [lanes, registers] as numbers [lanes, registers, 2], the low half first."""
    return torch.from_numpy(registers.view(np.int16)).view(dtype).float().numpy().reshape(*registers.shape, 2)


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_mma_fragments(samples, kind) -> None:
    """PTX ISA, mma.m16n8k16 with floating point types: the row and column of element i of a lane's fragment."""
    numbers = torch.randn(32, 12).to(DTYPES[kind]).view(torch.int16).numpy()
    a, b = np.ascontiguousarray(numbers[:, :8]).view(np.uint32), np.ascontiguousarray(numbers[:, 8:]).view(np.uint32)
    d = torch.randn(32, 4).numpy()
    left, right, want = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((32, 4))
    for lane in range(32):
        group, inside = lane >> 2, lane % 4
        a_lane, b_lane = halves(a, DTYPES[kind])[lane].reshape(8), halves(b, DTYPES[kind])[lane].reshape(4)
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = inside * 2 + (i & 1) if i < 4 else inside * 2 + (i & 1) + 8
            left[row, column] = a_lane[i]
        for i in range(4):
            row = inside * 2 + (i & 1) if i < 2 else inside * 2 + (i & 1) + 8
            right[row, group] = b_lane[i]
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)
            want[lane, i] = d[lane, i] + left[row] @ right[:, column]
    assert samples.sample_mma(kind, pointer(a), pointer(b), pointer(d)) == 0
    np.testing.assert_allclose(d, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(samples, matrices, transposed) -> None:
    """PTX ISA, ldmatrix .m8n8: lane l holds row l / 4, elements 2 (l % 4) and the next; of the transpose if asked."""
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    r = np.zeros((32, matrices, 2), dtype=np.uint16)
    assert samples.sample_ldmatrix(pointer(rows), matrices, transposed, pointer(r)) == 0
    for i in range(matrices):
        matrix = rows[8 * i : 8 * i + 8]
        matrix = matrix.T if transposed else matrix
        np.testing.assert_array_equal(r[:, i], matrix.reshape(32, 2))


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("lanes", [1, 5, 16])
def test_shuffles(samples, lanes, width) -> None:
    values, out = np.arange(32, dtype=np.float32), np.zeros((2, 32), dtype=np.float32)
    assert samples.sample_shuffles(pointer(values), lanes, width, pointer(out)) == 0
    lane = np.arange(32)
    segment = lane // width * width
    xor = lane ^ lanes
    np.testing.assert_array_equal(out[0], np.where(xor < segment + width, xor, lane))
    np.testing.assert_array_equal(out[1], segment + lanes % width)


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_conversions(samples, kind) -> None:
    """All 16-bit numbers to float32; float32 to 16 bits, to nearest even, around every 16-bit number."""
    every = torch.arange(1 << 16).to(torch.uint16).view(DTYPES[kind])
    wide = torch.empty(1 << 16)
    assert samples.sample_convert(pointer(every), kind, pointer(wide), FLOAT32, every.numel()) == 0
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    step = 13 if kind == FLOAT16 else 16  # bits that rounding drops
    bits = every.float().view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, (1 << step - 1) - 1, 1 << step - 1])
    exact = bits.flatten().view(torch.float32)
    exact = torch.cat([exact, exact / 2, torch.randn(1000) * 1e-6, torch.tensor([65519.996, 65520.0, 3.4e38])])
    narrow = torch.empty(exact.numel(), dtype=DTYPES[kind])
    assert samples.sample_convert(pointer(exact), FLOAT32, pointer(narrow), kind, exact.numel()) == 0
    torch.testing.assert_close(narrow, exact.to(DTYPES[kind]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_its_slope(samples, approximate) -> None:
    """The fit to the erf form is within 3.1e-6, its slope within 6.8e-6; the rest is float32's rounding."""
    z = torch.cat([torch.linspace(-13, 13, 20001), torch.tensor([-6e4, 6e4, 0.0])])
    out = torch.empty(5, z.numel())
    assert samples.sample_gelu(pointer(z), approximate == "tanh", pointer(out), ctypes.c_int64(z.numel())) == 0
    wide = z.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide, approximate=approximate)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    expected = torch.stack([exact.detach()] * 3 + [slope] * 2)
    fit = torch.tensor([3.1e-6] * 3 + [6.8e-6] * 2)[:, None] if approximate == "none" else 0.0
    assert ((out.double() - expected).abs() <= fit + 1e-6 * (1 + z.abs().double())).all()


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16, BFLOAT16])
def test_eight_at_a_time(samples, kind) -> None:
    tensor = torch.randn(64).to(DTYPES[kind])
    for offset, stride, valid in [(0, 1, 8), (8, 1, 8), (3, 1, 8), (8, 1, 5), (1, 7, 8), (0, 8, 0), (60, 1, 4)]:
        v = torch.full((8,), torch.nan)
        c_offset, c_stride = ctypes.c_int64(offset), ctypes.c_int64(stride)
        assert samples.sample_load8(pointer(tensor), kind, c_offset, c_stride, valid, pointer(v)) == 0
        want = torch.zeros(8)
        want[:valid] = tensor[offset : offset + stride * valid : stride].float()
        assert torch.equal(v, want)
        if stride == 1:
            out = torch.zeros(64, dtype=DTYPES[kind])
            numbers = torch.randn(8)
            assert samples.sample_store8(pointer(out), kind, c_offset, valid, pointer(numbers)) == 0
            want = torch.zeros(64, dtype=DTYPES[kind])
            want[offset : offset + valid] = numbers[:valid].to(DTYPES[kind])
            assert torch.equal(out, want)


def test_order_is_the_seeds(samples) -> None:
    """Threads and blocks run in an order that changes with the seed, and only with it."""
    orders = []
    for seed in (0, 0, 1, 2):
        build.configure(samples, seed=seed)
        counter, order = np.zeros(1, dtype=np.int32), np.zeros((6, 64), dtype=np.int32)
        assert samples.sample_order(6, 64, pointer(counter), pointer(order)) == 0
        np.testing.assert_array_equal(np.sort(order.flatten()), np.arange(6 * 64))
        orders.append(order)
    np.testing.assert_array_equal(orders[0], orders[1])
    first_blocks = {int(order.min(1).argmin()) for order in orders}
    first_threads = {int(order[0].argmin()) for order in orders}
    assert len(first_blocks) > 1 and len(first_threads) > 1


# ------------------------------------------------------------------------------------------------------------- faults


def run_product(samples: ctypes.CDLL, fault: str, M: int = 33, N: int = 35, K: int = 40) -> tuple[int, float]:
    """The error code, and the largest difference from the product by numpy."""
    torch.manual_seed(0)
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    c = torch.full((M, N), torch.nan)
    error = samples.sample_product(FAULTS.index(fault), pointer(a), pointer(b), pointer(c), M, N, K)
    return error, (c - a.float() @ b.float().T).abs().max().item()


@pytest.mark.parametrize("landing", build.LANDINGS)
@pytest.mark.parametrize("seed", range(3))
def test_faultless_product(samples, landing, seed) -> None:
    build.configure(samples, seed=seed, landing=landing)
    error, difference = run_product(samples, "none")
    assert error == 0 and difference < 1e-4


@pytest.mark.parametrize(
    ("fault", "landing"),
    [
        ("no wait", "late"),
        ("no barrier after wait", "late"),
        ("no barrier before overwrite", "early"),
        ("no barrier before overwrite", "late"),
        ("tail not zeroed", "early"),  # fresh shared memory is NaN, and NaN times 0 is
    ],
)
def test_faults_in_the_result(samples, fault, landing) -> None:
    differences = []
    for seed in range(4):
        build.configure(samples, seed=seed, landing=landing)
        error, difference = run_product(samples, fault)
        assert error == 0
        differences.append(difference)
    assert not all(difference < 1e-2 for difference in differences), differences  # NaN is not less


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier in half a block", r"mixer_kernels::product: block \(\d, \d, 0\), thread \(\d+, 0, 0\): in a "
                                    r"__syncthreads while others are in that of samples.cu:\d+, in samples.cu:\d+"),
        ("barrier in two places", r"in a __syncthreads while others are in that of samples.cu:\d+"),
        ("early return", r"deadlock; 1 thread returned: 17; 32 threads wait in __syncthreads, samples.cu:\d+: 32-63; "
                         r"31 threads wait in ldmatrix, matrix.cuh:\d+: 0-16 18-31"),
        ("misaligned ldmatrix", r"thread \(\d+, 0, 0\): ldmatrix at byte \d+, not a multiple of 16"),
        ("ldmatrix out of bounds", r"ldmatrix at byte \d+ of 6144 bytes of shared memory"),
        ("misaligned copy", r"cp.async at byte \d+, not a multiple of 16"),
        ("copy out of bounds", r"cp.async at byte \d+ of 6144 bytes of shared memory"),
        ("too much shared memory", r"232449 bytes is over the limit of 232448"),
    ],
)  # fmt: skip
def test_faults_that_end_the_launch(samples, fault, message) -> None:
    for seed in range(3):
        build.configure(samples, seed=seed)
        text = failure(samples, run_product(samples, fault)[0])
        assert re.search(message, text), text
    assert run_product(samples, "none")[0] == 0  # and nothing of it stays


def test_faults_of_a_warp(samples) -> None:
    values = np.arange(32, dtype=np.float32)

    def neighbours(fault: str) -> tuple[int, np.ndarray]:
        out = np.zeros(32, dtype=np.float32)
        return samples.sample_neighbours(FAULTS.index(fault), pointer(values), pointer(out)), out

    error, out = neighbours("none")
    assert error == 0
    np.testing.assert_array_equal(out, np.roll(values, 1))
    error, out = neighbours("no warp barrier")
    assert error == 0 and not np.array_equal(out, np.roll(values, 1))
    assert "in __syncwarp while other lanes of the warp are in shfl.sync" in failure(
        samples, neighbours("divergent warp")[0]
    ) or "in shfl.sync while other lanes of the warp are in __syncwarp" in failure(
        samples, neighbours("divergent warp")[0]
    )
    assert "a write outside of shared memory, at byte 128 of 128" in failure(
        samples, neighbours("write out of bounds")[0]
    )


def test_shared_memory_limit(samples) -> None:
    build.configure(samples, shared_limit=6143)
    assert "6144 bytes is over the limit of 6143" in failure(samples, run_product(samples, "none")[0])
    build.configure(samples, shared_limit=6144)
    assert run_product(samples, "none")[0] == 0


# --------------------------------------------------------------------------------------------------------- sanitizers


def test_address_sanitizer() -> None:
    program = build.build_samples("address,undefined")
    clean = build.run(program, "0")
    assert clean.returncode == 0, clean.stdout
    for fault in ("row mask one too far", "store mask one too far"):
        result = build.run(program, str(FAULTS.index(fault)))
        assert result.returncode != 0 and "heap-buffer-overflow" in result.stdout, result.stdout
    result = build.run(program, str(FAULTS.index("write out of bounds")))
    assert result.returncode != 0 and "use-after-poison" in result.stdout, result.stdout
    result = build.run(program, str(FAULTS.index("early return")))  # threads that wait are unwound, cleanly
    assert "deadlock" in result.stdout and "Sanitizer" not in result.stdout.replace("ASan", ""), result.stdout


def test_thread_sanitizer() -> None:
    program = build.build_samples("thread")
    for landing in build.LANDINGS:
        clean = build.run(program, "0", CUDA_ON_HOST_LANDING=landing)
        assert clean.returncode == 0, clean.stdout
    for fault in ("no barrier after wait", "no barrier before overwrite", "no warp barrier"):
        result = build.run(program, str(FAULTS.index(fault)), CUDA_ON_HOST_LANDING="early")
        assert result.returncode != 0 and "data race" in result.stdout, result.stdout


@pytest.mark.parametrize("sanitizer", [None, "address,undefined", "thread"])
def test_launchers(sanitizer) -> None:
    """Every launcher over small shapes: driver.cpp."""
    result = build.run(build.build_driver(sanitizer))
    assert result.returncode == 0, result.stdout


def test_compile_errors_are_told(tmp_path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("int main() { return undeclared; }")
    with pytest.raises(build.CompileError, match="undeclared"):
        build.build([source], [], [], "broken", cache=tmp_path)
