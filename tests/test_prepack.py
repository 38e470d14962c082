"""Prepacked weights: made once, remade whenever a parameter changed, gone with it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from blocks import make_block, make_x, run

import mixer_kernels
from mixer_kernels.backends.triton import prepack
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)


@pytest.fixture
def block(device):
    return make_block(SHAPE, torch.bfloat16, device)


@pytest.fixture
def x(device):
    return make_x(2, SHAPE, torch.bfloat16, device)


def fresh(block, x):
    """The block on parameters that no pack was ever made of."""
    return run(copy.deepcopy(block), x, "triton")


def test_packs_are_made_once(block, x, monkeypatch):
    made = []
    padded = prepack._padded
    monkeypatch.setattr(prepack, "_padded", lambda *a: made.append(a) or padded(*a))
    run(block, x, "triton")
    assert len(made) == 4
    run(block, x, "triton")
    assert len(made) == 4
    block.parameters["w1"].mul_(2)
    run(block, x, "triton")
    assert len(made) == 6  # w1 and w2 are one pack


@pytest.mark.parametrize("name", ("gamma2", "beta2", "w1", "b1", "w2", "b2", "w3", "b3", "w4"))
def test_in_place_change_is_seen(block, x, name):
    before = run(block, x, "triton")
    block.parameters[name].mul_(-2)
    after = run(block, x, "triton")
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(block, x))


def test_change_through_a_view_is_seen(block, x):
    run(block, x, "triton")
    block.parameters["w1"][3].zero_()
    block.parameters["w3"].detach()[0].zero_()
    assert torch.equal(run(block, x, "triton"), fresh(block, x))


@pytest.mark.parametrize("foreach", (True, False))
@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.AdamW))
def test_an_optimizer_step_is_seen(block, x, optimizer, foreach):
    parameters = [torch.nn.Parameter(p) for p in block.parameters.values()]
    block.parameters.update(zip(block.parameters, parameters, strict=True))
    step = optimizer(parameters, lr=0.1, foreach=foreach)
    before = run(block, x, "triton")
    for p in parameters:
        p.grad = torch.ones_like(p)
    step.step()
    after = run(block, x, "triton")
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(block, x))


def test_new_storage_is_seen(block, x):
    """What nn.Module.to() does: ``parameter.data = other``. The old storage may be reused by the next tensor."""
    parameter = torch.nn.Parameter(block.parameters["w1"], requires_grad=False)
    block.parameters["w1"] = parameter
    for factor in (1.0, 2.0, 3.0, 4.0):
        parameter.data = factor * parameter.detach()
        assert torch.equal(run(block, x, "triton"), fresh(block, x))


def test_a_write_through_data_needs_forget_packs(block, x):
    """``.data`` has a version counter of its own: the one change that cannot be seen."""
    before = run(block, x, "triton")
    block.parameters["w1"].data.mul_(2)
    assert torch.equal(run(block, x, "triton"), before)
    mixer_kernels.forget_packs()
    assert torch.equal(run(block, x, "triton"), fresh(block, x))


def test_inference_tensors_are_packed_anew(x, device):
    """They have no version counter."""
    with torch.inference_mode():
        block = make_block(SHAPE, torch.bfloat16, device)
        run(block, x, "triton")
        block.parameters["w1"].mul_(2)
        assert torch.equal(run(block, x, "triton"), fresh(block, x))


def test_packs_made_in_inference_mode_serve_outside(block, x):
    with torch.inference_mode():
        inside = run(block, x, "triton")
    assert torch.equal(run(block, x, "triton"), inside)


def test_a_pack_goes_with_its_parameter(x, device):
    """Also where the weight needs no packing and the pack is the weight itself."""
    shape = MixerShape(S=64, C=64, D_S=64, D_C=64)
    block, x = make_block(shape, torch.bfloat16, device), make_x(1, shape, torch.bfloat16, device)
    run(block, x, "triton")
    references = [weakref.ref(block.parameters[name]) for name in ("w1", "w3", "w4")]
    assert len(prepack._packs) >= 3
    del block
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_one_parameter_in_two_dtypes(device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(2, SHAPE, torch.float32, device)
    full = run(block, x, "triton")
    with torch.autocast(device, torch.bfloat16):
        half = run(block, x, "triton")
    assert not torch.equal(full, half)
    assert torch.equal(run(block, x, "triton"), full)


def test_shared_weights_with_other_partners(x, device):
    """One w1 in two blocks with different biases: each has its own result."""
    first, second = (make_block(SHAPE, torch.bfloat16, device) for _ in range(2))
    for name in ("w1", "w3"):
        second.parameters[name] = first.parameters[name]
    for _ in range(2):
        for block in (first, second):
            assert torch.equal(run(block, x, "triton"), fresh(block, x))
