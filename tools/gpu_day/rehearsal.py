"""What stands in for a GPU: Triton's strict interpreter, and csrc/ compiled by g++ for a model of a GPU."""

from __future__ import annotations

import importlib.util
import shutil


def install() -> None:
    """Let both backends with kernels take CPU tensors; without g++ or pybind11 ``cuda`` says itself that it cannot."""
    import strict_interpreter

    strict_interpreter.install()
    from cuda_on_host import build

    if shutil.which(build.compiler()) and importlib.util.find_spec("pybind11"):
        from mixer_kernels.backends.cuda import library

        library.install(build.load())
