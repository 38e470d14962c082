"""How the package is built: which nvcc, for which architectures, and that nothing goes wrong in silence."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pybind11
import pyproject_hooks
import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "MIXER_KERNELS_BUILD_CPU", "CXX", "MIXER_KERNELS_BUILD_CUDA", "MIXER_KERNELS_CUDA_ARCHS",
    "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip
KERNEL = """
#include <cuda_runtime.h>

__global__ void kernel(int* x) {
    if (x) *x = 1;
}

extern "C" int launch() {
    kernel<<<1, 1>>>(nullptr);
    return cudaGetLastError();
}
"""
BIND = """
#include <pybind11/pybind11.h>

#include "build_info.h"

extern "C" int launch();

PYBIND11_MODULE(_C, module) {
    mixer_kernels::describe_build(module);
    module.def("launch", &launch);
}
"""
# A toolkit that knows sm_75 to sm_90, as far as looking for one goes: it says that it compiles.
NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release {version}, V{version}.99" ;;
    *--list-gpu-code*) echo "sm_75 sm_80 sm_86 sm_90" ;;
    *) {compiling} ;;
esac
"""


def load_backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_build", ROOT / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_nvcc = pytest.mark.skipif(load_backend().find_nvcc()[0] is None, reason="waits for a machine with nvcc")


def put_nvcc(folder: Path, *, version: str = "12.4", compiling: str = "true") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text(NVCC.format(version=version, compiling=compiling))
    path.chmod(0o755)
    return path


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The build backend on a Linux without any toolkit and with none of its settings."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    module = load_backend()
    monkeypatch.setattr(module, "DEFAULT_TOOLKIT", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "platform", "linux")
    return module


def make_tree(folder: Path, kernel: str = KERNEL) -> Path:
    """A package of one kernel, built by this project's own files."""
    for name in ("setup.py", "_build.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc").mkdir()
    shutil.copy(ROOT / "csrc/build_info.h", folder / "csrc")
    (folder / "csrc/kernel.cu").write_text(kernel)
    (folder / "csrc/bind.cpp").write_text(BIND)
    (folder / "mixer_kernels").mkdir()
    (folder / "mixer_kernels/__init__.py").write_text('__version__ = "1.2"\n')
    return folder


def without_toolkit(tree: Path) -> Path:
    """``tree``, looking for the default toolkit in a place where there is none."""
    text = (tree / "_build.py").read_text()
    assert text.count('"/usr/local/cuda"') == 1
    (tree / "_build.py").write_text(text.replace('"/usr/local/cuda"', '"/no/such/folder"'))
    return tree


def build(tree: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """``python -m build``: an sdist, and a wheel from what is in it; without torch, nor CPU kernels unless asked."""
    poison = tree.parent / "poison"
    poison.mkdir(exist_ok=True)
    (poison / "torch.py").write_text("raise ImportError('building asked for torch')\n")
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    pure = {"PYTHONPATH": str(poison), "MIXER_KERNELS_BUILD_CPU": "0"}
    return subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), *arguments, str(tree)],
        capture_output=True, text=True, timeout=300, env=environment | pure | settings,
    )  # fmt: skip


def only_wheel(tree: Path) -> Path:
    [wheel] = (tree / "dist").glob("*.whl")
    return wheel


# ------------------------------------------------------------------------------------------------- looking for nvcc


def test_without_nvcc_the_build_is_pure_and_says_where_it_looked(backend, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert backend.wanted_nvcc() is None
    output = capsys.readouterr().out
    for place in ("CUDACXX=/no/such/nvcc", f"CUDA_HOME={tmp_path}", "CUDA_PATH (not set)", "PATH", f"{tmp_path}/empty"):
        assert f"  {place}: no nvcc" in output


def test_asked_for_without_nvcc_is_an_error_that_says_where_it_looked(backend, monkeypatch):
    monkeypatch.setenv("MIXER_KERNELS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"=1, but there is no nvcc that works(.|\n)*CUDA_HOME \(not set\): no nvcc"):
        backend.wanted_nvcc()


def test_an_nvcc_that_does_not_compile_is_passed_over_with_its_output(backend, monkeypatch, capsys, tmp_path):
    broken = put_nvcc(tmp_path / "broken", compiling="echo unsupported GNU version >&2; exit 1")
    working = put_nvcc(tmp_path / "toolkit/bin")
    monkeypatch.setenv("CUDACXX", str(broken))
    assert backend.wanted_nvcc() is None
    assert "unsupported GNU version" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    assert backend.wanted_nvcc() == (str(working), (12, 4))
    assert {"cmake", "ninja", "pybind11"} <= {
        name.partition(">=")[0] for name in backend.get_requires_for_build_wheel()
    }


def test_what_was_named_is_tried_before_what_lies_about(backend, monkeypatch, tmp_path):
    places = ("default/bin", "path", "cuda_path/bin", "cuda_home/bin", "named")
    nvccs = [put_nvcc(tmp_path / place) for place in places]
    monkeypatch.setattr(backend, "DEFAULT_TOOLKIT", str(tmp_path / "default"))
    for nvcc, setting in zip(nvccs, ("", "PATH", "CUDA_PATH", "CUDA_HOME", "CUDACXX"), strict=True):
        if setting:
            monkeypatch.setenv(setting, str(nvcc if setting == "CUDACXX" else nvcc.parent).removesuffix("/bin"))
        assert backend.wanted_nvcc().path == str(nvcc)


def test_an_nvcc_that_is_too_old_is_not_taken(backend, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDACXX", str(put_nvcc(tmp_path, version="11.8")))
    assert backend.wanted_nvcc() is None
    assert "CUDA 11.8, expected 12.0 or newer" in capsys.readouterr().out


def test_zero_does_not_look(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(put_nvcc(tmp_path)))
    assert backend.wanted_nvcc() is not None
    monkeypatch.setenv("MIXER_KERNELS_BUILD_CUDA", "0")
    assert backend.wanted_nvcc() is None


def test_outside_linux_the_kernels_are_built_where_they_are_asked_for(backend, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDACXX", str(put_nvcc(tmp_path)))
    monkeypatch.setattr(sys, "platform", "win32")
    assert backend.wanted_nvcc() is None
    assert "MIXER_KERNELS_BUILD_CUDA=1" in capsys.readouterr().out
    monkeypatch.setenv("MIXER_KERNELS_BUILD_CUDA", "1")
    assert backend.wanted_nvcc() is not None


@pytest.mark.parametrize("value", ["yes", "2", "true"])
def test_other_values_are_refused(backend, monkeypatch, value):
    monkeypatch.setenv("MIXER_KERNELS_BUILD_CUDA", value)
    with pytest.raises(SystemExit, match=f"got '{value}', expected auto, 0 or 1"):
        backend.wanted_nvcc()


# --------------------------------------------------------------------------------------------- looking for a compiler

needs_cxx = pytest.mark.skipif(load_backend().find_cxx()[0] is None, reason="waits for a machine with a C++ compiler")


def put_compiler(folder: Path, compiling: str = "true", name: str = "g++") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{compiling}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_there_are_no_cpu_kernels_and_it_says_where_it_looked(backend, monkeypatch, capsys):
    assert backend.wanted_cxx() is None
    output = capsys.readouterr().out
    assert "no CPU kernels, since there is no C++ compiler that works" in output
    assert all(f"  {name}: not there" in output for name in ("c++", "g++", "clang++"))
    monkeypatch.setenv("MIXER_KERNELS_BUILD_CPU", "1")
    with pytest.raises(SystemExit, match=r"BUILD_CPU=1, but there is no C\+\+ compiler(.|\n)*python3-dev"):
        backend.wanted_cxx()


def test_a_compiler_that_lacks_something_is_passed_over_with_its_output(backend, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(put_compiler(tmp_path / "bin", "echo no Python.h >&2; exit 1").parent))
    assert backend.wanted_cxx() is None
    assert "no Python.h" in capsys.readouterr().out
    working = put_compiler(tmp_path / "bin", name="clang++")
    assert backend.wanted_cxx() == str(working)
    assert {"cmake", "ninja", "pybind11"} <= {
        name.partition(">=")[0] for name in backend.get_requires_for_build_wheel()
    }
    monkeypatch.setenv("CXX", "no-such-compiler")  # what was named is taken, or nothing
    assert backend.wanted_cxx() is None
    monkeypatch.setenv("MIXER_KERNELS_BUILD_CPU", "0")
    monkeypatch.setenv("CXX", str(working))
    assert backend.wanted_cxx() is None


@needs_cxx
def test_cpu_kernels_are_built_into_the_wheel_without_torch(tmp_path):
    """They load without torch, on one thread, and carry no OpenMP runtime."""
    tree = make_tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc/cpu", tree / "csrc/cpu")
    result = build(tree, MIXER_KERNELS_BUILD_CPU="1", MIXER_KERNELS_BUILD_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "-py3-none-any" not in only_wheel(tree).name
    with zipfile.ZipFile(only_wheel(tree)) as archive:
        archive.extractall(tmp_path / "installed")
    program = "import mixer_kernels._cpu as m; print('baseline' in m.built, m.runs_here('baseline'), m.has_pool())"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert loaded.stdout == "True True False\n", loaded.stderr


@needs_cxx
def test_a_compile_error_of_the_cpu_kernels_fails_the_build(tmp_path):
    tree = make_tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc/cpu", tree / "csrc/cpu")
    (tree / "csrc/cpu/kernels.cpp").write_text("int x = one;\n")
    result = build(tree, "--wheel", MIXER_KERNELS_BUILD_CUDA="0", MIXER_KERNELS_BUILD_CPU="1")
    assert result.returncode != 0 and "building the CPU kernels failed" in result.stdout + result.stderr
    assert not list((tree / "dist").glob("*.whl"))


# ---------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", ["80", "90a-real"]),  # the defaults that this nvcc knows
        ("80", ["80"]),
        ("90a", ["90a-real"]),
        ("86; 80 ,90", ["80", "86-real", "90"]),
        ("90,90a,90", ["90", "90a-real"]),
        ("80;", ["80"]),
    ],
)
def test_architectures(backend, monkeypatch, tmp_path, setting, expected):
    monkeypatch.setenv("CUDACXX", str(put_nvcc(tmp_path)))
    monkeypatch.setenv("MIXER_KERNELS_CUDA_ARCHS", setting)
    assert backend.cmake_architectures(backend.wanted_nvcc()) == expected


@pytest.mark.parametrize("wrong", ["sm_80", "8.0", "75", "120", "80a", "90b", "80 90", "80-real", ""])
def test_wrong_architectures_are_refused(backend, monkeypatch, tmp_path, wrong):
    monkeypatch.setenv("CUDACXX", str(put_nvcc(tmp_path)))
    monkeypatch.setenv("MIXER_KERNELS_CUDA_ARCHS", f"90;{wrong};80")
    with pytest.raises(SystemExit, match=f"MIXER_KERNELS_CUDA_ARCHS: got '{wrong}', expected .* 80;90a.* 80, 86, 90"):
        backend.cmake_architectures(backend.wanted_nvcc())


@needs_nvcc
def test_default_architectures_of_this_nvcc(monkeypatch):
    monkeypatch.delenv("MIXER_KERNELS_CUDA_ARCHS", raising=False)
    backend = load_backend()
    nvcc, _ = backend.find_nvcc()
    expected = ["80", "90a-real", "100-real", "120"] if nvcc.version >= (12, 8) else ["80", "90a-real"]
    assert backend.cmake_architectures(nvcc) == expected


# ------------------------------------------------------------------------------------------------------ whole builds


def test_a_build_without_nvcc_makes_a_pure_wheel(tmp_path):
    tree = without_toolkit(make_tree(tmp_path / "tree"))
    result = build(tree, PATH="/no/such/folder")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no CUDA kernels, since there is no nvcc that works" in result.stdout
    assert only_wheel(tree).name == "mixer_kernels-1.2-py3-none-any.whl"


def test_a_build_that_asks_for_cuda_without_nvcc_fails(tmp_path):
    tree = without_toolkit(make_tree(tmp_path / "tree"))
    result = build(tree, PATH="/no/such/folder", MIXER_KERNELS_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "MIXER_KERNELS_BUILD_CUDA=1, but there is no nvcc that works" in result.stdout + result.stderr
    assert not list((tree / "dist").glob("*.whl"))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize(
    ("compiling", "cmake", "expected"),
    [
        ("false", None, []),
        ("true", None, ["cmake>=3.24", "ninja>=1.10", "pybind11>=2.13"]),
        ("true", "echo cmake version 3.22.1", ["cmake>=3.24", "ninja>=1.10", "pybind11>=2.13"]),
        ("true", "echo cmake version 3.31.0", ["ninja>=1.10", "pybind11>=2.13"]),
        ("true", "exit 1", ["cmake>=3.24", "ninja>=1.10", "pybind11>=2.13"]),
    ],
)
def test_build_tools_are_asked_for_where_nvcc_works_and_they_are_missing(tmp_path, kind, compiling, cmake, expected):
    tree = without_toolkit(make_tree(tmp_path / "tree"))
    programs = put_nvcc(tmp_path / "programs", compiling=compiling).parent
    if cmake:
        (programs / "cmake").write_text(f"#!/bin/sh\n{cmake}\n")
        (programs / "cmake").chmod(0o755)

    def run(command, cwd=None, extra_environ=None):
        environment = {"PATH": str(programs)} | (extra_environ or {})
        subprocess.run(command, cwd=cwd, env=environment, check=True, timeout=60)

    hooks = pyproject_hooks.BuildBackendHookCaller(str(tree), "_build", backend_path=["."], runner=run)
    assert getattr(hooks, f"get_requires_for_build_{kind}")() == expected


def test_missing_build_tools_are_named(tmp_path):
    tree = make_tree(tmp_path / "tree")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/sitecustomize.py").write_text("import sys\nsys.modules['pybind11'] = None\n")
    environment = {"PYTHONPATH": str(tmp_path / "hidden"), "PATH": os.environ["PATH"], "MIXER_KERNELS_BUILD_CPU": "0"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=tree, capture_output=True, text=True, timeout=60,
        env=environment | {"CUDACXX": str(put_nvcc(tmp_path / "nvcc"))},
    )  # fmt: skip
    assert result.returncode != 0
    assert "missing: pybind11. Install them" in result.stderr
    assert "MIXER_KERNELS_BUILD_CUDA=0" in result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of one kernel and its wheel for sm_80."""
    tree = make_tree(tmp_path_factory.mktemp("cuda") / "tree")
    result = build(tree, MIXER_KERNELS_BUILD_CUDA="1", MIXER_KERNELS_CUDA_ARCHS="80", MAX_JOBS="2")
    assert result.returncode == 0, result.stdout + result.stderr
    return tree


@needs_nvcc
def test_a_cuda_build_imports_without_a_driver_and_says_what_it_is(built, tmp_path):
    assert "-py3-none-any" not in only_wheel(built).name
    with zipfile.ZipFile(only_wheel(built)) as archive:
        archive.extractall(tmp_path)
    program = """
import json
from pathlib import Path
import mixer_kernels._C as module
NAMES = ("on_host", "runtime_version", "architectures", "ptx", "sm90_sources")
loaded = [line for line in Path("/proc/self/maps").read_text().splitlines() if "libcuda" in line or "libstdc++" in line]
facts = {name: getattr(module, name) for name in NAMES}
print(json.dumps(facts | {"loaded": loaded, "launch": module.launch()}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    major, minor = load_backend().find_nvcc()[0].version
    assert facts.pop("launch") in (0, 35, 100)  # done; no driver, or one that is too old; no device
    assert facts == {
        "on_host": False,
        "runtime_version": 1000 * major + 10 * minor,
        "architectures": ["80"],
        "ptx": ["80"],
        "sm90_sources": "",
        "loaded": [],
    }


@needs_nvcc
def test_the_kernels_of_sm90_are_known_by_a_digest_of_their_sources(tmp_path):
    """Of what is compiled: not of comments and blanks."""
    tree = make_tree(tmp_path / "tree")
    source = tree / "csrc/sm90/kernel.cu"
    source.parent.mkdir()
    command = [
        "cmake", "-S", str(tree), "-B", str(tmp_path / "objects"), "-G", "Ninja",
        "-DCMAKE_CUDA_ARCHITECTURES=80;90a-real", f"-DCMAKE_CUDA_COMPILER={load_backend().find_nvcc()[0].path}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip

    def digest(text: str, *options: str) -> str:
        source.write_text(text)
        configured = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
        assert configured.returncode == 0, configured.stdout + configured.stderr
        found = re.findall(r'SM90_SOURCES=\\"(\w+)', (tmp_path / "objects/build.ninja").read_text())
        return found[0] if found else ""

    first = digest("int x;  // [once; more]\n")
    assert len(first) == 12
    assert digest("// said better\nint\tx;\n") == first
    assert digest("int y;\n") != first
    assert digest("int x;\n", "-DCMAKE_CUDA_ARCHITECTURES=80;90") == ""


@needs_nvcc
def test_a_compile_error_fails_the_build(built, tmp_path):
    tree = make_tree(tmp_path / "tree", KERNEL.replace("*x = 1;", "*x = one;"))
    result = build(tree, "--wheel", MIXER_KERNELS_CUDA_ARCHS="80")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert 'identifier "one" is undefined' in output
    assert "building the CUDA kernels failed" in output
    assert not list((tree / "dist").glob("*.whl"))


@needs_nvcc
def test_files_with_bounded_waits_link(tmp_path):
    """What a barrier calls that waits for ever is in each of them."""
    nvcc = load_backend().find_nvcc()[0].path
    waits = '#include "device/barrier.cuh"\n__global__ void wait_{}() {{ mixer_kernels::barrier_wait(0, 0); }}\n'
    for name in "ab":
        (tmp_path / f"{name}.cu").write_text(waits.format(name))
    command = [nvcc, "-std=c++17", "-arch=sm_90a", "-DMK_BOUNDED_WAITS", f"-I{ROOT / 'csrc'}", "-shared"]
    command += ["-Xcompiler=-fPIC", "a.cu", "b.cu", "-o", "both.so"]
    linked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert linked.returncode == 0, linked.stderr
