"""``python -m mixer_kernels`` and its ``info``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mixer_kernels import __version__, backends, info
from mixer_kernels.__main__ import COMMANDS
from mixer_kernels.__main__ import main as run_command
from mixer_kernels.backends.cpu import library as cpu_library
from mixer_kernels.backends.cuda import library
from mixer_kernels.backends.measured import MEASURED_FILE, measured_gpus

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_info_names_versions_devices_and_reasons(capsys):
    assert run_command(["info"]) == 0
    output = capsys.readouterr().out
    for expected in (__version__, torch.__version__, str(Path(info.__file__).parent), info.device_name(CPU)):
        assert expected in output
    reason = backends.why_not("triton", CPU, torch.float32)
    assert reason is None or f"does not run: {reason}" in output
    assert "runs: float32, float16, bfloat16" in output  # the torch backend


def test_info_as_json_is_what_is_collected(capsys):
    assert info.main(["--json"]) == 0
    collected = json.loads(capsys.readouterr().out)
    assert [device["device"] for device in collected["devices"]][0] == "cpu"
    assert set(collected["devices"][0]["backends"]) == set(backends.BACKENDS)
    assert collected["versions"] == info.versions()


def test_info_shows_the_environment_variables_in_force(monkeypatch, capsys):
    monkeypatch.setenv("MIXER_KERNELS_BACKEND", "torch")
    info.main([])
    assert "MIXER_KERNELS_BACKEND=torch" in capsys.readouterr().out


@pytest.mark.parametrize("measured, line", [(True, "was measured on"), (False, "was never run by its authors on")])
def test_info_says_whether_a_backend_was_measured_on_this_gpu(measured, line):
    entry = {"runs": ["float16"], "why_not": {"float32": "no"}, "trains": False, "measured": measured}
    device = {"device": "cuda:0", "name": "NVIDIA H200", "auto": {"bfloat16": "triton"}, "backends": {"triton": entry}}
    built = {"why_not": "not in this installation"}
    text = info.render(
        {
            "versions": {},
            "package": "here",
            "cpu_kernels": built,
            "cuda_kernels": built,
            "devices": [device],
            "environment": {},
        }
    )
    assert f"{line} this kind of GPU" in text
    assert "does not run float32: no" in text


def test_measured_gpus_are_listed_by_backend():
    listed = json.loads((Path(info.__file__).parent / MEASURED_FILE).read_text())
    assert set(listed) <= set(backends.BACKENDS) - {"torch"}
    for backend, names in listed.items():
        assert measured_gpus(backend) == list(names) and all(isinstance(name, str) for name in names)
    assert isinstance(listed.get("cuda:sm90", {}), dict)
    assert measured_gpus("no such backend") == []


def test_info_says_what_the_cuda_kernels_were_built_for(monkeypatch, capsys):
    module = ModuleType(library.MODULE)
    module.__file__ = "/here/_C.so"
    module.on_host, module.runtime_version = False, 12080
    module.architectures, module.ptx, module.sm90_sources = ("80", "90a", "120"), ("80", "120"), "0123456789ab"
    monkeypatch.setattr(library, "loaded", lambda: module)
    info.main([])
    line = "CUDA kernels   built with CUDA 12.8 for sm_80, sm_90a, sm_120; compute_80, compute_120 PTX for other GPUs"
    assert line in capsys.readouterr().out.splitlines()
    module.on_host = True
    info.main([])
    assert "CUDA kernels   built for the CPU (/here/_C.so)" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModuleNotFoundError("no", name=library.MODULE), "CUDA kernels   not in this installation"),
        (ImportError("no GLIBC_9"), "CUDA kernels   mixer_kernels._C does not load: no GLIBC_9"),
    ],
)
def test_info_says_why_there_are_no_cuda_kernels(monkeypatch, capsys, error, line):
    def fail():
        raise error

    monkeypatch.setattr(library, "loaded", fail)
    library._reason.cache_clear()
    info.main([])
    assert line in capsys.readouterr().out.splitlines()
    library._reason.cache_clear()


def test_info_runs_without_triton_timm_or_cuda():
    program = """
import sys
for absent in ("triton", "timm"):
    sys.modules[absent] = None
import torch
from mixer_kernels.__main__ import main
assert not torch.cuda.is_initialized()
main(["info"])
for module in ("mixer_kernels.bench", "mixer_kernels.compile_check"):
    assert module not in sys.modules, module
"""
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    triton = next(line for line in finished.stdout.splitlines() if line.startswith("  triton"))
    assert "does not run" in triton


def test_unknown_commands_are_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(["frobnicate"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in COMMANDS)


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(["--help"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_info_says_what_auto_takes(capsys):
    (device,) = (each for each in info.collect()["devices"] if each["device"] == "cpu")
    kernels = cpu_library.why_not_auto(torch.float32) is None
    assert device["auto"] == dict.fromkeys(("float32", "float16", "bfloat16"), "cpu or torch" if kernels else "torch")
    assert info.main([]) == 0
    line = f"auto      {'cpu or torch' if kernels else 'torch'} for float32, float16, bfloat16"
    assert line in capsys.readouterr().out
