"""``fused_mixer_*``: timm's own models, tags and weights, with our block."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.mlp_mixer import default_cfgs

import mixer_kernels.timm as entry_points
from mixer_kernels import FusedMixerBlock
from mixer_kernels.__main__ import main as run_command

NAMES = sorted(name for name in default_cfgs if name.startswith("mixer_"))
TAGGED = [f"{name}.{tag}" for name in NAMES for tag in default_cfgs[name].tags if tag != "untrained"]


def test_there_is_one_for_each_of_timms() -> None:
    assert NAMES == sorted(timm.list_models("mixer_*", module="mlp_mixer"))
    assert timm.list_models("fused_*") == [f"fused_{name}" for name in NAMES]
    assert timm.list_models("fused_*", pretrained=True) == sorted(f"fused_{name}" for name in TAGGED)
    for name in NAMES:
        assert timm.is_model_pretrained(f"fused_{name}") is timm.is_model_pretrained(name)
        assert getattr(entry_points, f"fused_{name}") is timm.model_entrypoint(f"fused_{name}")


@pytest.mark.parametrize("name", NAMES + TAGGED)
def test_configuration_and_weights_are_timms(name: str) -> None:
    """Of the registry, and of the model: what create_model(pretrained=True) downloads, and what is saved with it."""
    theirs, ours = get_pretrained_cfg(name).to_dict(), get_pretrained_cfg(f"fused_{name}").to_dict()
    assert ours.pop("architecture") == "fused_" + theirs.pop("architecture")
    assert ours == theirs
    with torch.device("meta"):
        their_model, our_model = timm.create_model(name), timm.create_model(f"fused_{name}")
    assert our_model.pretrained_cfg == their_model.pretrained_cfg
    assert timm.data.resolve_model_data_config(our_model) == timm.data.resolve_model_data_config(their_model)
    assert {n: p.shape for n, p in our_model.state_dict().items()} == {
        n: p.shape for n, p in their_model.state_dict().items()
    }
    assert {type(block) for block in our_model.blocks} == {FusedMixerBlock}


def test_pretrained_weights_are_loaded_and_give_timms_logits() -> None:
    """create_model(pretrained=True), with the weights in memory instead of on the hub."""
    options = {"img_size": 64, "num_classes": 7, "drop_rate": 0.1}
    theirs = timm.create_model("mixer_s32_224", **options).eval()
    torch.nn.init.normal_(theirs.head.weight, std=0.05)
    overlay = {"state_dict": theirs.state_dict(), "num_classes": 7}
    ours = timm.create_model("fused_mixer_s32_224", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_arguments_of_timm_and_of_the_block() -> None:
    with torch.device("meta"):
        model = timm.create_model("fused_mixer_s16_224", memory="min", drop_path_rate=0.2, num_classes=0)
        features = timm.create_model("fused_mixer_s16_224", features_only=True, out_indices=(1, 3))
    assert {(block.memory, block.drop_path.drop_prob) for block in model.blocks} == {("min", 0.2)}
    assert isinstance(model.head, torch.nn.Identity)
    assert [info["module"] for info in features.feature_info.get_dicts()] == ["blocks.1", "blocks.3"]
    with pytest.raises(ValueError, match="memory must be one of 'fast', 'min', got 'small'"):
        timm.create_model("fused_mixer_s16_224", memory="small")


SCRIPT = """
import json, sys
from pathlib import Path

import beside
import timm
import torch

if __name__ == "__main__":
    with torch.device("meta"):
        model = timm.create_model(sys.argv[2])
    Path(sys.argv[3]).write_text(json.dumps([sys.argv, type(model.blocks[0]).__name__, beside.NAME]))
"""


def test_a_script_that_knows_only_timm(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'beside the script'")
    script, out = str(tmp_path / "script.py"), tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run_command(["timm", script, "--model", "fused_mixer_b16_224", str(out)]) == 0
    expected = f'[["{script}", "--model", "fused_mixer_b16_224", "{out}"], "FusedMixerBlock", "beside the script"]'
    assert out.read_text() == expected


def test_a_script_that_is_not_there(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(["timm", "no_such_script.py"])
    assert "no_such_script.py is not a file" in capsys.readouterr().err
