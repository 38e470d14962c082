"""Prepacked weights: made once, remade whenever a parameter changed, gone with it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from blocks import finest, make_block, make_x, run

import mixer_kernels
from mixer_kernels.backends import prepack
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)


@pytest.fixture
def backend():
    """The one that keeps packs; for cuda's, made in every call, see test_cuda_packs.py."""
    return "triton"


@pytest.fixture
def block(device):
    return make_block(SHAPE, torch.bfloat16, device)


@pytest.fixture
def x(device):
    return make_x(2, SHAPE, torch.bfloat16, device)


def fresh(block, x, backend):
    """The block on parameters that no pack was ever made of."""
    return run(copy.deepcopy(block), x, backend)


def packs(block):
    """The packs of each parameter, by its name and their keys."""
    return {
        (name, key): pack for name, p in block.parameters.items() for key, pack in prepack._packs.get(p, {}).items()
    }


def test_packs_are_made_once(block, x, backend):
    run(block, x, backend)
    first = packs(block)
    assert {name for name, _ in first} == {"w1", "w3", "w4"}  # w1 and w2 are one pack
    run(block, x, backend)
    assert all(pack is first[key] for key, pack in packs(block).items())
    block.parameters["w2"].mul_(2)
    run(block, x, backend)
    assert {key[0] for key, pack in packs(block).items() if pack is not first[key]} == {"w1"}


@pytest.mark.parametrize("name", ("gamma2", "beta2", "w1", "b1", "w2", "b2", "w3", "b3", "w4"))
def test_in_place_change_is_seen(block, x, name, backend):
    before = run(block, x, backend)
    block.parameters[name].mul_(-2)
    after = run(block, x, backend)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(block, x, backend))


def test_change_through_a_view_is_seen(block, x, backend):
    run(block, x, backend)
    block.parameters["w1"][3].zero_()
    block.parameters["w3"].detach()[0].zero_()
    assert torch.equal(run(block, x, backend), fresh(block, x, backend))


@pytest.mark.parametrize("foreach", (True, False))
@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.AdamW))
def test_an_optimizer_step_is_seen(block, x, optimizer, foreach, backend):
    parameters = [torch.nn.Parameter(p) for p in block.parameters.values()]
    block.parameters.update(zip(block.parameters, parameters, strict=True))
    step = optimizer(parameters, lr=0.1, foreach=foreach)
    before = run(block, x, backend)
    for p in parameters:
        p.grad = torch.ones_like(p)
    step.step()
    after = run(block, x, backend)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(block, x, backend))


def test_new_storage_is_seen(block, x, backend):
    """What nn.Module.to() does: ``parameter.data = other``. The old storage may be reused by the next tensor."""
    parameter = torch.nn.Parameter(block.parameters["w1"], requires_grad=False)
    block.parameters["w1"] = parameter
    for factor in (1.0, 2.0, 3.0, 4.0):
        parameter.data = factor * parameter.detach()
        assert torch.equal(run(block, x, backend), fresh(block, x, backend))


def test_a_write_through_data_needs_forget_packs(block, x, backend):
    """``.data`` has a version counter of its own: the one change that cannot be seen."""
    before = run(block, x, backend)
    block.parameters["w1"].data.mul_(2)
    assert torch.equal(run(block, x, backend), before)
    mixer_kernels.forget_packs()
    assert torch.equal(run(block, x, backend), fresh(block, x, backend))


def test_inference_tensors_are_packed_anew(x, backend, device):
    """They have no version counter."""
    with torch.inference_mode():
        block = make_block(SHAPE, torch.bfloat16, device)
        run(block, x, backend)
        block.parameters["w1"].mul_(2)
        assert torch.equal(run(block, x, backend), fresh(block, x, backend))


def test_packs_made_in_inference_mode_serve_outside(block, x, backend):
    with torch.inference_mode():
        inside = run(block, x, backend)
    assert torch.equal(run(block, x, backend), inside)


def test_a_pack_goes_with_its_parameter(x, backend, device):
    """Also where the weight needs no packing and the pack is the weight itself."""
    shape = MixerShape(S=64, C=64, D_S=64, D_C=64)
    block, x = make_block(shape, torch.bfloat16, device), make_x(1, shape, torch.bfloat16, device)
    run(block, x, backend)
    references = [weakref.ref(block.parameters[name]) for name in ("w1", "w3", "w4")]
    assert len(prepack._packs) >= 3
    del block
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_one_parameter_in_two_dtypes(backend, device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(2, SHAPE, torch.float32, device)

    def run_in(dtype):
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            return run(block, x, backend)

    full, half = run_in(finest(backend)), run_in(torch.bfloat16)
    assert not torch.equal(full, half)
    assert torch.equal(run_in(finest(backend)), full)


def test_shared_weights_with_other_partners(x, backend, device):
    """One w1 in two blocks with different biases: each has its own result."""
    first, second = (make_block(SHAPE, torch.bfloat16, device) for _ in range(2))
    for name in ("w1", "w3"):
        second.parameters[name] = first.parameters[name]
    for _ in range(2):
        for block in (first, second):
            assert torch.equal(run(block, x, backend), fresh(block, x, backend))
