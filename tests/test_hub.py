"""The repository that `make hub` lays out, loaded by the kernels library, without a network."""

from __future__ import annotations

import copy
import importlib.util
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from blocks import make_block
from parity import run
from small_mixer import images, make_model
from timm.models.mlp_mixer import MixerBlock

from mixer_kernels import functional
from mixer_kernels.shapes import MixerShape

kernels = pytest.importorskip("kernels", reason="waits for an environment with Hugging Face's kernels")
ROOT = Path(__file__).parent.parent
SHAPE = MixerShape(S=5, C=16, D_S=6, D_C=12)


@pytest.fixture(scope="module")
def make_hub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_hub", ROOT / "tools" / "make_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(make_hub, tmp_path, monkeypatch) -> Path:
    """Laid out; a connection is an error."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    assert make_hub.main(["--output", str(tmp_path / "hub")]) == 0
    return tmp_path / "hub"


def test_the_kernels_functions_are_ours_under_other_operators(repository, device) -> None:
    kernel = kernels.get_local_kernel(repository, backend="cpu")
    assert kernel.functional is not functional and kernel.__name__.startswith("_mixer_kernels_cpu_")
    block, x = make_block(SHAPE, torch.float32, device), torch.randn(2, SHAPE.S, SHAPE.C, device=device)
    parameters = [p.requires_grad_() for p in (*block.token(), *block.channel())]
    for backend in ("torch", "triton"):
        ours, theirs = (
            each.mixer_block(x, *parameters, backend=backend, memory="min") for each in (functional, kernel.functional)
        )
        assert torch.equal(ours, theirs)
        for gradients in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (ours, theirs)), strict=True):
            assert torch.equal(*gradients)
    with kernel.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run"):  # it has nothing compiled
        kernel.functional.mixer_block(x, *parameters)


def test_two_builds_live_in_one_process(repository, make_hub, tmp_path, monkeypatch) -> None:
    first = kernels.get_local_kernel(repository, backend="cpu")
    monkeypatch.setattr(make_hub, "INIT", make_hub.INIT + "\n")
    make_hub.lay_out(tmp_path / "second")
    second = kernels.get_local_kernel(tmp_path / "second", backend="cpu")
    modules = [sys.modules[f"{each.__name__}.mixer_kernels.ops.operator"] for each in (first, second)]
    namespaces = {module.NAMESPACE for module in modules}
    assert len(namespaces) == 2 and "mixer_kernels" not in namespaces
    assert all("mixer_block" in dir(getattr(torch.ops, each)) for each in namespaces)


def test_kernelize_gives_timms_models_the_layer(repository, monkeypatch) -> None:
    class Kernelized(MixerBlock):  # which the library marks
        pass

    model, x = make_model(block_layer=Kernelized), images()
    expected = run(copy.deepcopy(model), x)
    kernels.replace_kernel_forward_from_hub(Kernelized, "MixerBlock")
    layer = kernels.LocalLayerRepository(repository, layer_name="MixerBlock")
    seen = []
    with kernels.use_kernel_mapping({"MixerBlock": {"cpu": layer}}):
        kernels.kernelize(model, device="cpu", mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    kernel = kernels.get_local_kernel(repository, backend="cpu")
    original = kernel.functional.mixer_block
    monkeypatch.setattr(kernel.functional, "mixer_block", lambda *a, **k: seen.append(1) or original(*a, **k))
    for got, wanted in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(seen) == 3
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_what_is_no_kernel_repository_is_not_overwritten(make_hub, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is no kernel repository"):
        make_hub.lay_out(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
