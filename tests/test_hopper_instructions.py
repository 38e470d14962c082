"""What the instructions of sm_90 compute in the CPU's model of a GPU: TMA, wgmma, stmatrix, mbarriers.

They are compared with formulas of the PTX ISA's text, written here again in numpy, and wgmma's layouts with CuTe's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_host import build
from cuda_on_host.samples import BFLOAT16, DTYPES, FLOAT16, FLOAT32, failure, load, pointer


@pytest.fixture(scope="module")
def samples() -> ctypes.CDLL:
    return load("hopper_probes")


@pytest.fixture(autouse=True)
def _default_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "samples" in request.fixturenames:
        build.configure(request.getfixturevalue("samples"))


# --------------------------------------------------------------------------------------------------------------- TMA

# PTX ISA, "Swizzling modes": which 16 bytes of 128 lie where, row by row, until the pattern repeats.
PATTERNS = {
    0: ["01234567"],
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
}


def swizzled(offset: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the bytes at these offsets from a multiple of 1024 lie."""
    table = np.array([[int(chunk) for chunk in line] for line in PATTERNS[swizzle]])
    row, chunk, byte = offset // 128, offset // 16 % 8, offset % 16
    return row * 128 + table[row % len(table), chunk] * 16 + byte


class Map(ctypes.Structure):
    """SampleMap of hopper_samples.cu."""

    _fields_ = [
        ("base", ctypes.c_void_p), ("type", ctypes.c_int), ("rank", ctypes.c_int), ("swizzle", ctypes.c_int),
        ("sizes", ctypes.c_int64 * 5), ("strides", ctypes.c_int64 * 4), ("box", ctypes.c_int * 5),
    ]  # fmt: skip

    def __init__(self, tensor: np.ndarray, kind: int, box: Sequence[int], swizzle: int) -> None:
        """tensor and box: outermost axis first."""
        super().__init__(tensor.ctypes.data, kind, tensor.ndim, swizzle)
        for i, axis in enumerate(reversed(range(tensor.ndim))):
            self.sizes[i] = tensor.shape[axis]
            self.box[i] = box[axis]
            if i > 0:
                self.strides[i - 1] = tensor.strides[axis] // tensor.itemsize


BOXES = [  # dtype, sizes, padding of the innermost axis, box, where, swizzle, offset in shared memory
    (BFLOAT16, (20, 64), 0, (8, 64), (0, 0), 128, 0),
    (BFLOAT16, (20, 72), 8, (16, 64), (12, 40), 128, 1024),  # past both ends
    (FLOAT16, (20, 72), 0, (8, 64), (-3, -5), 128, 128),  # from before both; not from a pattern's begin
    (BFLOAT16, (33, 40), 0, (40, 32), (0, 16), 64, 0),
    (BFLOAT16, (33, 40), 0, (9, 32), (5, 8), 64, 384),
    (FLOAT16, (17, 24), 0, (17, 16), (0, 8), 32, 256),
    (BFLOAT16, (17, 13), 3, (7, 8), (3, 8), 0, 128),
    (FLOAT32, (9, 40), 0, (9, 32), (1, 8), 128, 0),
    (BFLOAT16, (3, 20, 72), 0, (1, 16, 64), (1, 8, 64), 128, 0),
    (BFLOAT16, (3, 20, 64), 0, (2, 5, 64), (2, 18, 0), 128, 0),
    (FLOAT16, (3, 5, 16), 8, (3, 4, 8), (-1, 2, -4), 0, 640),
    (BFLOAT16, (2, 300, 64), 0, (1, 256, 64), (1, 44, 0), 128, 0),
]  # fmt: skip


@pytest.mark.parametrize("landing", build.LANDINGS)
@pytest.mark.parametrize(("kind", "sizes", "padding", "box", "at", "swizzle", "offset"), BOXES)
def test_boxes(samples, kind, sizes, padding, box, at, swizzle, offset, landing) -> None:
    """cp.async.bulk.tensor: a box's place in shared memory, zero fill, and stores that are clipped."""
    build.configure(samples, seed=1, landing=landing)
    dtype = np.uint32 if kind == FLOAT32 else np.uint16
    random = np.random.default_rng(0)
    whole = random.integers(1, 1 << 16, (*sizes[:-1], sizes[-1] + padding)).astype(dtype)
    tensor = whole[..., : sizes[-1]]
    sample_map, coordinates = Map(tensor, kind, box, swizzle), [*reversed(at), 0][:3]
    # The elements of the box, and those of them that the tensor has.
    index = [i + np.arange(n) for i, n in zip(at, box, strict=True)]
    there = [(0 <= i) & (i < size) for i, size in zip(index, sizes, strict=True)]
    of_box = np.ix_(*there)
    of_tensor = np.ix_(*(i[inside] for i, inside in zip(index, there, strict=True)))
    places = swizzled(offset + np.arange(np.prod(box) * whole.itemsize), swizzle) - offset

    elements = np.zeros(box, dtype)
    elements[of_box] = tensor[of_tensor]
    got = np.full(elements.nbytes, 0xEE, np.uint8)
    error = samples.sample_load(ctypes.byref(sample_map), *coordinates, offset, pointer(got))
    assert error == 0, failure(samples, error)
    np.testing.assert_array_equal(got[places], elements.view(np.uint8).flatten())

    elements = random.integers(1, 1 << 16, box).astype(dtype)
    placed, want = np.zeros(elements.nbytes, np.uint8), whole.copy()
    placed[places] = elements.view(np.uint8).flatten()
    want[..., : sizes[-1]][of_tensor] = elements[of_box]
    error = samples.sample_store(ctypes.byref(sample_map), *coordinates, offset, pointer(placed))
    assert error == 0, failure(samples, error)
    np.testing.assert_array_equal(whole, want)


def test_a_box_under_way_is_not_there(samples) -> None:
    """Even if it is what was there before."""
    tensor = np.random.default_rng(0).integers(1, 1 << 15, (8, 64)).astype(np.uint16)
    sample_map, places = Map(tensor, BFLOAT16, (8, 64), 128), swizzled(np.arange(1024), 128)
    for landing, want in (("late", np.full_like(tensor, 0xFFFF)), ("early", tensor)):
        build.configure(samples, landing=landing)
        got = np.zeros(1024, np.uint8)
        assert samples.sample_load_twice(ctypes.byref(sample_map), 0, 0, 0, 0, pointer(got)) == 0
        np.testing.assert_array_equal(got[places], want.view(np.uint8).flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 8}, "its address is not a multiple of 16"),
        ({"strides": 36}, "the stride of axis 1 is 72 bytes, not a multiple of 16"),
        ({"box": (64, 257)}, "the box of axis 1 is 257, not 1 to 256"),
        ({"box": (64, 0)}, "the box of axis 1 is 0, not 1 to 256"),
        ({"box": (12, 8)}, "a row of the box is 24 bytes, not a multiple of 16"),
        ({"box": (128, 8)}, "a row of the box is 256 bytes, and the swizzle's is 128"),
        ({"rank": 6}, "6 axes, not 1 to 5"),
        ({"sizes": 0}, "the size of axis 0 is 0, not 1 to 2^32"),
    ],
)
def test_maps_that_are_refused(samples, change, message) -> None:
    """cuTensorMapEncodeTiled, what it asks for."""
    tensor = np.zeros((20, 64), np.uint16)
    sample_map = Map(tensor, BFLOAT16, (8, 64), 128)
    sample_map.base += change.get("base", 0)
    sample_map.rank = change.get("rank", 2)
    sample_map.strides[0] = change.get("strides", 64)
    sample_map.sizes[0] = change.get("sizes", 64)
    sample_map.box[0], sample_map.box[1] = change.get("box", (64, 8))
    error = samples.sample_load(ctypes.byref(sample_map), 0, 0, 0, 0, pointer(tensor))
    assert error == 1 and message in failure(samples, error)


# ------------------------------------------------------------------------------------------------------------- wgmma


class Placed(ctypes.Structure):
    """An operand of wgmma: bytes in shared memory, where in them it starts, and its descriptor's offsets."""

    _fields_ = [
        ("bytes", ctypes.c_void_p), ("count", ctypes.c_int), ("start", ctypes.c_int), ("leading", ctypes.c_int),
        ("stride", ctypes.c_int), ("swizzle", ctypes.c_int),
    ]  # fmt: skip

    def __init__(self, memory: np.ndarray, leading: int, stride: int, swizzle: int, start: int = 0) -> None:
        super().__init__(memory.ctypes.data, memory.nbytes, start, leading, stride, swizzle)
        self.memory = memory  # lives as long


def bits(numbers: torch.Tensor) -> np.ndarray:
    return numbers.contiguous().view(torch.int16).numpy().view(np.uint16)


def place(numbers: torch.Tensor, offsets: np.ndarray, swizzle: int) -> np.ndarray:
    """Memory with 16-bit numbers at these offsets in bytes, before swizzling; NaN elsewhere."""
    at = swizzled(offsets, swizzle) // 2
    memory = np.full(-(-(at.max() + 1) // 512) * 512, 0xFFFF, np.uint16)
    memory[at] = bits(numbers)
    return memory


def canonical(rows: int, mn_major: bool, swizzle: int, gap: int) -> tuple[np.ndarray, int, int]:
    """PTX ISA, "Shared Memory Matrix Layout": offsets [rows, 16] in bytes of an operand, leading and stride offset.

    Core matrices are 8 lines of 16 bytes; ``gap`` bytes more lie between repetitions than have to.
    """
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    inner, outer = (row, k) if mn_major else (k, row)  # inner: side by side in a line
    if swizzle == 0:  # a core matrix is 128 bytes without a gap; they follow each other along M or N, then along K
        stride = 128 + gap
        leading = stride * (rows // 8) + gap
        return outer % 8 * 16 + inner % 8 * 2 + row // 8 * stride + k // 8 * leading, leading, stride
    # 8 lines of the swizzle's bytes; K-major operands are one such column, MN-major ones as many as it takes
    elements = swizzle // 2
    within = outer % 8 * swizzle + inner % elements * 2
    stride = 8 * swizzle + gap * 8
    if not mn_major:
        return within + row // 8 * stride, 16, stride
    leading = 2 * stride + gap * 8
    return within + k // 8 * stride + row // elements * leading, leading, stride


def fragment_a(matrix: np.ndarray) -> np.ndarray:
    """PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", A [64, 16]: [thread, i], i = 0..7."""
    thread, i = np.arange(128)[:, None], np.arange(8)[None, :]
    group, inside = thread % 32 >> 2, thread % 4
    row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    column = np.where(i < 4, inside * 2 + (i & 1), inside * 2 + (i & 1) + 8)
    return matrix[thread // 32 * 16 + row, column]


def fragment_d(matrix: np.ndarray) -> np.ndarray:
    """The same of D [64, N]: [thread, i], i = 0..N/2-1."""
    thread, i = np.arange(128)[:, None], np.arange(matrix.shape[1] // 2)[None, :]
    row = thread // 32 * 16 + (thread % 32 >> 2) + np.where(i % 4 < 2, 0, 8)
    column = i // 4 * 8 + thread % 4 * 2 + i % 2
    return matrix[row, column]


def random_numbers(kind: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DTYPES[kind])


def run_wgmma(samples, kind, a, b, a_mn, b_mn, d, accumulate=True) -> np.ndarray:
    """a: Placed, or [64, 16] for registers. Returns D [128, N / 2]."""
    registers, placed = None, Placed(np.zeros(0, np.uint16), 0, 0, 0)
    if isinstance(a, Placed):
        placed = a
    else:
        registers = np.ascontiguousarray(fragment_a(bits(a))).view(np.uint32)
    d = np.ascontiguousarray(d, np.float32)
    error = samples.sample_wgmma(
        kind, 2 * d.shape[1], int(a_mn), int(b_mn), ctypes.byref(placed), pointer(registers), ctypes.byref(b),
        int(accumulate), pointer(d),
    )  # fmt: skip
    assert error == 0, failure(samples, error)
    return d


@pytest.mark.parametrize("gap", [0, 16])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("N", [32, 64, 200, 256])
def test_operand_b(samples, N, mn_major, swizzle, gap) -> None:
    if gap and swizzle:
        gap = swizzle  # patterns begin at multiples of their size
    kind = FLOAT16 if N == 64 else BFLOAT16
    torch.manual_seed(N)
    a, b, d = random_numbers(kind, 64, 16), random_numbers(kind, N, 16), np.random.randn(64, N)
    offsets, leading, stride = canonical(N, mn_major, swizzle, gap)
    operand = Placed(place(b, offsets, swizzle), leading, stride, swizzle)
    got = run_wgmma(samples, kind, a, operand, False, mn_major, fragment_d(d))
    want = d + a.double().numpy() @ b.double().numpy().T
    np.testing.assert_allclose(got, fragment_d(want), rtol=0, atol=3e-5)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_operand_a(samples, kind, mn_major, swizzle) -> None:
    torch.manual_seed(1)
    a, b = random_numbers(kind, 64, 16), random_numbers(kind, 64, 16)
    offsets, leading, stride = canonical(64, mn_major, swizzle, 0)
    left = Placed(place(a, offsets, swizzle), leading, stride, swizzle)
    offsets, leading, stride = canonical(64, False, 128, 0)
    right = Placed(place(b, offsets, 128), leading, stride, 128)
    for landing in build.LANDINGS:
        build.configure(samples, seed=3, landing=landing)
        d = np.full((128, 32), np.nan)  # not read
        got = run_wgmma(samples, kind, left, right, mn_major, False, d, accumulate=False)
        np.testing.assert_allclose(got, fragment_d(a.double().numpy() @ b.double().numpy().T), rtol=0, atol=3e-5)


def test_wgmma_decodes_every_number(samples) -> None:
    """Subnormals, infinities and NaNs too: products with the identity."""
    for kind in (FLOAT16, BFLOAT16):
        every = torch.arange(1 << 16).to(torch.uint16).view(DTYPES[kind])
        numbers = every[every.isfinite()]  # a sum with others' zeros times infinity would be NaN
        identity = torch.eye(16).repeat(4, 1).to(DTYPES[kind])
        offsets, leading, stride = canonical(256, False, 128, 0)
        for first in range(0, numbers.numel() - 4096, 4096 * 4 + 13):
            b = numbers[first : first + 4096].view(256, 16)
            operand = Placed(place(b, offsets, 128), leading, stride, 128)
            got = run_wgmma(samples, kind, identity, operand, False, False, np.zeros((128, 128)), accumulate=False)
            np.testing.assert_array_equal(got, fragment_d(b.float().numpy().T[np.arange(64) % 16]))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("matrices", [2, 4])
def test_stmatrix(samples, matrices, transposed) -> None:
    """PTX ISA, stmatrix .m8n8: lane l holds row l / 4, elements 2 (l % 4) and the next; of the transpose if asked."""
    r = np.arange(32 * matrices * 2, dtype=np.uint16).reshape(32, matrices, 2)
    rows = np.zeros((matrices * 8, 8), np.uint16)
    assert samples.sample_stmatrix(pointer(r), matrices, transposed, pointer(rows)) == 0
    for i in range(matrices):
        matrix = r[:, i].reshape(8, 8)
        np.testing.assert_array_equal(rows[8 * i : 8 * i + 8], matrix.T if transposed else matrix)


def test_registers_of_wgmma_are_listed_in_order() -> None:
    """csrc/device/wgmma_shapes.cuh: the assembly's operands, which no compiler checks."""
    text = (build.CSRC / "device" / "wgmma_shapes.cuh").read_text()
    lists = text[: text.index("#define MK_WGMMA(")]
    assert [int(n) for n in re.findall(r"%(\d+)", lists)] == list(range(128))
    assert [int(n) for n in re.findall(r"d\[(\d+)\]", lists)] == list(range(128))
    shapes = re.findall(r"^MK_WGMMA_SHAPE\((\d+), (.*)\)$", text, re.MULTILINE)
    assert {int(n) for n, _ in shapes} >= {32, 64, 128, 192, 200, 208, 256}
    for n, operands in shapes:
        assert operands == ", ".join(f'"%{int(n) // 2 + i}"' for i in range(7))


# -------------------------------------------------------------------------------------------------------------- CuTe


def cute() -> dict[str, np.ndarray]:
    """What cute_layouts.cpp prints."""
    spec = importlib.util.find_spec("cutlass_library")
    assert spec is not None and spec.origin is not None, "requirements-dev-no-deps.txt has nvidia-cutlass"
    folders = [Path(spec.origin).parent / "source" / "include", *cuda_headers()]
    flags = ["-O0", "-w", *(f"-isystem{folder}" for folder in folders)]
    program = build.build([build.MODEL / "cute_layouts.cpp"], flags, [], "cute_layouts")
    result = build.run(program)
    assert result.returncode == 0, result.stdout
    tables = {}
    for line in result.stdout.splitlines():
        name, numbers = line.split(":")
        tables[name] = np.array(numbers.split(), dtype=np.int64)
    return tables


def cuda_headers() -> list[Path]:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in homes:
        if (home / "include" / "cuda_runtime_api.h").exists():
            return [home / "include", home / "include" / "cccl"]
    return []


CUTE_OPERANDS = [  # as in cute_layouts.cpp; leading and stride offset, and how far a step of 16 along K is
    ("k 128", 200, 64, 16, 1024, 32),
    ("k 64", 256, 32, 16, 512, 32),
    ("k 32", 64, 16, 16, 256, 0),
    ("k 0", 64, 16, 1024, 128, 0),
    ("mn 128", 64, 208, 0, 1024, 2048),
    ("mn 64", 32, 256, 0, 512, 1024),
    ("mn 32", 64, 16, 512, 256, 0),
    ("mn 0", 64, 16, 1024, 128, 0),
    ("mn 128 twice", 256, 32, 4096, 1024, 2048),
]


@pytest.mark.skipif(
    not cuda_headers(), reason="waits for a machine with the CUDA toolkit's headers, which CuTe includes"
)
def test_layouts_are_those_of_cute(samples) -> None:
    """The second source: products of operands that lie as CuTe's layouts say."""
    tables = cute()
    row_and_column = np.arange(64 * 256).reshape(256, 64).T  # row + 64 * column
    np.testing.assert_array_equal(tables["fragment a"].reshape(128, 8), fragment_a(row_and_column[:, :16]))
    np.testing.assert_array_equal(tables["fragment d"].reshape(128, 128), fragment_d(row_and_column))
    for name, rows, depth, leading, stride, step in CUTE_OPERANDS:
        offsets = tables[f"operand {name} {rows} {depth}"].reshape(rows, depth)
        major, swizzle = name.split()[:2]
        torch.manual_seed(rows)
        a, b = random_numbers(BFLOAT16, 64, depth), random_numbers(BFLOAT16, rows, depth)
        memory = place(b, offsets, 0)  # CuTe has swizzled them
        d = np.zeros((128, rows // 2))
        for k in range(0, depth, 16):
            operand = Placed(memory, leading, stride, int(swizzle), start=k // 16 * step)
            d = run_wgmma(samples, BFLOAT16, a[:, k : k + 16], operand, False, major == "mn", d)
        want = fragment_d(a.double().numpy() @ b.double().numpy().T)
        np.testing.assert_allclose(d, want, rtol=0, atol=2e-4, err_msg=name)


# --------------------------------------------------------------------------------------------------------- mbarriers


@pytest.mark.parametrize("landing", build.LANDINGS)
def test_phases(samples, landing) -> None:
    """A phase ends when all arrivals have come, and parity tells it from the next."""
    for seed in range(5):
        build.configure(samples, seed=seed, landing=landing)
        counter, stamps = np.zeros(1, np.int32), np.full((4, 3), -1, np.int32)
        assert samples.sample_phases(pointer(counter), pointer(stamps)) == 0
        np.testing.assert_array_equal(np.sort(stamps.flatten()), np.arange(12))
        assert (stamps[:, 2] > stamps[:, :2].max(1)).all() and (stamps[1:, :2].min(1) > stamps[:-1, 2]).all()
