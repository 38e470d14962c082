"""GELU on the chip, equations (4) and (9) of docs/maths.md, swept over its whole range."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from mixer_kernels.backends.arguments import Options
from mixer_kernels.backends.triton.activation import activation_of


def gelu(tanh: bool, exact: bool):
    """As kernels take it: float32 products have the exact form."""
    dtype = torch.float32 if exact else torch.bfloat16
    return activation_of(Options(dtype, approximate="tanh" if tanh else "none"))


@triton.jit
def _gelu_kernel(z_ptr, a_ptr, n, BLOCK: tl.constexpr, ACT: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < n, other=0.0)
    tl.store(a_ptr + offs, ACT(z), mask=offs < n)


def run_gelu(z: torch.Tensor, tanh: bool, exact: bool) -> torch.Tensor:
    a = torch.empty_like(z)
    _gelu_kernel[(triton.cdiv(z.numel(), 4096),)](z, a, z.numel(), BLOCK=4096, ACT=gelu(tanh, exact).function)
    return a


def sweep(device: str) -> torch.Tensor:
    """Every size of argument: dense around zero, both tails, up to float16's range."""
    tails = torch.logspace(-6, 4.8, 2000)
    return torch.cat([torch.linspace(-13, 13, 40001), tails, -tails]).to(device)


def test_fit_to_erf(device):
    z = sweep(device)
    exact = torch.nn.functional.gelu(z.double())
    error = (run_gelu(z, tanh=False, exact=False).double() - exact).abs()
    # the fit, and float32's rounding of what is nearly z
    assert (error <= 3.1e-6 + 2.4e-7 * z.abs().double()).all()


@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_exact_forms(approximate, device):
    z = sweep(device)
    exact = torch.nn.functional.gelu(z.double(), approximate=approximate)
    eager = torch.nn.functional.gelu(z, approximate=approximate)
    actual = run_gelu(z, tanh=approximate == "tanh", exact=True)
    worst = (eager.double() - exact).abs().max()
    assert (actual.double() - exact).abs().max() <= 2 * worst


def test_negative_tail_is_not_cancelled(device):
    """1 + tanh(u) is 0 or a multiple of 2^-24 for z < -5; the sigmoid form keeps its digits."""
    z = torch.linspace(-6, -4, 200, device=device)
    exact = torch.nn.functional.gelu(z.double(), approximate="tanh")
    actual = run_gelu(z, tanh=True, exact=False).double()
    assert ((actual - exact).abs() / exact.abs()).max() < 1e-4


@pytest.mark.parametrize(("tanh", "exact"), ((False, False), (False, True), (True, True)))
def test_ends_of_the_range(tanh, exact, device):
    """z * Phi(z) as float32 has it: -inf * 0 is NaN, as in PyTorch; nothing finite overflows."""
    z = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0e38, -3.0e38, 0.0], device=device)
    expected = torch.tensor([float("inf"), float("nan"), float("nan"), 3.0e38, 0.0, 0.0], device=device)
    assert torch.equal(run_gelu(z, tanh, exact).nan_to_num(7.0), expected.nan_to_num(7.0))


@triton.jit
def _slope_kernel(z_ptr, a_ptr, slope_ptr, n, BLOCK: tl.constexpr, SLOPE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < n, other=0.0)
    a, slope = SLOPE(z)
    tl.store(a_ptr + offs, a, mask=offs < n)
    tl.store(slope_ptr + offs, slope, mask=offs < n)


@pytest.mark.parametrize(("tanh", "exact"), ((False, False), (False, True), (True, True)))
def test_slope(tanh, exact, device):
    """Equation (13): against autograd in float64, over the whole range."""
    z = sweep(device)
    a, slope = torch.empty_like(z), torch.empty_like(z)
    _slope_kernel[(triton.cdiv(z.numel(), 4096),)](
        z, a, slope, z.numel(), BLOCK=4096, SLOPE=gelu(tanh, exact).and_slope
    )
    leaf = z.double().requires_grad_()
    value = torch.nn.functional.gelu(leaf, approximate="tanh" if tanh else "none")
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    assert (slope.double() - expected).abs().max() < (2.5e-6 if exact else 7e-6)
    torch.testing.assert_close(a, value.detach().float(), rtol=2e-6, atol=1e-6 if exact else 3.2e-6)
