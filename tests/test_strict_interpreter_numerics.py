"""The strict interpreter's numbers: bfloat16, float16 and TF32 round where the hardware does, integers may not wrap."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import strict_interpreter
import torch
from strict_interpreter import Int32Overflow, OutOfBounds, bfloat16

if torch.cuda.is_available():
    pytest.skip("with a GPU this process compiles its kernels", allow_module_level=True)
strict_interpreter.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

HALVES = [torch.float16, torch.bfloat16]


# ---------------------------------------------------------------- 16-bit numbers


@triton.jit
def arithmetic_kernel(x, y, out, flags, N: tl.constexpr):
    offs = tl.arange(0, N)
    a, b = tl.load(x + offs), tl.load(y + offs)
    tl.store(out + offs, a + b)
    tl.store(out + N + offs, a * b)
    tl.store(out + 2 * N + offs, a - b)
    tl.store(out + 3 * N + offs, a / b)
    tl.store(out + 4 * N + offs, -a)
    tl.store(out + 5 * N + offs, tl.where(a > b, a, b))
    tl.store(out + 6 * N + offs, tl.maximum(a, b))
    tl.store(out + 7 * N + offs, tl.minimum(a, 0.5))
    tl.store(out + 8 * N + offs, tl.abs(a))
    tl.store(out + 9 * N + offs, tl.fma(a, b, a))
    tl.store(out + 10 * N + offs, tl.clamp(a, -0.5, 0.5))
    tl.store(out + 11 * N + offs, a * 0.3 + 1)
    tl.store(flags + offs, ((a <= b) & (offs < N - 1) & (a != b)).to(tl.int32))


@pytest.mark.parametrize("dtype", HALVES)
def test_elementwise_arithmetic_equals_torch(dtype):
    N = 256
    x, y = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
    x[0], y[1], x[2] = float("nan"), float("inf"), float("-inf")
    out, flags = torch.empty(12, N, dtype=dtype), torch.empty(N, dtype=torch.int32)
    arithmetic_kernel[(1,)](x, y, out, flags, N)
    scale = torch.tensor(0.3).to(dtype)
    fused = (x.double() * y.double() + x.double()).to(dtype)
    want = [x + y, x * y, x - y, x / y, -x, torch.where(x > y, x, y), torch.fmax(x, y)]
    want += [torch.fmin(x, torch.tensor(0.5).to(dtype)), x.abs(), fused, x.clamp(-0.5, 0.5), x * scale + 1]
    want[10][0] = -0.5  # tl.clamp without propagate_nan
    for row, (got, right) in enumerate(zip(out, want, strict=True)):
        torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True, msg=lambda m, r=row: f"row {r}: {m}")
    assert torch.equal(flags.bool(), (x <= y) & (x != y) & (torch.arange(N) < N - 1))


@triton.jit
def cast_kernel(x, y, N: tl.constexpr, ROUNDING: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y + offs, tl.load(x + offs).to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def signed_bias(got, x):
    return ((got.double() - x.double()) / x.double()).mean().item()


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_casts_to_bfloat16_round_to_nearest_even(source):
    x = (torch.rand(4096) * 2000 + 1).to(source)
    y, back = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096, dtype=source)
    cast_kernel[(1,)](x, y, 4096, None)
    assert torch.equal(y, x.bfloat16())
    cast_kernel[(1,)](y, back, 4096, None)
    assert torch.equal(back, y.to(source))


def test_every_nan_stays_one():
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000], np.uint32).view(np.float32)
    assert np.isnan(bfloat16.decode(bfloat16.encode(payloads))).all()  # rounding up would carry into the sign


def test_truncation_shows_as_bias():
    x = torch.rand(4096) + 1
    # NaN, infinity, overflow, two ties, a subnormal
    x[:6] = torch.tensor([float("nan"), float("inf"), 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40])
    rounded, truncated = torch.empty(2, 4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, rounded, 4096, "rtne")
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    cast_kernel[(1,)](x, truncated, 4096, "rtz")  # the planted bug
    assert abs(signed_bias(rounded[6:], x[6:])) < 1e-4
    assert signed_bias(truncated[6:], x[6:]) < -1e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_sums_round_at_every_step(dtype):
    @triton.jit
    def kernel(x, out, N: tl.constexpr):
        offs = tl.arange(0, N)
        v = tl.load(x + offs)
        tl.store(out, tl.sum(v, 0))
        tl.store(out + 1, tl.sum(v.to(tl.float32), 0))
        tl.store(out + 2, tl.max(v, 0))
        tl.store(out + 3, tl.min(v, 0))
        tl.store(out + 4 + offs, tl.cumsum(v, 0))

    x = (torch.rand(64) + 1).to(dtype)
    out = torch.empty(68, dtype=dtype)
    kernel[(1,)](x, out, 64)
    tree = x
    while tree.numel() > 1:
        tree = tree[::2] + tree[1::2]
    running = [x[:1]]
    for v in x[1:]:
        running.append(running[-1] + v)
    want = torch.stack([tree[0], x.float().sum().to(dtype), x.max(), x.min(), *torch.cat(running)])
    assert torch.equal(out, want)


@triton.jit
def welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    delta = mean_b - mean_a
    return mean_a + delta * (n_b / n), m2_a + m2_b + delta * delta * (n_a * n_b / n), n


def test_reductions_over_tuples_with_a_combine_function():
    @triton.jit
    def kernel(x, out, N: tl.constexpr):
        offs = tl.arange(0, 8)[:, None] * N + tl.arange(0, N)[None, :]
        v = tl.load(x + offs)
        mean, m2, n = tl.reduce((v, v * 0, v * 0 + 1), 1, welford)
        best, where = tl.max(v, 1, return_indices=True)
        rows = tl.arange(0, 8)
        tl.store(out + rows, mean)
        tl.store(out + 8 + rows, m2 / n)
        tl.store(out + 16 + rows, where.to(tl.float32))
        tl.store(out + 24, tl.sum(v))

    x, out = torch.randn(8, 64) + 100, torch.empty(25)
    kernel[(1,)](x, out, 64)
    var, mean = torch.var_mean(x.double(), 1, correction=0)
    want = torch.cat([mean, var, x.argmax(1).double(), x.double().sum()[None]]).float()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_shape_operations_keep_bfloat16():
    @triton.jit
    def kernel(x, out, N: tl.constexpr):
        offs = tl.arange(0, N)
        v = tl.load(x + offs[:, None] * N + offs[None, :])
        v = tl.trans(v)
        low, high = tl.split(tl.reshape(v, (N, N // 2, 2)))
        both = tl.permute(tl.join(low, high), (0, 2, 1))
        both = tl.reshape(both, (N, N)) + tl.broadcast_to(tl.load(x + offs)[None, :], (N, N))
        tl.store(out + offs[:, None] * N + offs[None, :], both)

    x, out = torch.randn(16, 16).bfloat16(), torch.empty(16, 16).bfloat16()
    kernel[(1,)](x, out, 16)
    assert torch.equal(out, x.t().reshape(16, 8, 2).permute(0, 2, 1).reshape(16, 16) + x[0])


def test_float32_functions_among_bfloat16_neighbours():
    @triton.jit
    def kernel(x, out, N: tl.constexpr):
        offs = tl.arange(0, N)
        v = tl.load(x + offs).to(tl.float32)
        tl.store(out + offs, tl.erf(v))
        tl.store(out + N + offs, tl.exp(v))
        tl.store(out + 2 * N + offs, tl.rsqrt(v))
        tl.store(out + 3 * N + offs, tl.sigmoid(v))
        tl.store(out + 4 * N + offs, tl.sqrt_rn(v))
        tl.store(out + 5 * N + offs, tl.log(v))
        tl.store(out + 6 * N + offs, tl.softmax(v))

    x, out = torch.rand(64).bfloat16() + 0.1, torch.empty(7, 64)
    kernel[(1,)](x, out, 64)
    v = x.double()
    want = [torch.erf(v), v.exp(), v.rsqrt(), v.sigmoid(), v.sqrt(), v.log(), v.softmax(0)]
    torch.testing.assert_close(out, torch.stack(want).float(), rtol=1e-6, atol=1e-7)


def test_nan_and_overflow_are_silent_data():
    @triton.jit
    def kernel(x, out):
        offs = tl.arange(0, 4)
        v = tl.load(x + offs)
        tl.store(out + offs, tl.exp(v) + tl.sqrt(v) + tl.max(v, 0) / v)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = torch.empty(4)
        kernel[(1,)](torch.tensor([1e6, -1.0, float("nan"), 0.0]), out)
        kernel[(1,)](torch.full((4,), float("nan")), out)
    assert out.isnan().all()


# ---------------------------------------------------------------- products


@triton.jit
def matmul_kernel(a, b, c, M, N, K, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(b + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def matmul(a, b, precision=None, out_dtype=torch.float32):
    (M, K), N = a.shape, b.shape[0]
    c = torch.empty(M, N, dtype=out_dtype)
    matmul_kernel[(triton.cdiv(M, 32), triton.cdiv(N, 32))](a, b, c, M, N, K, precision, 32, 32, 16)
    return c


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_exact_and_accumulate_in_float32(dtype):
    a, b = torch.randn(70, 100).to(dtype), torch.randn(45, 100).to(dtype)
    with strict_interpreter.poisoned_memory(), strict_interpreter.record() as launches:
        c = matmul(a, b)
    right = a.double() @ b.double().t()
    assert (c - right).abs().max() < 1e-5  # products rounded to 16 bits would be off by 1e-2
    assert torch.equal(matmul(a, b, out_dtype=dtype), c.to(dtype))
    padded = 2 * (3 * 32) * (2 * 32) * (7 * 16)
    assert launches == [strict_interpreter.Launch("matmul_kernel", (3, 2, 1), 2 * 100 * (70 + 45), 4 * 70 * 45, padded)]


def test_precision_of_float32_products():
    a, b = torch.randn(33, 64), torch.randn(40, 64)
    right = a.double() @ b.double().t()
    errors = {p: (matmul(a, b, p) - right).abs().max().item() for p in ("ieee", "tf32x3", "tf32", None)}
    assert errors["ieee"] < 1e-5 and errors["tf32x3"] < 1e-5
    assert 1e-3 < errors["tf32"] < 3e-2
    assert errors[None] == errors["tf32"]  # Triton's default: asked for nothing, not IEEE


# ---------------------------------------------------------------- integers


@triton.jit
def far_row_kernel(x, y, row, stride, WIDE: tl.constexpr):
    r = row.to(tl.int64) if WIDE else row
    tl.store(y, tl.load(x + r * stride))


def test_int32_offset_wraps():
    x = torch.zeros(1).expand(70_000, 65_536)
    with pytest.raises(Int32Overflow, match=r"far_row_kernel, program.*mul\(65536, 65536\) is 4294967296"):
        far_row_kernel[(1,)](x, torch.zeros(1), 65_536, 65_536, False)
    with pytest.raises(OutOfBounds, match="element 4294967296"):
        far_row_kernel[(1,)](x, torch.zeros(1), 65_536, 65_536, True)


@pytest.mark.parametrize("BUILTIN", [True, False])
@pytest.mark.parametrize("WIDE", [True, False])
def test_loop_counters_are_int32(WIDE, BUILTIN):
    @triton.jit
    def kernel(y, start, WIDE: tl.constexpr, BUILTIN: tl.constexpr):
        if BUILTIN:
            for i in range(start, start + 2):
                row = i.to(tl.int64) if WIDE else i
                tl.store(y + (row * 100_000 - 3_000_000_000), 1.0)
        else:
            for i in tl.range(start, start + 2, flatten=True, warp_specialize=False):
                row = i.to(tl.int64) if WIDE else i
                tl.store(y + (row * 100_000 - 3_000_000_000), 1.0)
        for k in tl.static_range(2):
            tl.store(y + 200_000 + k, 2.0)

    y = torch.zeros(200_002)
    if WIDE:
        kernel[(1,)](y, 30_000, WIDE, BUILTIN)
        assert y.nonzero().ravel().tolist() == [0, 100_000, 200_000, 200_001]
    else:
        with pytest.raises(Int32Overflow, match="int32 overflow: mul"):
            kernel[(1,)](y, 30_000, WIDE, BUILTIN)


def test_random_bits_may_wrap():
    @triton.jit
    def kernel(out, N: tl.constexpr):
        tl.store(out + tl.arange(0, N), tl.rand(1234567, tl.arange(0, N)))

    out = torch.empty(1024)
    kernel[(1,)](out, 1024)
    assert 0.4 < out.mean() < 0.6 and out.unique().numel() > 1000
