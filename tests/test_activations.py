"""Activations beside GELU: ReLU and SiLU, forward and backward, from functional to fuse_."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_all_accurate
from blocks import make_block, make_x
from test_backward import exact_gradients, gradients
from torch import nn

import mixer_kernels.functional as F
from mixer_kernels import FusedMixerBlock
from mixer_kernels.coverage import why_not_fused
from mixer_kernels.shapes import MixerShape

SHAPES = {"fused": MixerShape(S=20, C=24, D_S=16, D_C=32), "products": MixerShape(S=260, C=24, D_S=16, D_C=32)}
MODULES = {"relu": nn.ReLU, "silu": nn.SiLU}

each_activation = pytest.mark.parametrize("activation", MODULES)


@each_activation
@pytest.mark.parametrize("memory", F.MEMORY_MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_eager(shape, dtype, memory, activation, device):
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    dy = torch.randn_like(x)
    options = {"activation": activation, "memory": memory}
    actual = gradients(block, x, dy, "triton", **options)
    eager = gradients(block, x, dy, "torch", **options)
    assert_all_accurate(actual, eager, exact_gradients(block, x, dy, **options))


@each_activation
def test_nan_stays_and_zero_has_pytorchs_slope(activation, device):
    block, x = make_block(SHAPES["fused"], torch.float32, device), make_x(2, SHAPES["fused"], torch.float32, device)
    block.parameters["w1"].zero_()
    block.parameters["b1"].zero_()
    actual, eager = (
        gradients(block, x, torch.ones_like(x), backend, activation=activation)["b1"] for backend in ("triton", "torch")
    )
    torch.testing.assert_close(actual, eager, rtol=1e-5, atol=1e-5)
    x[1, 4, 7] = torch.nan
    with torch.no_grad():
        outputs = [F.mixer_block(x, **block.parameters, activation=activation, backend=b) for b in ("triton", "torch")]
    assert outputs[1].isnan().any() and outputs[1][0].isfinite().all()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5, equal_nan=True)


@each_activation
def test_a_block_is_fused(activation, device):
    block = FusedMixerBlock(24, 20, act_layer=MODULES[activation]).to(device)
    x = torch.randn(2, 20, 24, device=device)
    assert why_not_fused(block) is None
    plain = copy.deepcopy(block)
    plain.mlp_tokens.register_forward_hook(lambda *_: None)  # computes by its own modules
    assert why_not_fused(plain) is not None
    torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)


def test_two_activations_in_one_block_are_not_fused():
    block = FusedMixerBlock(24, 20)
    block.mlp_tokens.act = nn.ReLU()
    assert "different activations" in why_not_fused(block)


@each_activation
def test_the_cuda_backend_says_what_it_lacks(activation, cuda_kernels, device):
    block, x = make_block(SHAPES["fused"], torch.bfloat16, device), make_x(1, SHAPES["fused"], torch.bfloat16, device)
    with pytest.raises(RuntimeError, match=f"no kernels for activation='{activation}'.*backend='triton'"):
        F.mixer_block(x, **block.parameters, activation=activation, backend="cuda")
