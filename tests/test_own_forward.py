"""Where the torch backend is chosen, a fused block runs its own forward, and nothing is asked of the block before."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from small_mixer import assert_same, images, make_model, run
from test_freeze import KINDS, example, kernels
from torch import nn

from mixer_kernels import FusedMixerBlock, backends, freeze_, functional, fuse_, unfreeze_, use_backend, words
from mixer_kernels.backends import registry

FUNCTIONS = [name for name in functional.__all__ if name.islower()]


@pytest.fixture
def no_functional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of the API fails, and "auto" takes PyTorch's operators for everything on the CPU."""

    def fail(*args, **kwargs):
        raise AssertionError("a block called the functional API")

    for name in FUNCTIONS:
        monkeypatch.setattr(functional, name, fail)
    monkeypatch.setattr(registry, "FASTER_ON_CPU", {})


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged during this test, as if it were the first of the process."""
    words._warn.cache_clear()
    caplog.set_level(logging.WARNING, "mixer_kernels")
    return caplog


@pytest.mark.usefixtures("no_functional")
@pytest.mark.parametrize("backend", [None, "auto", "torch"])
@pytest.mark.parametrize("kind", (*KINDS, "lucidrains", "patchtsmixer"))
def test_the_results_are_eagers(kind, backend) -> None:
    model, x = example(kind)
    output = (lambda y: y) if kind != "patchtsmixer" else (lambda y: y.last_hidden_state)
    fused = copy.deepcopy(model)
    assert fuse_(fused, backend=backend).fused
    for mode in (True, False):
        torch.manual_seed(3)
        expected = output(model.train(mode)(x))
        torch.manual_seed(3)
        assert torch.equal(output(fused.train(mode)(x)), expected)


@pytest.mark.usefixtures("no_functional")
@pytest.mark.parametrize("asked", ["", "auto", "torch"])
def test_the_environment_and_use_backend_choose_it(asked, monkeypatch) -> None:
    model, x = make_model(), images()
    expected = run(model, x)
    fuse_(model)
    monkeypatch.setenv("MIXER_KERNELS_BACKEND", asked)
    assert_same(expected, run(model, x))
    monkeypatch.setenv("MIXER_KERNELS_BACKEND", "triton")
    with pytest.raises(AssertionError, match="called the functional API"):
        model(x)
    with use_backend("torch"):
        assert_same(expected, run(model, x))
    monkeypatch.setenv("MIXER_KERNELS_BACKEND", "rocket")
    with pytest.raises(ValueError, match="MIXER_KERNELS_BACKEND must be one of .* got 'rocket'"):
        model(x)


@pytest.mark.usefixtures("no_functional")
def test_what_auto_means_decides_for_other_devices_and_dtypes(monkeypatch) -> None:
    """As on a GPU: products in float64 have no kernels, those of autocast may."""
    asked = []

    def choose(*args):
        asked.append(args)
        return "torch" if args[-1] is torch.float64 else "triton"

    monkeypatch.setattr(backends, "choose", choose)
    block = FusedMixerBlock(8, 4, device="meta", dtype=torch.float64)
    x = torch.randn(2, 4, 8, device="meta", dtype=torch.float64)
    assert block(x).shape == x.shape
    with pytest.raises(AssertionError, match="called the functional API"):
        block.float()(x.float())
    assert asked == [("auto", "meta", None, torch.float64), ("auto", "meta", None, torch.float32)]


def test_auto_says_once_why(logged) -> None:
    model = make_model()
    model.blocks[0].mlp_tokens.act = nn.ReLU()
    fuse_(model)
    model.blocks[1].mlp_tokens.act = nn.ReLU()
    block = FusedMixerBlock(8, 4)
    for _ in range(2):
        model(images())
        block(torch.randn(1, 4, 8))
    assert logged.messages == [
        "backend 'auto': running on 'torch', because on the CPU no kernels are known to be faster at this call"
    ]


@pytest.mark.usefixtures("no_functional")
def test_hooks_fire_and_parts_that_changed_are_used() -> None:
    block = FusedMixerBlock(8, 4).eval()
    seen = []
    block.mlp_tokens.fc1.register_forward_hook(lambda *_: seen.append(1))
    block.norm2 = nn.Identity()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        u = x + block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2)
        assert torch.equal(block(x), u + block.mlp_channels(u))
    assert len(seen) == 2


@pytest.mark.usefixtures("no_functional")
def test_a_layer_runs_its_mixers() -> None:
    """Each decides for itself: one that was given to kernels calls them."""
    model, x = example("patchtsmixer")
    expected = model.eval()(x).last_hidden_state
    fuse_(model)
    assert torch.equal(model(x).last_hidden_state, expected)
    fuse_(model.encoder.mlp_mixer_encoder.mixers[0].patch_mixer, backend="triton")
    with pytest.raises(AssertionError, match="called the functional API"):
        model(x)


def test_a_frozen_block_is_watched_still() -> None:
    model, x = make_model(num_blocks=1).bfloat16().eval(), images().bfloat16()
    fuse_(model)
    with use_backend("triton"):
        freeze_(model)
    expected, launched = kernels(model, x)
    assert not launched
    model.train()
    with pytest.raises(RuntimeError, match="'blocks.0' is frozen, but in training mode"):
        model(x)
    unfreeze_(model)
    assert torch.equal(kernels(model.eval(), x)[0], expected)


def test_exports_and_compiles_to_pytorchs_operators() -> None:
    model, x = make_model(num_blocks=1).eval(), images()
    fuse_(model)
    program = torch.export.export(model, (x,))
    assert "mixer_kernels" not in str(program.graph)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(program.module()(x), model(x))


def test_our_own_block_names_a_wrong_input() -> None:
    block = FusedMixerBlock(8, 4)
    with pytest.raises(ValueError, match="built for 4 tokens, x has 5"):
        block(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match=r"\(batch, tokens, channels\)"):
        block(torch.randn(2, 3, 4, 8))
