"""Files of weights, and ``python -m mixer_kernels convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from test_convert import DATA, GENERATIONS, lucidrains, mixer

from mixer_kernels import convert
from mixer_kernels.__main__ import main as run_command


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_files_round_trip(suffix: str, tmp_path: Path) -> None:
    state_dict, path = mixer().to(torch.bfloat16).state_dict(), tmp_path / f"weights{suffix}"
    convert.save_state_dict(state_dict, path)
    again = convert.load_state_dict(path)
    assert sorted(again) == sorted(state_dict)
    assert all(torch.equal(again[n], t) and again[n].dtype is t.dtype for n, t in state_dict.items())


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"something else entirely")
        with pytest.raises(ValueError, match=rf"{name} is not a"):
            convert.load_state_dict(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        convert.load_state_dict(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must end in one of .safetensors, .pth"):
        convert.load_state_dict(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="must end in one of .safetensors, .pth"):
        convert.save_state_dict({}, tmp_path / "a.npz")


class Planted:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file was executed')",)


def test_files_are_not_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "planted": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(ValueError, match="planted.pth is not a file of weights"):
        convert.load_state_dict(tmp_path / "planted.pth")


def test_without_safetensors_the_error_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors, or use a .pth file"):
        convert.save_state_dict({}, tmp_path / "a.safetensors")


def test_command_google(tmp_path: Path, capsys) -> None:
    out = tmp_path / "mixer.safetensors"
    assert run_command(["convert", "--from", "google", str(DATA / GENERATIONS[1]), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 blocks, patches of 4x4 pixels and 3 channels, S=6, C=8, D_S=5, D_C=12, 3 classes" in printed
    assert "approximate='tanh'" in printed
    expected = convert.from_google_npz(DATA / GENERATIONS[0])
    assert all(torch.equal(t, expected[n]) for n, t in convert.load_state_dict(out).items())


def test_command_timm_checkpoint_with_arguments_and_resize(tmp_path: Path, capsys) -> None:
    """What timm's train.py saves has its argparse.Namespace in it."""
    state_dict = mixer().state_dict()
    torch.save({"state_dict": state_dict, "args": argparse.Namespace(lr=0.1)}, tmp_path / "in.pth.tar")
    command = ["convert", "--from", "timm", "--to", "timm", str(tmp_path / "in.pth.tar"), str(tmp_path / "out.pth")]
    assert run_command([*command, "--resize-tokens", "3x2", "6x4"]) == 0
    assert "S=24, C=10, D_S=20" in capsys.readouterr().out
    resized = convert.load_state_dict(tmp_path / "out.pth")
    expected = convert.resize_tokens(state_dict, (3, 2), (6, 4))
    assert all(torch.equal(resized[name], tensor) for name, tensor in expected.items())
    with pytest.raises(SystemExit, match="2"):
        run_command(command)
    assert "exists: choose another file or pass --force" in capsys.readouterr().err
    assert run_command([*command, "--force"]) == 0
    assert "S=6" in capsys.readouterr().out


def test_command_lucidrains(tmp_path: Path, capsys) -> None:
    theirs = lucidrains().state_dict()
    convert.save_state_dict(theirs, tmp_path / "in.safetensors")
    command = ["convert", "--from", "lucidrains", str(tmp_path / "in.safetensors"), str(tmp_path / "out.pth")]
    assert run_command(command) == 0
    assert "eps of 1e-5" in capsys.readouterr().out
    expected = convert.from_lucidrains(theirs)
    assert all(torch.equal(t, expected[n]) for n, t in convert.load_state_dict(tmp_path / "out.pth").items())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--from", "google", "missing.npz", "out.pth"], "No such file: missing.npz"),
        (["--from", "timm", "missing.pth", "out.pth"], "No such file: missing.pth"),
        (["--from", "google", str(DATA / "google_mixer_expected.npz"), "out.pth"], "missing: stem/kernel"),
        (["--from", "timm", str(DATA / GENERATIONS[0]), "out.pth"], "must end in one of .safetensors, .pth"),
        (["--from", "jax", "in.npz", "out.pth"], "invalid choice: 'jax'"),
        (["--from", "google", "in.npz", "out.pth", "--resize-tokens", "14", "28x28"], "invalid grid value: '14'"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], reason: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_command(["convert", *arguments])
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
