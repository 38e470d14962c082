"""A model after fuse_, in all that people do with one: it computes what it computed, fused or by its own code."""

from __future__ import annotations

import copy
import logging
import pickle
import sys

import pytest
import torch
from accuracy import GRADIENT_FACTOR, assert_accurate, reference
from small_mixer import assert_same, count_calls, images, make_model, run
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import nn
from torch.distributed.fsdp import fully_shard

from mixer_kernels import fuse_, unfuse_, words
from mixer_kernels.adapters.timm import FusedMixerBlock

pytestmark = pytest.mark.usefixtures("through_functional")


@pytest.fixture
def model() -> MlpMixer:
    return make_model()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    return count_calls(monkeypatch)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, as if this test were the first of the process."""
    words._warn.cache_clear()
    caplog.set_level(logging.WARNING, "mixer_kernels")
    return caplog


def test_hooks_on_a_block_keep_working(model, calls) -> None:
    x = images()
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 2)
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.blocks[2].register_full_backward_hook(lambda module, *gradients: seen.append(module))
    expected = run(model, x)
    assert len(fuse_(model)) == 3
    assert_same(expected, run(model, x))
    assert len(calls) == 3 and seen == [model.blocks[2]] * 2
    unfuse_(model)
    assert_same(expected, run(model, x))


def test_what_is_changed_later_is_computed_as_changed(model, calls, said) -> None:
    fuse_(model)
    twin = copy.deepcopy(unfuse_and_return(copy.deepcopy(model)))
    x = images()
    for m in (model, twin):
        m.blocks[0].mlp_tokens.act = nn.Tanh()
        m.blocks[1].norm1.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same(run(twin, x), run(model, x))
    assert len(calls) == 1
    messages = [r.getMessage() for r in said.records if "eagerly" in r.getMessage()]
    assert len(messages) == 2 and all(message.startswith("MixerBlock: computing eagerly") for message in messages)


def unfuse_and_return(model: nn.Module) -> nn.Module:
    unfuse_(model)
    return model


@pytest.mark.parametrize("options", [{"proj_drop_rate": 0.3}, {"drop_path_rate": 0.4}], ids=["dropout", "drop path"])
def test_training_noise_is_timms(options, calls) -> None:
    model = make_model(**options)
    x = images(8)
    expected = run(model, x)
    assert len(fuse_(model)) == 3
    assert_same(expected, run(model, x))
    assert len(calls) == 3 and {call["dropout_p"] + call["drop_path_p"] for call in calls} == {max(options.values())}
    assert not torch.equal(model.eval()(x), expected[0])


def test_noise_that_the_kernels_do_not_have_is_said(calls) -> None:
    model = make_model(drop_path_rate=0.4)
    for block in model.blocks:
        block.drop_path.scale_by_keep = False
    x = images(8)
    expected = run(model, x)
    report = fuse_(model)
    assert "but not in this mode: stochastic depth does not rescale" in report.fused[0].detail
    assert_same(expected, run(model, x))
    assert not calls
    model.eval()(x)
    assert len(calls) == 3


def test_autocast(model, calls) -> None:
    x = images()
    wide = copy.deepcopy(model).double()
    exact = reference(lambda: run(wide, x.double()), x.dtype, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model, x)
        fuse_(model)
        fused = run(model, x)
    assert len(calls) == 3
    for results in zip(fused, eager, exact, strict=True):
        assert_accurate(*results, GRADIENT_FACTOR)


def test_norms_in_another_dtype_are_computed_as_before(model, calls) -> None:
    model.to(torch.bfloat16)
    for block in model.blocks:
        block.norm1.float(), block.norm2.float()
    x = images().bfloat16()
    with torch.no_grad():
        expected = model(x)
        fuse_(model)
        assert torch.equal(model(x), expected)
    assert not calls


def test_gradient_checkpointing(model, calls) -> None:
    model.set_grad_checkpointing()
    x = images()
    expected = run(model, x)
    fuse_(model)
    assert_same(expected, run(model, x))
    assert len(calls) == 6


def test_shared_parameters_and_shared_blocks(calls) -> None:
    model = make_model()
    model.blocks[1].mlp_tokens = model.blocks[0].mlp_tokens
    model.blocks[1].mlp_channels.fc1.weight = model.blocks[0].mlp_channels.fc1.weight
    model.blocks[1].norm2 = model.blocks[1].norm1
    model.blocks.append(model.blocks[0])
    x = images()
    expected = run(model, x)
    assert len(fuse_(model)) == 3
    assert_same(expected, run(model, x))
    assert len(calls) == 4


def test_copies_are_fused_and_independent(model, calls) -> None:
    fuse_(model, memory="min")
    x = images()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(twin(x), expected)
        assert [call["memory"] for call in calls] == ["min"] * 3
        assert len(unfuse_(twin)) == 3
        assert torch.equal(twin(x), expected) and len(calls) == 3
    assert type(model.blocks[0]) is FusedMixerBlock


def test_a_pickle_imports_what_it_needs(monkeypatch) -> None:
    block = MixerBlock(8, 4)
    fuse_(block)
    data = pickle.dumps(block)
    monkeypatch.delitem(sys.modules, FusedMixerBlock.__module__)
    loaded = pickle.loads(data)
    assert type(loaded) is not MixerBlock and type(loaded).__module__ == FusedMixerBlock.__module__
    assert len(unfuse_(loaded)) == 1 and type(loaded) is MixerBlock


def test_weights_travel(model) -> None:
    other = make_model()
    fuse_(other)
    other.load_state_dict(model.state_dict(), strict=True)
    x = images()
    assert torch.equal(other(x), model(x))
    model.load_state_dict(copy.deepcopy(make_model()).state_dict() | other.state_dict(), strict=True)
    other.to(torch.float64)
    assert other(x.double()).dtype is torch.float64


def test_training_steps_are_the_same() -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # made first: fuse_ keeps its parameters
        if fused:
            fuse_(model)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(images()).square().mean().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    assert_same(*results)


def test_inference_follows_the_weights(device) -> None:
    """After a change in place; test_weights_are_never_stale.py has the changes that PyTorch does not count."""
    model = make_model().to(device).eval()
    reference = copy.deepcopy(model)
    fuse_(model, backend="triton")
    x = images().to(device)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), reference(x))
            for m in (model, reference):
                m.blocks[0].mlp_tokens.fc1.weight.mul_(2)


def test_compiles_in_one_graph() -> None:
    model = make_model(num_blocks=1).double()
    fuse_(model)
    x = images().double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-12, atol=1e-12)
    assert [entry.name for entry in fuse_(compiled).fused] == ["_orig_mod.blocks.0"]
    unfuse_(model)  # and compiles again
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("fused_first", [True, False])
def test_ddp(fused_first, model) -> None:
    model.double()
    x = images().double()
    expected = run(model, x)
    if fused_first:
        fuse_(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert [entry.name for entry in fuse_(wrapped).fused] == [f"module.blocks.{i}" for i in range(3)]
    y = wrapped(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double())
    torch.testing.assert_close(
        [parameter.grad for parameter in model.parameters()], expected[2:], rtol=1e-12, atol=1e-12
    )


@pytest.mark.usefixtures("process_group")
def test_fsdp2_shards_fused_blocks(model, calls) -> None:
    model.double()
    x = images().double()
    expected, plain = model(x), copy.deepcopy(model)
    first = fuse_(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in (*model.blocks, *plain.blocks):
        fully_shard(block, mesh=mesh)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3 and fuse_(model) == first
    assert [entry.block for entry in unfuse_(model).left] == ["MixerBlock"] * 3
    assert not fuse_(plain)
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)


def test_functional_call_and_vmap(model) -> None:
    """Ensembles: stacked weights of two models, by torch.func."""
    fuse_(model)
    other = make_model()
    stacked = {
        name: torch.stack((a.detach(), b.detach()))
        for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True)
    }
    x = images()
    with torch.no_grad():
        both = torch.vmap(lambda weights: torch.func.functional_call(model, weights, x))(stacked)
        torch.testing.assert_close(both, torch.stack((model(x), other(x))))
