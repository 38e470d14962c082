"""Build: the CUDA kernels, by setup.py in this checkout, for the GPU at hand alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import torch

from mixer_kernels import info
from mixer_kernels.backends.cuda import library

from .kernels import why_not
from .programs import last_lines, run_program
from .tasks import Settings, Skip, Task

COMMAND = [sys.executable, "setup.py", "build_ext", "--inplace"]
ERRORS = 3  # of a compiler, in a reason
LOG_LINES = 200  # of a failed build, in the file


def tasks(settings: Settings) -> list[Task]:
    return [Task("setup.py build_ext", lambda values: _build(settings, values), backend="cuda")]


def _build(settings: Settings, values: dict[str, Any]) -> None:
    if settings.device != "cuda":
        raise Skip("needs a GPU")
    if torch.version.hip:
        raise Skip("needs an NVIDIA GPU")
    _check_tools()
    architecture = architecture_of(torch.cuda.get_device_capability())
    values["config"] = f"sm_{architecture}"
    status, log = run_program(COMMAND, settings, environment_of(architecture))
    if status != 0:
        values["facts"] = {"build_log": log.splitlines()[-LOG_LINES:]}
    assert status == 0, f"exit status {status}: {why_it_failed(log)}"
    importlib.invalidate_caches()  # the module was not there before
    built = info.cuda_kernels()
    values["facts"] = {"cuda_kernels": built}
    reason = why_not(settings, "cuda")
    assert reason is None, f"built, but: {reason}"
    assert architecture in library.loaded().architectures, f"asked for sm_{architecture}, got {built}"


def _check_tools() -> None:
    """Skip the phase, with what is missing."""
    if importlib.util.find_spec("setuptools") is None:
        raise Skip("the CUDA kernels are built with setuptools, which is missing; --help says how to bring it along")
    import _build  # the checkout's build backend

    nvcc, looked_for = _build.find_nvcc()
    if nvcc is None:
        raise Skip(f"there is no nvcc that works: {'; '.join(line.strip() for line in looked_for.splitlines())}")
    missing = missing_tools()
    if missing:
        raise Skip(f"nvcc is here, missing: {', '.join(missing)}; --help says how to bring them along")


def missing_tools(
    which: Callable[..., Any] = shutil.which, find_spec: Callable[[str], Any] = importlib.util.find_spec
) -> list[str]:
    """What setup.py needs beside nvcc and setuptools, and looks for in the same places."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    missing = [name for name in ("cmake", "ninja") if which(name, path=path) is None]
    return missing + [name for name in ("pybind11",) if find_spec(name) is None]


def architecture_of(capability: tuple[int, int]) -> str:
    """As MIXER_KERNELS_CUDA_ARCHS names it; 9.0 with its own features, as the default architectures have it."""
    number = 10 * capability[0] + capability[1]
    return "90a" if number == 90 else str(number)


def environment_of(architecture: str) -> dict[str, str]:
    return {**os.environ, "MIXER_KERNELS_BUILD_CUDA": "1", "MIXER_KERNELS_CUDA_ARCHS": architecture}


def why_it_failed(log: str) -> str:
    """The first errors of the compilers, CMake or Ninja; the last lines where there are none."""
    errors = [line.strip() for line in log.splitlines() if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return " | ".join(errors[:ERRORS]) or last_lines(log)
