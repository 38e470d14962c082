"""What other tools do with a fused model and with this package.

They trace it by torch.fx, run it on the meta device, export it, script it, find its blocks by the names of their
classes, pickle it; import the package twice; interpret its kernels.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_mixer import images, make_model
from test_patch_models import KINDS, small
from test_patch_time_series import patchtsmixer, series
from timm.models.mlp_mixer import MixerBlock
from torch import nn
from transformers.models.patchtsmixer.modeling_patchtsmixer import PatchTSMixerLayer

import mixer_kernels
from mixer_kernels import FusedMixer, FusedMixerBlock, functional, fuse_, unfuse_
from mixer_kernels.adapters import fused_classes

ROOT = Path(mixer_kernels.__file__).parents[1]


def model_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    name, options = KINDS[kind]
    return small(name, monkeypatch, **options).eval()


# ---------------------------------------------------------------------------------------------------------- torch.fx


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_fx_traces_the_modules_of_a_fused_model(kind, backend, monkeypatch) -> None:
    model = model_of(kind, monkeypatch)
    x = torch.randn(2, 3, *model.stem.img_size)
    expected = [str(node) for node in torch.fx.symbolic_trace(model).graph.nodes]
    fuse_(model, backend=backend)
    traced = torch.fx.symbolic_trace(model)
    assert [str(node) for node in traced.graph.nodes] == expected
    assert torch.equal(traced(x), copy.deepcopy(unfused(model))(x))


def unfused(model: nn.Module) -> nn.Module:
    unfuse_(model)
    return model


def test_fx_traces_a_fused_mixer() -> None:
    model = FusedMixer(5, 16, 3, 8, 2, 24).eval()
    x = images(3)
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target == "blocks.1.mlp_tokens.fc1" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), model(x))


def test_fx_feature_extractors() -> None:
    """torchvision's and, by it, timm's."""
    from timm.models._features_fx import create_feature_extractor as timms
    from torchvision.models.feature_extraction import create_feature_extractor

    model = make_model().eval()
    fuse_(model, backend="triton")
    x = images()
    features = create_feature_extractor(model, {"blocks.0.mlp_tokens.fc2": "tokens", "blocks.1": "block"})(x)
    expected = model.forward_intermediates(x, [1], norm=False, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(features["block"], expected)
    assert features["tokens"].shape == (2, 24, 4)
    torch.testing.assert_close(timms(model, {"blocks.1": "block"})(x)["block"], expected)


def test_what_is_no_tensor_is_the_blocks_own_affair() -> None:
    block, x = MixerBlock(24, 4), images().numpy()
    with pytest.raises(TypeError) as expected:
        block(x)
    fuse_(block)
    with pytest.raises(TypeError) as got:
        block(x)
    assert str(got.value) == str(expected.value)
    with pytest.raises(TypeError, match=r"^images must be a torch.Tensor, got numpy.ndarray$"):
        FusedMixer(5, 16, 3, 8, 1, 24)(x)


# ---------------------------------------------------------------------------------------------------- the meta device


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind, train, monkeypatch) -> None:
    model = model_of(kind, monkeypatch).to("meta").train(train)
    x = torch.empty(2, 3, *model.stem.img_size, device="meta")
    assert len(fuse_(model)) == 1
    y = model(x)
    assert y.device.type == "meta" and y.shape == (2, 7)
    y.sum().backward()
    assert model.blocks[0].mlp_channels.fc1.weight.grad.device.type == "meta"


def test_meta_tensors_of_a_time_series_model() -> None:
    model = patchtsmixer().to("meta")
    x = series().to("meta")
    fuse_(model)
    assert model(x).prediction_outputs.shape == (2, 6, 3)


# ------------------------------------------------------------------------------------------------------ torch.export

# What a fused block of each kind is in an exported program.
INFERENCE = {
    "MixerBlock, Mlp": ["mixer_block"],
    "MixerBlock, GluMlp": ["mixer_block"],
    "ResBlock": ["token_linear", "channel_mixing"],
    "SpatialGatingBlock": ["gated_channel_mixing"],
}


def exported(program: torch.export.ExportedProgram) -> list[tuple[str, object]]:
    """Our operators in it, and what each keeps for a backward pass."""
    found = []
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", None) == "mixer_kernels":
            names = [argument.name for argument in node.target._schema.arguments]
            values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
            found.append((node.target._opname, values.get("keep_z", values.get("keep_u"))))
    return found


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning")  # in PyTorch's run_decompositions
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export_in_evaluation_mode_records_inference(kind, grad, strict, monkeypatch, device) -> None:
    model = model_of(kind, monkeypatch).to(device)
    x = torch.randn(2, 3, *model.stem.img_size, device=device)
    fuse_(model, backend="triton")
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), strict=strict)
    for found in (exported(program), exported(program.run_decompositions())):
        assert [name for name, _ in found] == INFERENCE[kind]
        assert not any(keep for _, keep in found)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_export_in_training_mode_can_be_trained(monkeypatch, device) -> None:
    model = model_of("MixerBlock, Mlp", monkeypatch).to(device).train()
    x = torch.randn(2, 3, *model.stem.img_size, device=device)
    fuse_(model, backend="triton")
    program = torch.export.export(model, (x,))
    assert exported(program) == [("token_mixing", None), ("channel_mixing", True)]
    program.module()(x).sum().backward()


def test_export_of_a_fused_mixer_block(device) -> None:
    block = FusedMixerBlock(24, 4).to(device).eval()
    with mixer_kernels.use_backend("triton"):
        program = torch.export.export(block, (torch.randn(2, 4, 24, device=device),))
    assert [name for name, _ in exported(program)] == ["mixer_block"]


def test_nothing_kept_has_no_gradient(device) -> None:
    block = FusedMixerBlock(24, 4).to(device)
    x = torch.randn(2, 4, 24, device=device)
    y = functional.mixer_block(x, *block.parameters(), memory=None, backend="triton")
    with torch.no_grad(), mixer_kernels.use_backend("triton"):
        assert torch.equal(y, block(x))
    with pytest.raises(RuntimeError, match="backend='torch'"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------------------- TorchScript


def test_scripting_says_what_to_do(monkeypatch) -> None:
    model = model_of("ResBlock", monkeypatch)
    fuse_(model)
    with pytest.raises(RuntimeError, match="a fused ResBlock: unfuse_ the model first, or use torch.jit.trace"):
        torch.jit.script(model)
    torch.jit.script(unfused(model))
    with pytest.raises(RuntimeError, match="a FusedMixerBlock: use torch.jit.trace, or"):
        torch.jit.script(FusedMixer(5, 16, 3, 8, 1, 24))


# ----------------------------------------------------------------------------------------- classes, by their names


def test_fused_classes_have_the_names_of_the_originals() -> None:
    classes = fused_classes()
    assert MixerBlock in classes and PatchTSMixerLayer in classes
    for original, fused in classes.items():
        assert (fused.__name__, fused.__qualname__) == (original.__name__, original.__qualname__)


def test_tools_find_blocks_by_the_names_of_their_classes() -> None:
    """As accelerate's get_module_class_from_name and its search for modules that must not be split do."""
    model, forecaster = make_model(), patchtsmixer()
    fuse_(model), fuse_(forecaster)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "MixerBlock"]
    assert names == ["blocks.0", "blocks.1", "blocks.2"]
    found = {type(module) for module in forecaster.modules() if type(module).__name__ == "PatchTSMixerLayer"}
    assert len(found) == 1 and issubclass(*found, PatchTSMixerLayer) and found != {PatchTSMixerLayer}


def test_a_class_that_is_derived_from_a_fused_one_keeps_its_name() -> None:
    """FSDP2 derives one for each class of modules."""
    fused = fused_classes()[MixerBlock]
    derived = type("FSDPMixerBlock", (fused,), {})
    assert derived.__name__ == "FSDPMixerBlock" and derived.original() is MixerBlock
    with pytest.raises(pickle.PicklingError, match="FSDPMixerBlock"):
        pickle.dumps(derived(24, 4))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_keep_class_weights_and_options(protocol) -> None:
    block = MixerBlock(24, 4).eval()
    fuse_(block, memory="min")
    block.register_forward_hook(_twice)
    loaded = pickle.loads(pickle.dumps(block, protocol))
    assert type(loaded) is type(block) and loaded._fused_options == block._fused_options and not loaded.training
    x = torch.randn(2, 4, 24)
    assert torch.equal(loaded(x), block(x))
    assert type(unfused(loaded)) is MixerBlock and torch.equal(loaded(x), block(x))


def _twice(module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
    return 2 * y


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_pickles_in_a_fresh_process(tmp_path: Path) -> None:
    block = MixerBlock(24, 4).eval()
    fuse_(block)
    x = torch.randn(2, 4, 24)
    torch.save((block, x, block(x)), tmp_path / "block.pt")
    code = """
import sys
import timm_stub
timm_stub.define_torchvision_operators()
import torch
if len(sys.argv) > 2:
    sys.modules["mixer_kernels"] = None  # as where it is not installed
block, x, y = torch.load(sys.argv[1], weights_only=False)
print(type(block).__module__, torch.equal(block(x), y))
"""
    fresh = python(code, str(tmp_path / "block.pt"))
    assert fresh.stdout.split() == ["mixer_kernels.adapters.timm", "True"], fresh.stderr
    without = python(code, str(tmp_path / "block.pt"), "without")
    assert "ModuleNotFoundError" in without.stderr and "mixer_kernels" in without.stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------- the package, imported twice

TWICE = """
import gc, sys
import timm_stub
timm_stub.define_torchvision_operators()
import torch
import strict_interpreter
strict_interpreter.install()
import mixer_kernels
from timm.models.mlp_mixer import MixerBlock

def gradients(block):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        y = block(x)
    return y, *torch.autograd.grad(block(x).square().sum(), list(block.parameters()))

block = MixerBlock(8, 4)
plain = gradients(block)
mixer_kernels.fuse_(block, backend="triton")
first = gradients(block)
old = mixer_kernels
if len(sys.argv) > 1:
    del old, mixer_kernels
for name in [name for name in sys.modules if name.partition(".")[0] == "mixer_kernels"]:
    del sys.modules[name]
gc.collect()
import mixer_kernels

assert all(map(torch.equal, gradients(block), first)), "the old one"
again = MixerBlock(8, 4)
again.load_state_dict(block.state_dict())
assert len(mixer_kernels.fuse_(again, backend="triton")) == 1
assert all(map(torch.equal, gradients(again), first)), "the new one"
import importlib
import mixer_kernels.ops
for module in [m for n, m in sorted(sys.modules.items()) if n.startswith("mixer_kernels.ops.")]:
    importlib.reload(module)
importlib.reload(mixer_kernels.ops)
assert all(map(torch.equal, gradients(again), first)), "after reload"
for a, b in zip(plain, first):
    torch.testing.assert_close(a, b)
print("same")
"""


@pytest.mark.parametrize("arguments", [(), ("forget the old one",)], ids=["old one kept", "old one gone"])
def test_purged_and_imported_again(arguments) -> None:
    result = python(TWICE, *arguments)
    assert result.stdout.strip() == "same", result.stderr


# ---------------------------------------------------------------------------------------- Triton's own interpreter

STOCK = """
import torch
from mixer_kernels import functional as F

def gradients(backend):
    torch.manual_seed(0)
    parameters = [(0.3 * torch.randn(shape)).requires_grad_() for shape in (
        (2, 5, 8), (8,), (8,), (6, 5), (6,), (5, 6), (5,), (8,), (8,), (7, 8), (7,), (8, 7), (8,))]
    y = F.mixer_block(*parameters, backend=backend)
    return y, *torch.autograd.grad(y.square().sum(), parameters)

for a, b in zip(gradients("triton"), gradients("torch")):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print("trained")
"""


def test_training_under_tritons_own_interpreter() -> None:
    result = python(STOCK, TRITON_INTERPRET="1")
    assert result.stdout.strip() == "trained", result.stderr
