"""A block repeats its last call in inference without asking all again, and never with what is no longer so."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_cpu_auto import needs_kernels as needs_cpu_kernels
from test_direct import swapped, transposed_in_place, written
from torch import nn

from mixer_kernels import FusedMixerBlock, freeze_, functional, fuse_, unfreeze_, unfuse_, use_backend

__all__ = ["needs_cpu_kernels"]  # a fixture that every test here uses
pytestmark = pytest.mark.usefixtures("metadata_read")


def mixer_block() -> tuple[nn.Module, torch.Tensor]:
    return FusedMixerBlock(16, 16, mlp_ratio=(1.0, 1.0), drop=0.5, dtype=torch.bfloat16), torch.randn(
        2, 16, 16, dtype=torch.bfloat16
    )


def time_series_layer(mode: str = "common_channel") -> tuple[nn.Module, torch.Tensor]:
    from transformers import PatchTSMixerConfig
    from transformers.models.patchtsmixer.modeling_patchtsmixer import PatchTSMixerLayer

    config = PatchTSMixerConfig(
        context_length=32, patch_length=4, patch_stride=4, d_model=8, expansion_factor=1, mode=mode
    )
    config.num_patches, config.num_input_channels, config.gated_attn, config.dropout = 8, 3, True, 0.5
    layer = PatchTSMixerLayer(config)
    fuse_(layer)
    return layer, torch.randn(2, 3, 8, 8)


@pytest.fixture(params=["cuda", "cpu"])
def case(request):
    """A block in evaluation mode, its input, its backend."""
    torch.manual_seed(0)
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
    block, x = mixer_block() if request.param == "cuda" else time_series_layer()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad(), use_backend(request.param):
        yield block.eval(), x, request.param


def linear(block: nn.Module) -> nn.Linear:
    return block.mlp_tokens.fc1 if hasattr(block, "mlp_tokens") else block.patch_mixer.mlp.fc1


def norm(block: nn.Module) -> nn.LayerNorm:
    return block.norm1 if hasattr(block, "norm1") else block.patch_mixer.norm.norm


def asked(monkeypatch) -> list[str]:
    """Names of the functions of ``functional`` that are called from now on."""
    names = []
    for name in ("mixer_block", "gated_mixer_layer"):
        original = getattr(functional, name)

        def counted(*args, name=name, original=original, **kwargs):
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(functional, name, counted)
    return names


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_call_is_repeated(case, frozen, monkeypatch):
    block, x, _ = case
    expected = block(x)
    if frozen:
        assert freeze_(block).frozen
        assert torch.equal(block(x), expected)
    names = asked(monkeypatch)
    assert torch.equal(block(x), expected) and torch.equal(block(x.clone()), expected)
    assert not torch.equal(block(x + 1), expected)
    assert names == []
    block(x[:1])
    assert len(names) == 1


def replaced(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p * -1.5)


CHANGES = {
    "eps": lambda block: setattr(norm(block), "eps", 3.0),
    "another parameter": lambda block: setattr(linear(block), "weight", replaced(linear(block).weight)),
    "no bias": lambda block: setattr(linear(block), "bias", None),
    "another norm": lambda block: norm(block).register_parameter("weight", replaced(norm(block).weight)),
    "a hook": lambda block: linear(block).register_forward_hook(lambda module, inputs, y: 2 * y),
    "a forward": lambda block: setattr(
        linear(block), "forward", lambda v: v.sum(-1, keepdim=True) * linear(block).bias
    ),
} | {
    write.__name__: lambda block, write=write: [write(p) for p in block.parameters()]
    for write in (written, swapped, transposed_in_place)
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen(case, change):
    block, x, _ = case
    before = block(x)
    assert torch.equal(block(x), before)
    change(block)
    after = block(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(block)(x))


def test_the_mode_is_seen(case):
    block, x, _ = case
    before = block(x)
    assert torch.equal(block(x), before)
    block.train()
    assert not torch.equal(block(x), before) and not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), before)


def test_gradients_and_another_backend_are_seen(case):
    block, x, _ = case
    before = block(x)
    with torch.enable_grad():
        y = block(x)
    assert y.requires_grad and torch.equal(y, before)
    with use_backend("torch"):
        assert not torch.equal(block(x), before)
    assert torch.equal(block(x), before)


def test_what_is_frozen_is_watched(case):
    """Also behind calls from before it was."""
    block, x, _ = case
    for _ in range(2):
        before = block(x)
    freeze_(block)
    for _ in range(2):
        assert torch.equal(block(x), before)
    linear(block).weight.mul_(2)
    with pytest.raises(RuntimeError, match="is frozen, but its .*fc1.weight was written to"):
        block(x)
    unfreeze_(block)
    assert not torch.equal(block(x), before)


def test_copies_and_pickles_are_on_their_own(case):
    block, x, _ = case
    before = block(x)
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert torch.equal(again(x), before)
    other = copy.deepcopy(block)
    linear(other).weight.mul_(2)
    assert not torch.equal(other(x), before) and torch.equal(block(x), before)


def test_a_block_goes_without_the_garbage_collector(case):
    block, x, _ = case
    for _ in range(2):
        block(x)
    assert block._last is not None
    alone = copy.deepcopy(block)
    for _ in range(2):
        alone(x)
    gone = weakref.ref(alone)
    gc.disable()
    try:
        del alone
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_left_of_it():
    layer, x = time_series_layer()
    attributes = set(layer.eval().__dict__)
    with torch.no_grad():
        layer(x)
        assert layer.__dict__["_last"] is not None
    unfuse_(layer)
    assert set(layer.__dict__) <= attributes
