"""The ``cpu`` backend in the middle of PyTorch's machinery: right, or an error where eager PyTorch raises too."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from test_cpu_auto import needs_kernels as needs_cpu_kernels
from test_repeat import linear, time_series_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixer_kernels import freeze_, unfreeze_, unfuse_

__all__ = ["needs_cpu_kernels"]  # a fixture that every test here uses


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    return time_series_layer()[0].eval()


@pytest.fixture
def eager(layer) -> nn.Module:
    eager = copy.deepcopy(layer)
    unfuse_(eager)
    return eager


def x(batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, 8, 8)


def gradient(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Of x, where ``dy`` comes as it is, bits and all."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.register_hook(lambda _: dy)
    return torch.autograd.grad(y.sum(), x)[0]


def test_a_parameter_lives_until_its_call_is_over(layer):
    """Another thread may replace it, while the kernels read its memory."""
    with torch.no_grad():
        for _ in range(2):
            layer(one := x())
        last, alive = layer._last, []
        plan = last._plan

        def replaced_meanwhile(one):
            old = weakref.ref(linear(layer).weight)
            linear(layer).weight = nn.Parameter(linear(layer).weight.clone())
            alive.append(old() is not None)
            return plan(one)

        last._plan = replaced_meanwhile
        layer(one)
    assert alive == [True]


def test_what_is_replaced_is_let_go(layer):
    with torch.no_grad():
        layer(x())
        layer(x())
        old = weakref.ref(layer.patch_mixer.mlp.fc1)
        layer.patch_mixer.mlp.fc1 = nn.Sequential(nn.Linear(8, 8))
        layer(x())
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("mode", ["common_channel", "mix_channel"])
def test_a_reentrant_checkpoint_draws_the_same_masks(mode):
    layer, _ = time_series_layer(mode)
    outputs = []
    layer.train().register_forward_hook(lambda module, inputs, y: outputs.append(y.detach()))
    checkpoint(layer, x().requires_grad_(), use_reentrant=True).square().sum().backward()
    assert len(outputs) == 2 and torch.equal(*outputs)


@pytest.mark.parametrize("mode", ["common_channel", "mix_channel"])
def test_training_compiles_for_any_batch_in_one_graph(mode):
    layer, _ = time_series_layer(mode)
    layer.eval()  # without dropout, in grad mode
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch_size in (2, 3):
        one = x(batch_size).requires_grad_()
        torch.testing.assert_close(compiled(one), layer(one))


def test_saved_tensors_that_come_back_as_others_raise(layer):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
        y = layer(x().requires_grad_())
    with pytest.raises(RuntimeError, match="saved tensor hooks returned tensors of another dtype"):
        y.sum().backward()


def test_masks_survive_saved_tensors_in_float64():
    layer, one = time_series_layer()
    layer.train()
    through = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.dtype, t.double()), lambda kept: kept[1].to(kept[0])
    )

    def gradients():
        torch.manual_seed(3)
        return torch.autograd.grad(layer(one).sum(), list(layer.parameters()))

    with through:
        kept_wide = gradients()
    assert all(map(torch.equal, kept_wide, gradients()))


@pytest.mark.parametrize(
    "make", [torch._neg_view, lambda dy: torch._efficientzerotensor(dy.shape)], ids=["neg", "zero"]
)
def test_gradients_that_are_not_in_memory_as_they_are(make, layer, eager):
    one, dy = x(), make(x())
    torch.testing.assert_close(gradient(layer, one, dy), gradient(eager, one, dy))


def test_an_input_of_zeros_without_memory(layer, eager):
    zeros = torch._efficientzerotensor(2, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            layer(x())
        torch.testing.assert_close(layer(zeros), eager(zeros))


def test_a_write_is_seen_in_16_bits(layer, eager):
    """The kernels read a copy in float32, made in each call."""
    one = x().bfloat16()
    with torch.no_grad():
        for model in (layer, eager):
            model.bfloat16()(one), model(one)
            linear(model).weight.data.mul_(-3.0)
        torch.testing.assert_close(layer(one), eager(one), rtol=0.02, atol=0.02)
        freeze_(layer)
        torch.testing.assert_close(layer(one), eager(one), rtol=0.02, atol=0.02)


def test_a_freed_parameter_raises(layer):
    with torch.no_grad():
        layer(x())
        linear(layer).weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="has no memory: its storage was freed"):
            layer(x())


def test_freezing_is_no_matter_of_the_default_device(layer):
    one = x()
    with torch.no_grad():
        expected = layer(one)
        with torch.device("meta"):
            freeze_(layer)
        assert torch.equal(layer(one), expected)


def test_a_frozen_copy_with_other_parts_says_so(layer):
    with torch.no_grad():
        freeze_(layer)
        other = copy.deepcopy(layer)
        unfreeze_(other)
        replica = copy.copy(layer)
        replica._modules = dict(other._modules)
        with pytest.raises(RuntimeError, match="is frozen, but its patch_mixer was written to, replaced"):
            replica(x())
