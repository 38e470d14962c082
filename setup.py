"""The kernels, by CMake and Ninja, where a compiler works; what is static is in pyproject.toml."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

import _build

ROOT = Path(__file__).resolve().parent
NVCC = _build.wanted_nvcc()
CXX = _build.wanted_cxx()
CPU, CUDA = ("mixer_kernels._metadata", "mixer_kernels._cpu"), "mixer_kernels._C"


class CMakeBuild(build_ext):
    """Each module from a CMakeLists.txt. MAX_JOBS and NVCC_THREADS bound how much is compiled at once."""

    def build_extension(self, ext: Extension) -> None:
        kind = "CUDA" if ext.name == CUDA else "CPU"
        cmake, ninja, pybind11 = _tools(kind)
        compiler = CXX if kind == "CPU" else f"{NVCC.path} {NVCC.version}"
        bounded = "ON" if os.environ.get("MIXER_KERNELS_BOUNDED_WAITS") == "1" else "OFF"
        compiler = f"{compiler} {bounded}" if bounded == "ON" else compiler
        configuration = hashlib.sha256(compiler.encode()).hexdigest()[:8]
        objects = Path(self.build_temp, f"{kind.lower()}-{configuration}").resolve()  # CMake keeps to one compiler
        jobs = _positive("MAX_JOBS", _cores())
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11,
        }
        if kind == "CPU":
            source = ROOT / "csrc/cpu"
            options["CMAKE_CXX_COMPILER"] = CXX
        else:
            source = ROOT
            options["CMAKE_CUDA_COMPILER"] = NVCC.path
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(_build.cmake_architectures(NVCC))
            options["MIXER_KERNELS_BOUNDED_WAITS"] = bounded
            options["MIXER_KERNELS_NVCC_THREADS"] = _positive("NVCC_THREADS", min(jobs, 4))
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        _run([cmake, "-S", str(source), "-B", str(objects), "-G", "Ninja", *definitions], kind)
        target = ext.name.rpartition(".")[2]
        _run([cmake, "--build", str(objects), "--target", target, "--parallel", str(jobs)], kind)


def _tools(kind: str) -> tuple[str, str, str]:
    """CMake, Ninja, and the folder of pybind11's CMake package."""
    # The interpreter's own scripts last: in an isolated build they are not those of the build environment.
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    found = {name: shutil.which(name, path=path) for name in ("cmake", "ninja")}
    found["pybind11"] = importlib.util.find_spec("pybind11")
    missing = [name for name, what in found.items() if what is None]
    if missing:
        raise PlatformError(
            f"the {kind} kernels are built with {', '.join(found)}; missing: {', '.join(missing)}. Install them "
            f"(pip install {' '.join(repr(tool) for tool in _build.BUILD_TOOLS)}), build with isolation, or set "
            f"MIXER_KERNELS_BUILD_{kind}=0 to build without the {kind} kernels"
        )
    import pybind11

    return found["cmake"], found["ninja"], pybind11.get_cmake_dir()


def _run(command: list[str], kind: str) -> None:
    print(" ".join(command), flush=True)
    status = subprocess.run(command).returncode
    if status != 0:
        raise CompileError(
            f"building the {kind} kernels failed (exit status {status}); the compiler's output is above. "
            f"MIXER_KERNELS_BUILD_{kind}=0 builds without them"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) == 0:
        raise PlatformError(f"{variable}: got {text!r}, expected a number from 1")
    return int(text)


MODULES = (CPU if CXX else ()) + ((CUDA,) if NVCC else ())
setup(
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild},
)
