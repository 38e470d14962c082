"""fuse_ beside the tools that people use on models: LoRA adapters, compilers, tools on graphs."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from small_mixer import count_calls, images, make_model, run
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mixer_kernels import fuse_, unfuse_, words

pytestmark = pytest.mark.usefixtures("through_functional")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    return count_calls(monkeypatch)


class LoraLinear(nn.Module):
    """What PEFT puts in the place of a layer."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_adapters(model: MlpMixer) -> MlpMixer:
    """On both layers of the first block's channel MLP."""
    mlp = model.blocks[0].mlp_channels
    mlp.fc1, mlp.fc2 = LoraLinear(mlp.fc1), LoraLinear(mlp.fc2)
    return model


def merged(model: MlpMixer) -> MlpMixer:
    """As ``merge_and_unload`` of PEFT."""
    mlp = model.blocks[0].mlp_channels
    for name in ("fc1", "fc2"):
        adapter = getattr(mlp, name)
        adapter.base_layer.weight.data += adapter.lora_B.weight @ adapter.lora_A.weight
        setattr(mlp, name, adapter.base_layer)
    return model


@pytest.mark.parametrize("fused_first", [False, True], ids=["adapter first", "fused first"])
def test_a_lora_adapter_is_computed_and_once_merged_runs_fused(fused_first, calls, caplog) -> None:
    words._warn.cache_clear()
    caplog.set_level(logging.WARNING, "mixer_kernels")
    model, x = make_model().eval(), images()
    if fused_first:
        fuse_(model)
    with_adapters(model)
    expected = run(unfused(model), x)
    if not fused_first:
        [left] = fuse_(model).left
        assert left.name == "blocks.0" and "test_patch_tools.LoraLinear, not torch.nn.Linear" in left.detail
    assert all(map(torch.equal, run(model, x), expected))
    assert len(calls) == 2 and ("LoraLinear" in caplog.text) == fused_first
    merged(model)
    calls.clear()
    if not fused_first:
        assert not fuse_(model).left
    torch.testing.assert_close(model(x), expected[0])
    assert len(calls) == 3


def unfused(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    unfuse_(twin)
    return twin


def compilations(model: nn.Module) -> int:
    """In inference and training, each for three batch sizes."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for training in (False, True):
        model.train(training)
        with torch.set_grad_enabled(training):
            for batch in (2, 3, 5):
                compiled(images(batch).to(model.head.weight.device))
    return counter.frame_count


@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_fused_model_compiles_no_more_often(backend, device) -> None:
    model = make_model(num_blocks=1).to(device)
    expected = compilations(model)
    fuse_(model, backend=backend)
    assert 0 < compilations(model) <= expected


def test_a_graph_is_left_and_told_what_it_was_made_from() -> None:
    graph = torch.fx.symbolic_trace(make_model().blocks)
    report = fuse_(nn.ModuleDict({"model": graph}))
    assert not report and "it is a graph" in report.left[0].detail and "unfuse_ it first" in report.left[0].detail
    assert report.left[0].name == "model"
