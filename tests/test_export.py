"""Models leave Python: torch.export and AOTInductor keep our operators; ONNX and TorchScript get PyTorch's.

Exporters warn of what torch itself deprecates in them; those warnings are not ours to fail on.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
import torch
from accuracy import assert_accurate, reference
from torch import Tensor, nn

from mixer_kernels import FusedMixer, backends, functional, use_backend
from mixer_kernels.accuracy import Reference
from mixer_kernels.backends.registry import exported_to

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
]
CONFIG = {"num_classes": 5, "img_size": (12, 8), "patch_size": 4, "num_blocks": 2, "embed_dim": 10}
BATCH = torch.export.Dim("batch", min=1, max=64)


def mixer(device: str = "cpu", **config) -> FusedMixer:
    model = FusedMixer(**CONFIG | config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
            )
    return model.to(device).eval().requires_grad_(False)


def images(batch_size: int, device: str = "cpu") -> Tensor:
    return torch.randn(batch_size, 3, 12, 8, device=device)


def export(model: nn.Module, device: str = "cpu") -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(2, device),), dynamic_shapes=({0: BATCH},))


def exact_logits(model: nn.Module, x: Tensor) -> Reference:
    wide = model.double()
    return reference(lambda: wide(x.double()), torch.float32)


def ours(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("mixer_kernels.")]


class Tokens(nn.Module):
    """The functional API with nothing of a model around it."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.w1, self.w2 = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(6, 7))

    def forward(self, x: Tensor) -> Tensor:
        return functional.token_mixing(x, None, None, self.w1, None, self.w2, None, backend=self.backend)


def test_export_keeps_our_operators(device, tmp_path: Path) -> None:
    """A whole model, through a file, for any batch: the numbers of the model."""
    model = mixer(device)
    with use_backend("triton"):
        program = export(model, device)
    assert ours(program) == ["mixer_kernels.mixer_block.default"] * 2
    torch.export.save(program, tmp_path / "mixer.pt2")
    loaded = torch.export.load(tmp_path / "mixer.pt2").module()
    x = images(3, device)
    with use_backend("triton"):
        actual, eager = loaded(x), model(x)
    assert_accurate(actual, eager, exact_logits(model, x), what="logits")


def test_aotinductor_keeps_our_operators(device, tmp_path: Path) -> None:
    """Compiled to a shared library that calls the kernels through PyTorch's dispatcher."""
    model = mixer(device, num_blocks=1)
    with use_backend("triton"):
        program = export(model, device)
        assert ours(program) == ["mixer_kernels.mixer_block.default"]
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "mixer.pt2"))
        x = images(3, device)
        actual, eager = torch._inductor.aoti_load_package(package)(x), model(x)
    assert_accurate(actual, eager, exact_logits(model, x), what="logits")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["export", "TorchScript"])
def test_onnx_gives_the_models_logits(dynamo: bool, approximate: str, tmp_path: Path) -> None:
    """Both of PyTorch's exporters, for any batch, checked by onnxruntime."""
    model = mixer(num_blocks=1, act_layer=lambda: nn.GELU(approximate))
    path, x = tmp_path / "mixer.onnx", images(3)
    if dynamo:
        batch = {"dynamic_shapes": ({0: BATCH},), "verbose": False}
    else:
        batch = {"dynamic_axes": {"images": {0: "batch"}}, "input_names": ["images"]}
    torch.onnx.export(model, (images(2),), path, dynamo=dynamo, **batch)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_accurate(torch.from_numpy(logits), model(x), exact_logits(model, x), what="logits")


def test_torchscript_trace_is_pytorchs_operators() -> None:
    """No warning of a check that was recorded, any batch, and a file that loads without this package."""
    model = mixer()
    traced = torch.jit.trace(model, images(2))
    assert "mixer_kernels::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = images(3)
    assert_accurate(torch.jit.load(file)(x), model(x), exact_logits(model, x), what="logits")


def test_functional_api_traces_to_pytorchs_operators() -> None:
    module, x = Tokens().double().eval(), torch.randn(2, 6, 4, dtype=torch.float64)
    with pytest.warns(torch.jit.TracerWarning):  # its checks of shapes are recorded
        traced = torch.jit.trace(module, x)
    assert "mixer_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_kernels_by_name_do_not_go_to_torchscript_or_onnx(backend: str, tmp_path: Path) -> None:
    module, x = Tokens(backend).eval(), torch.randn(2, 6, 4)
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run: TorchScript has no such operators; use"):
        torch.jit.trace(module, x)
    with pytest.raises(Exception, match=f"backend='{backend}' cannot run: ONNX has no such operators; use"):
        torch.onnx.export(module, (x,), tmp_path / "tokens.onnx", dynamo=True, verbose=False)


def test_auto_is_torch_on_a_gpu_too_while_exporting(tmp_path: Path) -> None:
    chosen = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            chosen.append(backends.choose("auto", "cuda", 0, torch.float32))
            return x + 1

    torch.jit.trace(Asks().eval(), torch.zeros(2), check_trace=False)  # which would call it untraced
    traces = len(chosen)
    torch.onnx.export(Asks().eval(), (torch.zeros(2),), tmp_path / "asks.onnx", dynamo=True, verbose=False)
    assert len(chosen) > traces > 0
    assert set(chosen) == {"torch"}


def test_another_thread_may_be_importing_onnx(monkeypatch):
    """Then the module is there, and empty."""
    monkeypatch.setitem(sys.modules, "torch.onnx", ModuleType("torch.onnx"))
    assert exported_to() is None
