"""fuse_ and unfuse_: what they change, what they leave, and that all of it can be undone.

What a fused model does afterwards is in tests/test_patch_later.py, what each kind of block computes in
tests/test_patch_models.py.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import timm.layers
import torch
from small_mixer import SMALL, assert_same, count_calls, images, make_model, run
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from mixer_kernels import FusedMixer, Report, fuse_, unfuse_, use_backend
from mixer_kernels.adapters.timm import FusedMixerBlock

pytestmark = pytest.mark.usefixtures("through_functional")


@pytest.fixture
def model() -> MlpMixer:
    return make_model()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    return count_calls(monkeypatch)


def state(model: nn.Module) -> list:
    """All that fuse_ must not change, by identity, and the classes and attributes that unfuse_ must bring back."""
    return [
        (
            name,
            type(module),
            {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, Tensor)},
            {key: id(value) for key, value in module._parameters.items()},
        )
        for name, module in model.named_modules()
    ]


# ------------------------------------------------------------------------------------------- what it does to a model


def test_blocks_run_through_the_kernels_and_nothing_else_changes(model, calls) -> None:
    x = images()
    expected = run(model, x)
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    report = fuse_(model)
    assert [entry.name for entry in report.fused] == ["blocks.0", "blocks.1", "blocks.2"]
    assert_same(expected, run(model, x))
    assert len(calls) == 3
    assert all(isinstance(block, MixerBlock) and type(block) is FusedMixerBlock for block in model.blocks)
    assert list(model.state_dict()) == keys
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))


def test_unfuse_restores_everything(model, calls) -> None:
    x = images()
    before, expected = state(model), run(model, x)
    fuse_(model, backend="torch", memory="min")
    run(model, x)
    calls.clear()
    report = unfuse_(model)
    assert len(report) == len(report.restored) == 3 and not report.fused and not report.left
    assert state(model) == before
    assert_same(expected, run(model, x))
    assert not calls
    assert not unfuse_(model) and state(model) == before


def test_idempotent_and_the_last_options_count(model, calls) -> None:
    first = fuse_(model, memory="min")
    assert fuse_(model, backend="torch") == first
    model(images())
    assert {(call["backend"], call["memory"]) for call in calls} == {("torch", "fast")}
    unfuse_(model)
    assert fuse_(model) == first


def test_options_reach_the_kernels(model, device) -> None:
    model.to(device)
    fuse_(model, backend="triton", memory="min")
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(images().to(device))
    assert (2 * 4, 96) not in shapes  # z, which memory="min" does not keep
    fuse_(model, backend="torch")
    with use_backend("triton"):
        model(images().to(device))  # the option wins


def test_a_part_and_a_block_itself(model, calls) -> None:
    assert [entry.name for entry in fuse_(model.blocks[1:])] == ["1", "2"]
    assert [entry.name for entry in fuse_(model.blocks[0])] == [""]
    model(images())
    assert len(calls) == 3
    assert len(unfuse_(model.blocks[2])) == 1
    assert type(model.blocks[2]) is MixerBlock and type(model.blocks[1]) is FusedMixerBlock


def test_wrong_arguments_are_named(model) -> None:
    with pytest.raises(TypeError, match="torch.nn.Module, got list"):
        fuse_([model])
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        unfuse_("model")
    with pytest.raises(ValueError, match="backend must be one of .*'auto'.* got 'tpu'"):
        fuse_(model, backend="tpu")
    with pytest.raises(ValueError, match="memory must be one of 'fast', 'min', got 'max'"):
        fuse_(model, memory="max")
    assert type(model.blocks[0]) is MixerBlock


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_reads_as_a_table_and_as_data(model) -> None:
    model.blocks[1].mlp_tokens.act = nn.Tanh()
    report = fuse_(model)
    assert str(report).splitlines() == [
        "blocks.[0,2]  2 x MixerBlock  fused  functional.mixer_block",
        "blocks.1      1 x MixerBlock  left   mlp_tokens has Tanh, not GELU, ReLU or SiLU",
        "2 fused, 1 left",
    ]
    assert report and len(report) == 2 and len(report.left) == 1
    assert json.loads(json.dumps(report.as_dicts()))[1] == {
        "name": "blocks.1", "block": "MixerBlock", "outcome": "left",
        "detail": "mlp_tokens has Tanh, not GELU, ReLU or SiLU",
    }  # fmt: skip
    assert str(unfuse_(model)).splitlines() == ["blocks.[0,2]  2 x MixerBlock  restored", "2 restored"]


def test_a_model_without_known_blocks() -> None:
    report = fuse_(nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    assert isinstance(report, Report) and not report and len(report) == 0 and list(report) == []
    assert "no block" in str(report)


def test_a_model_that_was_built_fused() -> None:
    report = fuse_(FusedMixer(**SMALL))
    assert len(report) == 0 and len(report.left) == 3
    assert "built to run through the kernels" in str(report)
    report = unfuse_(FusedMixer(**SMALL))
    assert not report and len(report.left) == 3
    assert "load its state_dict into timm's MlpMixer" in str(report)


# ----------------------------------------------------------------------------------------- left alone, with a reason


class OwnForward(MixerBlock):
    def forward(self, x):
        return super().forward(x) + 1


def change_dropout_class(block):
    block.mlp_tokens.drop1 = nn.AlphaDropout(0.1)


def hook(register, part, block):
    getattr(block.get_submodule(part), register)(lambda *_: None)


def replace_forward(block):
    block.forward = block.forward


def quantize(block):
    with torch.no_grad():
        block.mlp_channels = torch.ao.quantization.quantize_dynamic(block.mlp_channels, {nn.Linear})


def subclass_weight(block):
    weight = block.mlp_tokens.fc1.weight
    block.mlp_tokens.fc1.weight = nn.Parameter(TwoTensor(weight.detach(), weight.detach()))


# A change to a block, and a part of the reason. Each leaves the block computing something; unchanged by fuse_.
LEFT = {
    "norm": (lambda b: setattr(b, "norm1", nn.RMSNorm(24)), "norm1 is RMSNorm"),
    "norm without eps": (lambda b: setattr(b.norm2, "eps", 0.0), "norm2 has eps 0"),
    "activation": (lambda b: setattr(b.mlp_channels, "act", nn.Tanh()), "mlp_channels has Tanh"),
    "mlp": (lambda b: setattr(b, "mlp_channels", timm.layers.SwiGLU(24, 48)), "mlp_channels is SwiGLU"),
    "dropout": (change_dropout_class, "AlphaDropout"),
    "hook": (partial(hook, "register_forward_hook", "mlp_tokens.fc1"), "hooks"),
    "pre-hook": (partial(hook, "register_forward_pre_hook", "norm1"), "hooks"),
    "backward hook": (partial(hook, "register_full_backward_hook", "mlp_channels"), "hooks"),
    "replaced forward": (replace_forward, "its forward was replaced"),
    "replaced forward of a part": (lambda b: setattr(b.norm2, "forward", torch.tanh), "replaced forward"),
    "weight_norm": (lambda b: parametrizations.weight_norm(b.mlp_tokens.fc1), "ParametrizedLinear"),
    "pruned": (lambda b: prune.l1_unstructured(b.mlp_channels.fc2, "weight", amount=0.5), "hooks"),
    "tensor subclass": (subclass_weight, "tensor subclass"),
    "more submodules": (lambda b: setattr(b, "gate", nn.Linear(24, 24)), "not those of a MixerBlock"),
    "more parameters": (lambda b: setattr(b, "scale", nn.Parameter(torch.ones(24))), "not those of a MixerBlock"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT.values(), ids=LEFT)
def test_left_alone_and_said(change, reason, model, calls) -> None:
    change(model.blocks[1])
    x = images()
    model.eval()
    before = state(model)
    with torch.no_grad():
        expected = model(x)
        report = fuse_(model)
        assert torch.equal(model(x), expected)
    assert [entry.name for entry in report.left] == ["blocks.1"]
    assert reason in report.left[0].detail
    assert len(calls) == 2
    unfuse_(model)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_weight_norm_is_left_alone(model) -> None:
    weight_norm(model.blocks[1].mlp_tokens.fc1)
    assert "hooks" in fuse_(model).left[0].detail


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_blocks_are_left_alone(model) -> None:
    quantize(model.blocks[1])
    x = images()
    expected = model(x)
    report = fuse_(model)
    assert "mlp_channels has torch.ao.nn.quantized" in report.left[0].detail
    assert torch.equal(model(x), expected)


def test_subclasses_are_left_alone() -> None:
    model = make_model(block_layer=OwnForward)
    x = images()
    expected = model(x)
    report = fuse_(model)
    assert not report and "it is a OwnForward, a subclass of MixerBlock" in str(report)
    assert torch.equal(model(x), expected)


def test_a_parametrized_block_is_left_alone_both_ways(model) -> None:
    x = images()
    parametrize.register_parametrization(model.blocks[0].norm1, "weight", nn.Tanh())
    assert "ParametrizedLayerNorm" in fuse_(model).left[0].detail
    model.blocks[1].register_parameter("extra", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(model.blocks[1], "extra", nn.Tanh())
    expected = model(x)
    report = unfuse_(model)
    assert [entry.name for entry in report.left] == ["blocks.1"] and "undo that first" in report.left[0].detail
    assert torch.equal(model(x), expected)


def test_unfuse_leaves_a_replaced_forward(model) -> None:
    """accelerate's hooks keep the fused forward, bound: it would not run on the original class."""
    fuse_(model)
    block = model.blocks[0]
    block.forward = block.forward
    assert "its forward was replaced" in unfuse_(model).left[0].detail
    del block.forward
    assert len(unfuse_(model)) == 1


def test_compiled_is_left_alone(model, calls) -> None:
    x = images()
    expected = model(x)
    compiled = torch.compile(model, backend="eager")
    assert not fuse_(compiled) and "torch.compile" in fuse_(compiled).left[0].detail
    model.blocks[1].compile(backend="eager")
    report = fuse_(model)
    assert [entry.name for entry in report.left] == ["blocks.1"] and "torch.compile" in report.left[0].detail
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda model: torch.jit.trace(model, images().double())], ids=["script", "trace"]
)
def test_torchscript_is_left_alone(make, model) -> None:
    x = images().double()
    scripted = make(model.double().eval())
    expected = scripted(x)
    report = fuse_(scripted)
    assert not report and len(report.left) == 3 and "TorchScript" in report.left[0].detail
    # A second call is other code: TorchScript optimizes it by what it saw in the first.
    torch.testing.assert_close(scripted(x), expected, rtol=1e-12, atol=1e-12)


def test_a_changed_class_of_timm_is_left_alone(model, monkeypatch) -> None:
    monkeypatch.setattr(MixerBlock, "forward", lambda self, x: x)
    assert "MixerBlock.forward was replaced" in fuse_(model).left[0].detail
