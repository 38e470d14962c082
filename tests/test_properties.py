"""Hypothesis drives the combinations: shapes, strides, dtypes, options, targets; the accuracy rule holds for all."""

from __future__ import annotations

import contextlib

import pytest
import torch
from accuracy import assert_accurate, assert_all_accurate
from blocks import LAYOUTS, PRODUCTS, make_block, make_x, run, run_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_backward import exact_gradients, gradients

import mixer_kernels.functional as F
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS, assume_target

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def products_of(backend, dtype, device):
    """Where ``backend`` has no products in ``dtype``, they are bfloat16 under autocast, and the stream is ``dtype``."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype not in PRODUCTS[backend])


def on(target, backend, device):
    """Kernels as for ``target`` on the CPU; CUDA kernels are for NVIDIA's."""
    if device == "cuda" or (backend == "cuda" and not KNOWN_TARGETS[target].is_nvidia):
        return contextlib.nullcontext()
    return assume_target(KNOWN_TARGETS[target])


EXTENTS = st.one_of(st.integers(1, 70), st.sampled_from((15, 16, 17, 31, 32, 33, 63, 64, 65, 96)))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, 3),
    tokens=st.one_of(EXTENTS, st.sampled_from((127, 128, 129, 208, 209, 256, 257))),
    channels=EXTENTS,
    token_hidden=EXTENTS,
    channel_hidden=EXTENTS,
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    layout=st.sampled_from(LAYOUTS),
    approximate=st.sampled_from(F.APPROXIMATIONS),
    affine=st.booleans(),
    bias=st.booleans(),
    mean=st.sampled_from((0.0, 1.0, 10.0)),
    eps=st.sampled_from((1e-6, 1e-5, 1e-2)),
    target=st.sampled_from(sorted(KNOWN_TARGETS)),
    seed=st.integers(0, 2**16),
)
def test_any_block_matches_eager(
    batch_size, tokens, channels, token_hidden, channel_hidden, dtype, layout, approximate, affine, bias, mean, eps,
    target, seed, backend, device,
):  # fmt: skip
    torch.manual_seed(seed)
    shape = MixerShape(S=tokens, C=channels, D_S=token_hidden, D_C=channel_hidden)
    block = make_block(shape, dtype, device, affine=affine, bias=bias)
    x = make_x(batch_size, shape, dtype, device, layout, mean)
    options = {"eps": eps, "approximate": approximate}
    with products_of(backend, dtype, device):
        with on(target, backend, device):
            actual = run(block, x, backend, **options)
        eager = run(block, x, "torch", **options)
    assert_accurate(actual, eager, run_exact(block, x, **options))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(2, 3),
    tokens=st.one_of(st.integers(2, 70), st.sampled_from((129, 209, 257))),
    channels=st.integers(8, 70),
    token_hidden=st.integers(2, 66),
    channel_hidden=st.integers(2, 66),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    layout=st.sampled_from(LAYOUTS),
    approximate=st.sampled_from(F.APPROXIMATIONS),
    affine=st.booleans(),
    bias=st.booleans(),
    memory=st.sampled_from(F.MEMORY_MODES),
    target=st.sampled_from(sorted(KNOWN_TARGETS)),
    seed=st.integers(0, 2**16),
)
def test_any_gradient_matches_eager(
    batch_size, tokens, channels, token_hidden, channel_hidden, dtype, layout, approximate, affine, bias, memory,
    target, seed, backend, device,
):  # fmt: skip
    torch.manual_seed(seed)
    shape = MixerShape(S=tokens, C=channels, D_S=token_hidden, D_C=channel_hidden)
    block = make_block(shape, dtype, device, affine=affine, bias=bias)
    x = make_x(batch_size, shape, dtype, device, layout)
    dy = torch.randn(x.shape, device=device).to(dtype)
    with products_of(backend, dtype, device):
        with on(target, backend, device):
            actual = gradients(block, x, dy, backend, approximate=approximate, memory=memory)
        eager = gradients(block, x, dy, "torch", approximate=approximate)
    assert_all_accurate(actual, eager, exact_gradients(block, x, dy, approximate=approximate))
