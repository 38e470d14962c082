"""The strict interpreter's memory: right kernels pass, planted bugs raise, each byte counts once."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import strict_interpreter
import torch
from strict_interpreter import GridTooLarge, OutOfBounds, Race, StrictError
from strict_interpreter.memory import Argument, Region

if torch.cuda.is_available():
    pytest.skip("with a GPU this process compiles its kernels", allow_module_level=True)
strict_interpreter.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@triton.jit
def copy_kernel(x, y, n, shift, limit, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offs, tl.load(x + offs + shift, mask=offs < limit, other=0.0), mask=offs < n)


@triton.jit
def copy2d_kernel(x, y, M, N, sxm, sxn, sym, syn, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    mask = (m < M) & (n < N)
    tl.store(y + m * sym + n * syn, tl.load(x + m * sxm + n * sxn, mask=mask), mask=mask)


def copy2d(x, y, M, N):
    copy2d_kernel[(1,)](x, y, M, N, *x.stride(), *y.stride(), triton.next_power_of_2(M), triton.next_power_of_2(N))


# ---------------------------------------------------------------- bounds


def test_masked_copy_passes_and_counts_each_byte_once():
    x, y = torch.randn(100), torch.empty(100)
    with strict_interpreter.record() as launches:
        copy_kernel[(4,)](x, y, 100, 0, 100, 32, num_warps=4, num_stages=2, enable_fp_fusion=True)
    assert torch.equal(x, y)
    assert launches == [strict_interpreter.Launch("copy_kernel", (4, 1, 1), 400, 400, 0)]


@pytest.mark.parametrize("shift, limit, lane", [(0, 101, 100), (1, 100, 100), (-1, 100, -1)])
def test_load_past_either_end(shift, limit, lane):
    storage = torch.zeros(300)
    with pytest.raises(OutOfBounds, match=rf"copy_kernel, program .*load of argument 'x'.*element {lane} "):
        copy_kernel[(4,)](storage[100:200], torch.empty(100), 100, shift, limit, 32)


def test_store_without_mask():
    with pytest.raises(OutOfBounds, match="program \\(3, 0, 0\\) of grid .*store of argument 'y'.*28 of 32 lanes"):
        copy_kernel[(4,)](torch.zeros(128), torch.empty(100), 128, 0, 128, 32)


def test_overrun_into_another_argument():
    storage = torch.zeros(64)
    with pytest.raises(OutOfBounds, match="'x'"):  # x[32:] is y, also a legal argument
        copy_kernel[(1,)](storage[:32], storage[32:], 32, 32, 32, 32)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:6, :5],
        lambda t: t[2:8, 3:8],
        lambda t: t.t()[:6, :5],
        lambda t: t[1:7, ::3],
        lambda t: t[::4, :5],
        lambda t: t[0, :5].expand(6, 5),
        lambda t: t.as_strided((6, 5), (2, 1), 7),
    ],
)
def test_views_have_exactly_their_elements(view):
    x = view(torch.randn(32, 20))
    M, N = x.shape
    y = torch.full((M, N), float("nan"))
    with strict_interpreter.record() as launches:
        copy2d(x, y, M, N)
    assert torch.equal(x, y)
    assert launches[0].bytes_read == 4 * len({a * x.stride(0) + b * x.stride(1) for a in range(M) for b in range(N)})


def test_reach_of_sizes_and_strides_against_enumeration():
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        rank = int(torch.randint(0, 5, (1,), generator=random))
        size = torch.randint(1, 5, (rank,), generator=random).tolist()
        stride = torch.randint(0, 12, (rank,), generator=random).tolist()
        argument = Argument("x", None, 0, 4, tuple(size), tuple(stride))
        reached = {sum(map(operator.mul, i, stride)) for i in itertools.product(*map(range, size))}
        offsets = np.arange(-5, max(reached) + 6)
        assert argument.extent == max(reached) + 1
        assert offsets[argument.reaches(offsets)].tolist() == sorted(reached), (size, stride)


def test_gap_between_the_rows_of_a_slice():
    base = torch.zeros(4, 8)
    with pytest.raises(OutOfBounds, match=r"size \(4, 4\), stride \(8, 1\)"):
        copy_kernel[(1,)](base[:, :4], torch.empty(8), 8, 0, 8, 8)
    with pytest.raises(OutOfBounds, match="store of argument 'y'"):
        copy_kernel[(1,)](torch.empty(8), base[:, :4], 8, 0, 8, 8)


def test_pointer_that_is_no_argument():
    @triton.jit
    def kernel(y, address):
        tl.store(y, tl.load(address.to(tl.pointer_type(tl.float32))))

    with pytest.raises(OutOfBounds, match="no tensor argument"):
        kernel[(1,)](torch.empty(1), torch.zeros(1).data_ptr())


def test_tuple_arguments_are_named():
    @triton.jit
    def kernel(pair, n):
        tl.store(pair[1] + n, tl.load(pair[0]))

    x, y = torch.ones(1), torch.zeros(3)
    kernel[(1,)]((x, y), 2)
    assert y.tolist() == [0, 0, 1]
    with pytest.raises(OutOfBounds, match=r"'pair\[1\]'"):
        kernel[(1,)]((x, y), 3)


# ---------------------------------------------------------------- poison


@pytest.mark.parametrize("dtype", FLOATS + [torch.int32, torch.int64, torch.int8, torch.uint8])
def test_masked_lanes_without_other_are_poisoned(dtype):
    @triton.jit
    def kernel(x, y):
        offs = tl.arange(0, 8)
        tl.store(y + offs, tl.load(x + offs, mask=offs < 5))

    x, y = torch.ones(5, dtype=dtype), torch.zeros(8, dtype=dtype)
    kernel[(1,)](x, y)
    assert torch.equal(y[:5], x)
    assert y[5:].isnan().all() if dtype.is_floating_point else (y[5:].abs() > 100).all()


def test_vector_and_scalar_comparisons_make_a_mask():
    @triton.jit
    def kernel(x, y, n):
        offs = tl.arange(0, 8)
        tl.store(y + offs, tl.load(x + offs), mask=(offs < 5) & (n < 3))
        tl.store(y + offs, (offs < 5) & (n < 3), mask=(offs >= 5) & (n >= 3))

    y = torch.zeros(8)
    kernel[(1,)](torch.ones(8), y, 2)
    assert y.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_missing_other_shows_in_a_sum():
    @triton.jit
    def kernel(x, y, GUARD: tl.constexpr):
        offs = tl.arange(0, 8)
        v = tl.load(x + offs, mask=offs < 5, other=0.0) if GUARD else tl.load(x + offs, mask=offs < 5)
        tl.store(y, tl.sum(v, 0))

    y = torch.zeros(1)
    kernel[(1,)](torch.ones(5), y, True)
    assert y.item() == 5
    kernel[(1,)](torch.ones(5), y, False)
    assert y.isnan().all()


def test_fresh_memory_is_poisoned_and_the_state_comes_back():
    state = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with strict_interpreter.poisoned_memory():
        y = torch.empty(40)
        assert torch.empty_like(y).isnan().all() and y.new_empty(3).isnan().all()
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()
        copy_kernel[(1,)](torch.ones(40), y, 32, 0, 32, 32)  # planted: one program too few
        with pytest.raises(KeyError), strict_interpreter.poisoned_memory():
            raise KeyError
    assert (y[:32] == 1).all() and y[32:].isnan().all()
    assert state == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


# ---------------------------------------------------------------- races


@triton.jit
def accumulate_kernel(x, y, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    v = tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(y, v)
    else:
        tl.store(y, tl.load(y) + v)


def test_accumulation_without_atomics_is_a_race():
    x, y = torch.ones(64), torch.zeros(1)
    with strict_interpreter.record() as launches:
        accumulate_kernel[(4,)](x, y, True, 16)
        accumulate_kernel[(1,)](x, y, False, 16)
    assert y.item() == 80
    assert [(launch.bytes_read, launch.bytes_written) for launch in launches] == [(260, 4), (68, 4)]
    with pytest.raises(Race, match=r"program \(1, 0, 0\).*load of argument 'y'.*element 0.*program \(0, 0, 0\) stored"):
        accumulate_kernel[(4,)](x, y, False, 16)


@triton.jit
def shift_kernel(x, y, step):
    pid = tl.program_id(0)
    tl.store(y + pid, tl.load(x + pid + step))


def test_in_place_is_fine_and_reading_a_neighbour_is_not():
    x = torch.arange(8.0)
    with strict_interpreter.record() as launches:
        shift_kernel[(4,)](x, x, 0)
    assert (launches[0].bytes_read, launches[0].bytes_written) == (16, 16)
    with pytest.raises(Race, match=r"program \(1, 0, 0\).*store of argument 'y'.*index \(1,\).*\(0, 0, 0\) loaded it"):
        shift_kernel[(4,)](x, x, 1)  # 0 read what 1 then overwrites
    with pytest.raises(Race, match=r"program \(1, 0, 0\).*load of argument 'x'.*element 1 .*\(0, 0, 0\) stored it"):
        shift_kernel[(4,)](x[:4], x[1:5], 0)  # 1 reads what 0 wrote, through another view


@triton.jit
def read_by_all_kernel(x, y, WRITER: tl.constexpr):
    pid = tl.program_id(0)
    v = tl.load(x)
    if pid == WRITER:
        tl.store(x, v + 1)
    tl.store(y + pid, v)


def test_a_writer_among_many_readers():
    read_by_all_kernel[(4,)](torch.zeros(1), torch.zeros(4), -1)
    for writer in range(4):  # the last one had been the last reader of what it writes
        with pytest.raises(Race):
            read_by_all_kernel[(4,)](torch.zeros(1), torch.zeros(4), writer)
    with pytest.raises(Race, match="several programs loaded it"):
        read_by_all_kernel[(4,)](torch.zeros(1), torch.zeros(4), 3)


@triton.jit
def store_rows_kernel(y, stride, programs, BLOCK: tl.constexpr):
    rows = tl.program_id(0) % programs
    tl.store(y + rows * BLOCK + tl.arange(0, BLOCK) * stride, tl.arange(0, BLOCK).to(tl.float32))


def test_overlapping_stores():
    store_rows_kernel[(3,)](torch.zeros(24), 1, 3, 8)
    with pytest.raises(Race, match="two lanes of one store"):
        store_rows_kernel[(1,)](torch.zeros(24), 0, 3, 8)
    with pytest.raises(Race, match=r"program \(2, 0, 0\).*program \(0, 0, 0\) stored it"):
        store_rows_kernel[(3,)](torch.zeros(24), 1, 2, 8)
    with pytest.raises(Race, match="two lanes of one store"):
        copy2d(torch.zeros(4, 4), torch.zeros(4).expand(4, 4), 4, 4)


@triton.jit
def turns_kernel(y, FIRST: tl.constexpr, SECOND: tl.constexpr):
    what = FIRST if tl.program_id(0) == 0 else SECOND
    if what == "load":
        tl.load(y)
    elif what == "store":
        tl.store(y, 1.0)
    else:
        tl.atomic_add(y, 1.0)


@pytest.mark.parametrize("first", ["load", "store", "atomic"])
@pytest.mark.parametrize("second", ["load", "store", "atomic"])
def test_two_programs_on_one_element(first, second):
    turns_kernel[(1,)](torch.zeros(1), first, second)
    if first == second != "store":
        turns_kernel[(3,)](torch.zeros(1), first, second)
    else:
        with pytest.raises(Race, match=rf"program \(1, 0, 0\).*{second} of argument 'y'.*\(0, 0, 0\) .*{first[:4]}"):
            turns_kernel[(2,)](torch.zeros(1), first, second)


# ---------------------------------------------------------------- sizes


def test_more_than_2_31_elements_are_kept_sparsely():
    storage = torch.empty(2**31 + 4096, dtype=torch.int8)  # committed only where it is touched

    @triton.jit
    def kernel(x, far, last):
        offs = tl.program_id(0).to(tl.int64) * far + tl.arange(0, 16)
        tl.store(x + offs, tl.load(x + offs) * 0 + 7)
        tl.load(x + last)

    with strict_interpreter.record() as launches:
        kernel[(2,)](storage, 2**31, 100)
    assert storage[2**31 : 2**31 + 16].eq(7).all()
    assert (launches[0].bytes_read, launches[0].bytes_written) == (33, 32)
    with pytest.raises(OutOfBounds):
        kernel[(2,)](storage, 2**31 + 4090, 100)
    with pytest.raises(Race):
        kernel[(2,)](storage, 8, 100)


def test_sparse_and_dense_records_agree(monkeypatch):
    def play(region):
        random = torch.Generator().manual_seed(1)
        events = []
        for _ in range(200):
            kind = ["load", "store", "atomic"][int(torch.randint(0, 20, (1,), generator=random)) // 9]
            units = torch.randint(0, 50_000, (8,), generator=random).numpy()
            events.append(region.touch(kind, 4096 + 4 * units, 4, int(torch.randint(1, 4, (1,), generator=random))))
        return events, region.bytes_touched("load"), region.bytes_touched("store")

    dense = Region(4096, 4096 + 200_000, 4)
    monkeypatch.setattr("strict_interpreter.memory.DENSE_LIMIT", 1000)
    sparse = Region(4096, 4096 + 200_000, 4)
    assert dense._pages is None and sparse._pages is not None
    played = play(dense)
    assert played == play(sparse) and any(played[0])


def test_grids():
    x, y = torch.zeros(0), torch.zeros(0)
    with strict_interpreter.record() as launches:
        copy_kernel[(0,)](x, y, 0, 0, 0, 32)
        copy_kernel[lambda meta: (1, 1)](x, y, 0, 0, 0, 32)
    assert [(launch.grid, launch.bytes_read) for launch in launches] == [((0, 1, 1), 0), ((1, 1, 1), 0)]
    for grid in ((1, 65_536), (1, 1, 65_536), (2**31,)):
        with pytest.raises(GridTooLarge, match="copy_kernel: (65536|2147483648) programs on grid axis"):
            copy_kernel[grid](x, y, 0, 0, 0, 32)


# ---------------------------------------------------------------- tensor descriptors


@triton.jit
def host_descriptor_kernel(x, y, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    y.store([m, n], x.load([m, n]) * 2)


@triton.jit
def device_descriptor_kernel(x, y, M, N, stride, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[M, N], strides=[stride, 1], block_shape=[BM, BN])
    target = tl.make_tensor_descriptor(y, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    target.store([m, n], source.load([m, n]) + source.load([m + 1_000, n]) + source.load([m, n]))


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descriptors_clip_pad_count_and_check(kind, dtype):
    M, N = 21, 40
    x, y = torch.randn(M, 64).to(dtype)[:, :N], torch.empty(M, N, dtype=dtype)

    def call(x, rows):
        if kind == "host":
            source = TensorDescriptor(x, [rows, N], list(x.stride()), [8, 16])
            host_descriptor_kernel[(3, 3)](source, TensorDescriptor.from_tensor(y, [8, 16]), 8, 16)
        else:
            device_descriptor_kernel[(3, 3)](x, y, rows, N, x.stride(0), 8, 16)

    with strict_interpreter.record() as launches:
        call(x, M)
    assert torch.equal(y, x * 2)
    size = M * N * x.element_size()
    assert (launches[0].bytes_read, launches[0].bytes_written) == (size, size)
    with pytest.raises(OutOfBounds, match="'x'"):
        call(x[: M - 2], M)


def test_descriptors_pad_with_nan_and_race():
    @triton.jit
    def kernel(x, y):
        tl.store(y + tl.arange(0, 16), x.load([8]))

    y = torch.zeros(16, dtype=torch.bfloat16)
    x = torch.ones(16, dtype=torch.bfloat16)
    kernel[(1,)](TensorDescriptor(x, [16], [1], [16], padding="nan"), y)
    assert (y[:8] == 1).all() and y[8:].isnan().all()
    z = torch.zeros(16, 16)
    with pytest.raises(Race, match="'y'"):
        host_descriptor_kernel[(2, 2)](*[TensorDescriptor.from_tensor(t, [16, 16]) for t in (z + 1, z)], 0, 0)


# ---------------------------------------------------------------- installation


def run_python(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_importing_changes_nothing_and_installing_twice_is_once():
    ran = run_python(
        "import os, sys, strict_interpreter as s\n"
        "assert 'triton' not in sys.modules and 'TRITON_INTERPRET' not in os.environ\n"
        "s.install(); from triton.runtime import interpreter as i; before = dict(vars(i)); s.install()\n"
        "assert dict(vars(i)) == before and os.environ['TRITON_INTERPRET'] == '1'\n"
    )
    assert ran.returncode == 0, ran.stderr


def test_installing_too_late_says_so():
    ran = run_python("import triton, strict_interpreter as s; s.install()")
    assert "RuntimeError: strict_interpreter.install() came too late: triton imported" in ran.stderr
    assert "conftest.py" in ran.stderr


def test_other_triton_versions_are_refused(monkeypatch):
    monkeypatch.setattr(strict_interpreter, "_installed", False)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    with pytest.raises(RuntimeError, match="patches private parts of triton 3.9.0, found 3.6.0"):
        strict_interpreter.install()


def test_kernels_decorated_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    @triton.jit
    def compiled(x):
        tl.store(x, 1.0)

    with pytest.raises(RuntimeError, match=r"kernel .*compiled was decorated while TRITON_INTERPRET was not 1"):
        compiled[(1,)](torch.zeros(1))


@triton.jit
def helper(x):
    return tl.load(x + 9)


def test_errors_of_helpers_and_other_errors():
    @triton.jit
    def kernel(x, BAD: tl.constexpr):
        if BAD:
            tl.device_assert(tl.load(x) > 0, "x must be positive")
        else:
            helper(x)

    with pytest.raises(OutOfBounds, match="'x'") as error:  # not wrapped, also two functions down
        kernel[(1,)](torch.zeros(3), False)
    assert isinstance(error.value, StrictError) and isinstance(error.value, AssertionError)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="x must be positive"):
        kernel[(1,)](torch.zeros(3), True)


def test_threads_take_turns():
    results = [torch.zeros(256) for _ in range(4)]
    sources = [torch.full((256,), float(i)) for i in range(4)]

    def work(i):
        copy_kernel[(8,)](sources[i], results[i], 256, 0, 256, 32)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(sources, results, strict=True))
