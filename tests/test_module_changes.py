"""FusedMixerBlock with parts that somebody has changed: hooks, parametrizations, other layers. It is timm's still."""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers
import torch
from test_modules import DIM, SEQ_LEN, tokens_for, twins
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from mixer_kernels import FusedMixerBlock
from mixer_kernels.coverage import why_not_fused

pytestmark = pytest.mark.usefixtures("through_functional")

PARTS = ["norm1", "mlp_tokens", "mlp_tokens.fc1", "mlp_tokens.act", "mlp_tokens.drop1", "drop_path", "norm2",
         "mlp_channels.norm", "mlp_channels.fc2", "mlp_channels.drop2"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_parts_fire(part: str, said) -> None:
    theirs, ours = twins()
    x = tokens_for(ours)
    for block in (theirs, ours):
        block.get_submodule(part).register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(ours(x), theirs(x))
    assert len(said) == 1 and "hooks" in said[0]


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_every_kind_of_hook_fires(register: str) -> None:
    _, block = twins()
    fired = []
    handle = getattr(block.mlp_channels.fc1, register)(lambda *_: fired.append(register))
    block(tokens_for(block).requires_grad_()).sum().backward()
    assert fired == [register]
    handle.remove()
    assert why_not_fused(block) is None


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_kind_of_global_hook_fires(kind: str) -> None:
    _, block = twins()
    seen = []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(type(module)))
    try:
        block(tokens_for(block).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4
    assert why_not_fused(block) is None


def test_hooks_on_the_block_itself_keep_it_fused() -> None:
    _, block = twins()
    block.register_forward_hook(lambda module, inputs, output: output * 2)
    assert why_not_fused(block) is None


def test_parametrized_and_pruned_weights_are_used() -> None:
    theirs, ours = twins()
    x = tokens_for(ours)
    for block in (theirs, ours):
        parametrize.register_parametrization(block.mlp_tokens.fc1, "weight", nn.Tanh())
        prune.l1_unstructured(block.mlp_channels.fc2, "weight", amount=0.5)
    assert torch.equal(ours(x), theirs(x))
    assert "ParametrizedLinear" in why_not_fused(ours)


def test_a_replaced_forward_is_used() -> None:
    theirs, ours = twins()
    x = tokens_for(ours)
    for block in (theirs, ours):
        block.norm2.forward = torch.tanh
    assert torch.equal(ours(x), theirs(x))
    assert "replaced forward" in why_not_fused(ours)


def test_what_else_is_not_fused() -> None:
    def reason(change, **config) -> str | None:
        block = FusedMixerBlock(DIM, SEQ_LEN, **config)
        change(block)
        return why_not_fused(block)

    assert reason(lambda block: None) is None
    assert reason(lambda block: setattr(block.mlp_tokens, "drop1", nn.Identity())) is None
    assert "Conv2d" in reason(lambda block: None, mlp_layer=partial(timm.layers.Mlp, use_conv=True))
    assert "different forms" in reason(lambda block: setattr(block.mlp_tokens, "act", nn.GELU(approximate="tanh")))
    assert "AlphaDropout" in reason(lambda block: setattr(block.mlp_tokens, "drop1", nn.AlphaDropout()))
    assert "drop_path is Dropout" in reason(lambda block: setattr(block, "drop_path", nn.Dropout(0.1)))
    assert "(10, 24)" in reason(lambda block: setattr(block, "norm2", nn.LayerNorm((SEQ_LEN, DIM))))
    weight = TwoTensor(torch.randn(12, SEQ_LEN), torch.randn(12, SEQ_LEN))
    assert "subclass" in reason(lambda block: setattr(block.mlp_tokens.fc1, "weight", nn.Parameter(weight)))


def test_timms_fast_norm_is_not_the_plain_one() -> None:
    timm.layers.set_fast_norm(True)
    try:
        block = FusedMixerBlock(DIM, SEQ_LEN, norm_layer=timm.layers.LayerNorm)
    finally:
        timm.layers.set_fast_norm(False)
    assert "LayerNorm" in why_not_fused(block)
