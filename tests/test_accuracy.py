"""The accuracy rule lets right kernels pass, in any order of summation, and is not blunt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from accuracy import GRADIENT_FACTOR, reference
from blocks import make_block, make_x, run, run_exact
from test_backward import exact_gradients, gradients

from mixer_kernels.accuracy import FORWARD_FACTOR, why_inaccurate
from mixer_kernels.shapes import MixerShape

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import accuracy_by_chance

SHAPES = (
    MixerShape(S=1, C=1, D_S=1, D_C=1),
    MixerShape(S=7, C=5, D_S=3, D_C=9),
    MixerShape(S=49, C=64, D_S=32, D_C=96),
)


def inputs(shape, dtype, mean=0.0):
    return make_block(shape, dtype, "cpu"), make_x(2, shape, dtype, "cpu", mean=mean)


@pytest.mark.parametrize("seed", range(3))
def test_another_order_of_summation_passes(seed):
    missed = {name: why for name, why in accuracy_by_chance.comparisons(seed).items() if why is not None}
    assert not missed


def test_pytorchs_own_gelu_passes_where_another_evaluation_was_lucky():
    """One element at a time, as few as there are in a small result: on CPUs with AVX2 its errors come and go."""
    missed = []
    for z in torch.linspace(-4, 4, 161):
        exact = reference(lambda z=z: nnf.gelu(z.double()[None]), torch.float32)
        ours, lucky = nnf.gelu(z.expand(16).clone())[:1], exact.value.float()
        missed += [
            why for factor in (FORWARD_FACTOR, GRADIENT_FACTOR) if (why := why_inaccurate(ours, lucky, exact, factor))
        ]
    assert not missed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_error_of_1e_4_fails(shape):
    block, x = inputs(shape, torch.float32)
    eager = run(block, x, "torch")
    assert why_inaccurate(eager, eager, run_exact(block, x)) is None
    assert why_inaccurate(eager * (1 + 1e-4), eager, run_exact(block, x)) is not None


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_an_error_of_1e_4_in_any_gradient_fails(shape):
    """Where there is more than one of everything: of one element LayerNorm's gradient is zero and its rounding."""
    block, x = inputs(shape, torch.float32)
    dy = torch.randn_like(x)
    eager, exact = gradients(block, x, dy, "torch"), exact_gradients(block, x, dy)
    for name, gradient in eager.items():
        assert why_inaccurate(gradient, gradient, exact[name], GRADIENT_FACTOR) is None
        assert why_inaccurate(gradient * (1 + 1e-4), gradient, exact[name], GRADIENT_FACTOR) is not None, name


def test_one_wrong_element_fails():
    """Half a percent of one bfloat16 output among thousands is two roundings; four percent is none."""
    block, x = inputs(SHAPES[2], torch.bfloat16)
    eager = run(block, x, "torch")
    wrong = eager.clone()
    wrong[1, 3, 5] += 0.04 * eager.abs().max()
    assert why_inaccurate(wrong, eager, run_exact(block, x)) is not None


@pytest.mark.parametrize("mean", (10.0, 30.0))
def test_a_variance_of_squares_fails(mean):
    """E[x^2] - E[x]^2 in float32 cancels where the mean is far from zero."""
    x = torch.randn(4, 49, 64) + mean

    def norm(x):
        return nnf.layer_norm(x, (64,))

    mu = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mu.square()
    actual = (x - mu) * (variance + 1e-5).rsqrt()
    exact = reference(lambda: norm(x.double()), torch.float32)
    assert why_inaccurate(norm(x), norm(x), exact) is None
    assert why_inaccurate(actual, norm(x), exact) is not None


def test_a_sum_of_unrounded_folded_weights_fails():
    """LayerNorm folded into a bfloat16 product: wg has to sum the rounded W'."""
    channels = 256
    x = (torch.randn(2, 17, channels) + 30).to(torch.bfloat16)
    gamma, w = 1 + 0.3 * torch.randn(channels), torch.randn(64, channels) * channels**-0.5
    gamma, w = gamma.to(torch.bfloat16), w.to(torch.bfloat16)

    def product(x, gamma, w):
        return nnf.linear(nnf.layer_norm(x, (channels,), gamma, None), w)

    folded = w.float() * gamma.float()
    mean = x.float().mean(-1, keepdim=True)
    rstd = (x.float().var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()

    def with_sum(wg):
        return (rstd * (x.float() @ folded.bfloat16().float().T - mean * wg)).bfloat16()

    exact = reference(lambda: product(x.double(), gamma.double(), w.double()), torch.bfloat16)
    eager = product(x, gamma, w)
    assert why_inaccurate(with_sum(folded.bfloat16().float().sum(1)), eager, exact) is None
    assert why_inaccurate(with_sum(folded.sum(1)), eager, exact) is not None
