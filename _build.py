"""The PEP 517 build backend: setuptools', which also asks for CMake, Ninja and pybind11 where a compiler works.

``MIXER_KERNELS_BUILD_CPU``: ``auto`` (default: build the CPU kernels if a C++ compiler works), ``0``, ``1`` (or fail).
``MIXER_KERNELS_BUILD_CUDA``: ``auto`` (default: build the CUDA kernels if nvcc works), ``0`` (never), ``1`` (or fail).
``MIXER_KERNELS_CUDA_ARCHS``: compute capabilities without the dot, ``80;90a`` or ``80,90a``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need nothing more

BUILD_CPU = "MIXER_KERNELS_BUILD_CPU"
BUILD_CUDA = "MIXER_KERNELS_BUILD_CUDA"
CUDA_ARCHS = "MIXER_KERNELS_CUDA_ARCHS"
PROGRAMS = {"cmake": (3, 24), "ninja": (1, 10)}  # and their oldest versions
BUILD_TOOLS = [*(f"{name}>={major}.{minor}" for name, (major, minor) in PROGRAMS.items()), "pybind11>=2.13"]
OLDEST_NVCC = (12, 0)  # the first that knows sm_90a
OLDEST_ARCHITECTURE = 80  # bfloat16 in mma.sync, and cp.async
DEFAULT_ARCHITECTURES = ("80", "90a", "100", "120")
DEFAULT_TOOLKIT = "/usr/local/cuda"
PROBE = "__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); }\n"
COMPILERS = ("c++", "g++", "clang++")
# What csrc/cpu needs: Python's headers, C++17, vectors of GCC and Clang.
CPU_PROBE = """#include <Python.h>
#include <utility>
typedef float Vector __attribute__((vector_size(16)));
template <int... I> Vector counted(std::integer_sequence<int, I...>) { return Vector{I...}; }
Vector probe(Vector a) {
    if constexpr (sizeof(Vector) == 16) return a > 0.0f ? a : counted(std::make_integer_sequence<int, 4>());
}
"""


class Nvcc(NamedTuple):
    """An nvcc that compiles."""

    path: str
    version: tuple[int, int]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    requirements = build_meta.get_requires_for_build_wheel(config_settings)
    return [*requirements, *_missing_tools()] if _compiles() else requirements


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    requirements = build_meta.get_requires_for_build_editable(config_settings)
    return [*requirements, *_missing_tools()] if _compiles() else requirements


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    with _without_kernels():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    with _without_kernels():
        return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    with _without_kernels():
        return build_meta.build_sdist(sdist_directory, config_settings)


def wanted_cxx() -> str | None:
    """The C++ compiler to build the CPU kernels with, or None where they are not to be built. Says which, and why."""
    mode = _mode(BUILD_CPU)
    if mode == "0":
        return None
    compiler, looked_for = find_cxx()
    if compiler:
        print(f"mixer_kernels: CPU kernels with {compiler}")
    elif mode == "1":
        raise SystemExit(
            f"mixer_kernels: {BUILD_CPU}=1, but there is no C++ compiler that works. Looked for:\n{looked_for}\n"
            "Install GCC or Clang, and Python's headers (python3-dev), or name the compiler in CXX. "
            f"{BUILD_CPU}=0 installs without the CPU kernels."
        )
    else:
        print(f"mixer_kernels: no CPU kernels, since there is no C++ compiler that works. Looked for:\n{looked_for}")
    return compiler


def find_cxx() -> tuple[str | None, str]:
    """The first compiler that compiles what the CPU kernels need, and a line for each place looked at before."""
    looked_for: list[str] = []
    named = os.environ.get("CXX")
    for name in [named] if named else COMPILERS:
        path = shutil.which(name)
        problem = "not there" if path is None else _why_no_cxx(path)
        if problem is None:
            return path, "\n".join(looked_for)
        looked_for.append(f"  {f'CXX={name}' if named else name}: {problem}")
    return None, "\n".join(looked_for)


def _why_no_cxx(path: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(CPU_PROBE, encoding="utf-8")
        command = [path, "-std=c++17", f"-I{sysconfig.get_path('include')}", "-c", str(source)]
        try:
            compiled = _run([*command, "-o", str(source.with_suffix(".o"))])
        except OSError as error:
            return str(error)
        except subprocess.TimeoutExpired as error:
            return f"no answer within {error.timeout:.0f} s"
    if compiled.returncode == 0:
        return None
    output = (compiled.stderr + compiled.stdout).strip().replace("\n", "\n    ")
    return f"{path} does not compile what they need (exit status {compiled.returncode}):\n    {output}"


def _compiles() -> bool:
    """Whether one kind of kernels is built; asks about both, since each says what it finds."""
    return any([wanted_nvcc() is not None, wanted_cxx() is not None])


def _mode(variable: str) -> str:
    mode = os.environ.get(variable) or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"mixer_kernels: {variable}: got {mode!r}, expected auto, 0 or 1")
    return mode


def wanted_nvcc() -> Nvcc | None:
    """The nvcc to build the CUDA kernels with, or None where they are not to be built. Says which, and why."""
    mode = _mode(BUILD_CUDA)
    if mode == "0":
        return None
    if mode == "auto" and not sys.platform.startswith("linux"):
        print(f"mixer_kernels: no CUDA kernels: they are tried on Linux only; {BUILD_CUDA}=1 builds them here too")
        return None
    nvcc, looked_for = find_nvcc()
    if nvcc:
        print(f"mixer_kernels: CUDA kernels with {nvcc.path}, CUDA {nvcc.version[0]}.{nvcc.version[1]}")
    elif mode == "1":
        raise SystemExit(
            f"mixer_kernels: {BUILD_CUDA}=1, but there is no nvcc that works. Looked for:\n{looked_for}\n"
            f"Install the CUDA toolkit, {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer, and a C++ compiler that it takes, "
            "or name nvcc in CUDACXX or the toolkit's folder in CUDA_HOME. "
            f"{BUILD_CUDA}=0 installs without the CUDA kernels."
        )
    else:
        print(f"mixer_kernels: no CUDA kernels, since there is no nvcc that works. Looked for:\n{looked_for}")
    return nvcc


def find_nvcc() -> tuple[Nvcc | None, str]:
    """The first nvcc that compiles a kernel, and a line for each place that was looked at before."""
    looked_for: list[str] = []
    for place, path in _candidates():
        if path is None:
            looked_for.append(f"  {place}: no nvcc")
            continue
        nvcc, problem = _probe(path)
        if nvcc:
            return nvcc, "\n".join(looked_for)
        looked_for.append(f"  {place}: {path}: {problem}")
    return None, "\n".join(looked_for)


def cmake_architectures(nvcc: Nvcc) -> list[str]:
    """CMAKE_CUDA_ARCHITECTURES: machine code for each of ``MIXER_KERNELS_CUDA_ARCHS``, or for the default ones.

    The oldest and the newest are there as PTX too, which the driver translates for GPUs that none of the others fits.
    PTX of an architecture-specific target (90a) would not run on another.
    """
    known = _known_architectures(nvcc)
    text = os.environ.get(CUDA_ARCHS, "").strip()
    if text:
        names = list(dict.fromkeys(name.strip() for name in re.split("[;,]", text.strip(";,"))))
        for name in names:
            _check_architecture(name, known, nvcc)
    else:
        names = [name for name in DEFAULT_ARCHITECTURES if _number(name) in known]
    names.sort(key=lambda name: (_number(name), name))
    portable = [name for name in names if name.isdigit()]
    return [name if name in (portable[:1] + portable[-1:]) else f"{name}-real" for name in names]


def _missing_tools() -> list[str]:
    """All but the programs that are here already: a distribution's CMake is as good, and CMake's wheel is large."""
    return [tool for tool in BUILD_TOOLS if not _is_there(tool.partition(">=")[0])]


def _is_there(program: str) -> bool:
    path = shutil.which(program) if program in PROGRAMS else None
    if path is None:
        return False
    try:
        version = re.search(r"(\d+)\.(\d+)", _run([path, "--version"]).stdout)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return version is not None and (int(version[1]), int(version[2])) >= PROGRAMS[program]


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """For hooks whose result is the same with and without kernels: setup.py need not look for compilers."""
    before = {variable: os.environ.get(variable) for variable in (BUILD_CPU, BUILD_CUDA)}
    os.environ.update(dict.fromkeys(before, "0"))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def _candidates() -> Iterator[tuple[str, str | None]]:
    """Where nvcc may be: what the place is called, and the program there or None."""
    if os.environ.get("CUDACXX"):
        yield f"CUDACXX={os.environ['CUDACXX']}", shutil.which(os.environ["CUDACXX"])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folder = Path(os.environ[variable], "bin")
            yield f"{variable}={os.environ[variable]}", shutil.which("nvcc", path=str(folder))
        else:
            yield f"{variable} (not set)", None
    yield "PATH", shutil.which("nvcc")
    if os.name == "posix":
        yield DEFAULT_TOOLKIT, shutil.which("nvcc", path=f"{DEFAULT_TOOLKIT}/bin")


def _probe(path: str) -> tuple[Nvcc | None, str]:
    """Compile a kernel to an object: this needs a host compiler that nvcc supports, and the toolkit's headers."""
    host_compiler = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE, encoding="utf-8")
        command = [path, *host_compiler, "-std=c++17", f"-arch=sm_{OLDEST_ARCHITECTURE}", "-c", str(source)]
        try:
            compiled = _run([*command, "-o", str(source.with_suffix(".o"))])
            version = re.search(r"release (\d+)\.(\d+)", _run([path, "--version"]).stdout)
        except OSError as error:
            return None, str(error)
        except subprocess.TimeoutExpired as error:
            return None, f"no answer within {error.timeout:.0f} s"
    if compiled.returncode != 0 or not version:
        output = (compiled.stderr + compiled.stdout).strip().replace("\n", "\n    ")
        return None, f"does not compile a kernel (exit status {compiled.returncode}):\n    {output}"
    nvcc = Nvcc(path, (int(version[1]), int(version[2])))
    if nvcc.version < OLDEST_NVCC:
        return None, f"CUDA {version[1]}.{version[2]}, expected {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer"
    return nvcc, ""


def _known_architectures(nvcc: Nvcc) -> list[int]:
    listed = _run([nvcc.path, "--list-gpu-code"]).stdout
    return sorted({int(number) for number in re.findall(r"\bsm_(\d+)", listed)})


def _check_architecture(name: str, known: list[int], nvcc: Nvcc) -> None:
    usable = [number for number in known if number >= OLDEST_ARCHITECTURE]
    if re.fullmatch(r"\d+a?", name) and _number(name) in usable and (name.isdigit() or _number(name) >= 90):
        return
    raise SystemExit(
        f"mixer_kernels: {CUDA_ARCHS}: got {name!r}, expected compute capabilities without the dot, such as 80;90a, "
        f"of those that CUDA {nvcc.version[0]}.{nvcc.version[1]} compiles for and the kernels run on: "
        f"{', '.join(map(str, usable))}, and from 90 also with an a"
    )


def _number(architecture: str) -> int:
    return int(architecture.removesuffix("a"))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
