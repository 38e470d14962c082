"""Dropout in ``gated_mixing``: its masks are read off a call, and plain PyTorch is given the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from accuracy import assert_all_accurate, reference
from test_relatives_patchtsmixer import MIXERS, each_mixer, make

import mixer_kernels.functional as F

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

SHAPE = (1, 9, 10, 20)  # batch, channels, patches, features
SEED, P = 11, 0.3


def run(mixer, x, parameters, p=P, backend="triton"):
    axis, gate_first = MIXERS[mixer]
    torch.manual_seed(SEED)
    return F.gated_mixing(x, **parameters, axis=axis, gate_first=gate_first, dropout_p=p, backend=backend)


def branch(mixer, parameters, shape, device):
    """What the kernel adds to x, the mixed axis last; without a gate."""
    no_gate = dict.fromkeys(("w_gate", "b_gate"))
    with torch.no_grad():
        y = run(mixer, torch.zeros(shape, device=device), {**parameters, **no_gate})
    return y.movedim(MIXERS[mixer][0], -1)


def masks_of(mixer, shape, device):
    """The factors of the hidden units and of fc2's output under ``SEED``: 0 or 1 / (1 - p)."""
    _, parameters = make(mixer, shape, torch.float32, device)
    plain = {k: torch.zeros_like(t) for k, t in parameters.items()}
    hidden = plain["b1"].numel()
    # fc2's bias alone: the output's mask.
    of_output = branch(mixer, {**plain, "b2": torch.ones_like(plain["b2"])}, shape, device)
    # fc1's bias alone, and one hidden unit at a time in all outputs, of which one at least is kept.
    unit = torch.nn.functional.gelu(torch.ones(())).item()
    of_hidden = []
    for d in range(hidden):
        w2 = plain["w2"].clone()
        w2[:, d] = 1 / unit
        both = branch(mixer, {**plain, "b1": torch.ones_like(plain["b1"]), "w2": w2}, shape, device)
        of_hidden.append(both.amax(-1) * (1 - P))
    assert (of_output.amax(-1) > 0).all(), "a row whose outputs are all dropped shows no hidden unit: another seed"
    return torch.stack(of_hidden, -1), of_output


def with_masks(mixer, x, p, hidden_mask, output_mask):
    axis, gate_first = MIXERS[mixer]

    def gate(v):
        return v * nnf.softmax(nnf.linear(v, p["w_gate"], p["b_gate"]), -1)

    v = nnf.layer_norm(x, x.shape[-1:], p["gamma"], p["beta"], 1e-5).movedim(axis, -1)
    v = gate(v) if gate_first else v
    a = nnf.gelu(nnf.linear(v, p["w1"], p["b1"])) * hidden_mask.to(x.dtype)
    v = nnf.linear(a, p["w2"], p["b2"]) * output_mask.to(x.dtype)
    return x + (v if gate_first else gate(v)).movedim(-1, axis)


def gradients(function, x, parameters, dy):
    leaves = {k: t.detach().requires_grad_() for k, t in {"x": x, **parameters}.items()}
    named = dict(leaves)
    y = function(named.pop("x"), named)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each_mixer
def test_forward_and_backward_have_the_same_masks(mixer, dtype, device):
    masks = masks_of(mixer, SHAPE, device)
    x, parameters = make(mixer, SHAPE, dtype, device)
    dy = torch.randn_like(x)
    ours = gradients(lambda x, p: run(mixer, x, p), x, parameters, dy)
    eager = gradients(lambda x, p: with_masks(mixer, x, p, *masks), x, parameters, dy)
    # A mask's 1 / (1 - p) is float32's, so that the exact result has its rounding too.
    wide = {k: t.double() for k, t in parameters.items()}
    exact = reference(
        lambda: gradients(lambda x, p: with_masks(mixer, x, p, *masks), x.double(), wide, dy.double()), dtype
    )
    assert_all_accurate(ours, eager, exact)


@each_mixer
def test_masks_are_independent_and_as_full_as_they_should_be(mixer, device):
    for mask in masks_of(mixer, SHAPE, device):
        kept = mask > 0.1
        torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - P)), rtol=1e-5, atol=0)
        spread = 5 * (P * (1 - P) / kept.numel()) ** 0.5
        assert abs(kept.float().mean().item() - (1 - P)) < spread
        rows = kept.flatten(0, -2)
        assert len(rows.unique(dim=0)) > len(rows) / 2  # of 2^9 and more that there could be


@each_mixer
def test_probability_zero_is_exact_and_one_is_the_input(mixer, device):
    x, parameters = make(mixer, SHAPE, torch.float32, device)
    with torch.no_grad():
        axis, gate_first = MIXERS[mixer]
        plain = F.gated_mixing(x, **parameters, axis=axis, gate_first=gate_first, backend="triton")
        assert torch.equal(run(mixer, x, parameters, 0.0), plain)
        for backend in ("triton", "torch"):
            assert torch.equal(run(mixer, x, parameters, 1.0, backend), x)


def test_a_seed_repeats_and_the_next_call_does_not(device):
    x, parameters = make("patches", SHAPE, torch.float32, device)
    with torch.no_grad():
        first = run("patches", x, parameters)
        following = F.gated_mixing(x, **parameters, axis=-2, dropout_p=P, backend="triton")
        assert torch.equal(run("patches", x, parameters), first)
        assert not torch.equal(following, first)
