"""The examples that fuse a model of another library, as people run them, on less data and fewer epochs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, where timm and transformers find a torchvision that they can import.
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_classify_images(monkeypatch, capsys, tmp_path) -> None:
    from PIL import Image

    for name in ("red", "blue"):
        Image.new("RGB", (50, 40), name).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]
    run("classify_images.py", *paths, "--model", "gmlp_ti16_224", "--top", "2", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "blocks.[0-29]",
        "30",
        "x",
        "SpatialGatingBlock",
        "fused",
        "functional.gated_channel_mixing",
    ]
    assert lines[1] == "30 fused"
    assert float(lines[2].split()[-1]) < 1e-5
    assert [line for line in lines if line.startswith(("red.png", "blue.png"))] and sum(
        "%" in line for line in lines
    ) == 4


def test_forecast_patchtsmixer(monkeypatch, capsys) -> None:
    run("forecast_patchtsmixer.py", "--epochs", "2", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert "6 fused" in lines
    ours, baseline = (float(line.split()[-1]) for line in lines if line.startswith("  "))
    assert ours < 2 * baseline  # after two epochs; with all fifteen it is below the baseline
    assert float(lines[-1].split()[-4]) < 1e-3
