"""The source distribution is complete; the wheel without CUDA is pure Python and holds the package alone."""

from __future__ import annotations

import ast
import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mixer_kernels", "csrc", "tests", "benchmarks", "examples", "docs", "tools", ".ci")
FILES = (
    "pyproject.toml", "setup.py", "_build.py", "CMakeLists.txt", "MANIFEST.in", "conftest.py", "Makefile",
    "requirements-dev.txt", "requirements-dev-no-deps.txt",
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", ".gitignore", ".clang-format",
)  # fmt: skip


class Built(NamedTuple):
    sources: set[str]
    sdist: set[str]
    wheel: set[str]
    wheel_name: str
    metadata: email.message.Message
    tag: email.message.Message


def sources() -> set[str]:
    """Every file that the repository holds, relative to its root."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = (p.relative_to(ROOT).as_posix() for p in paths if "__pycache__" not in p.parts and p.suffix != ".so")
    return {*kept, *FILES}


def declared_version() -> str:
    tree = ast.parse((ROOT / "mixer_kernels/__init__.py").read_text())
    [version] = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    return version


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution, and the wheel made from what is in it, both without torch."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in sources():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (tree / "mixer_kernels/_C.planted.so").write_text("left by an earlier build in place")
    no_torch = tmp_path_factory.mktemp("no_torch")
    (no_torch / "torch.py").write_text("raise ImportError('building asked for torch')\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(no_torch), "MIXER_KERNELS_BUILD_CUDA": "0"}
    environment["MIXER_KERNELS_BUILD_CPU"] = "0"
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        [info] = {name.partition("/")[0] for name in in_wheel if ".dist-info/" in name}
        metadata, tag = (email.message_from_bytes(archive.read(f"{info}/{name}")) for name in ("METADATA", "WHEEL"))
    return Built(sources(), in_sdist, in_wheel, wheel.name, metadata, tag)


def test_sdist_is_complete(built: Built) -> None:
    made = {name for name in built.sdist if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert built.sdist - made == built.sources


def test_sdist_holds_what_the_cuda_kernels_are_built_from(built: Built) -> None:
    needed = {"_build.py", "CMakeLists.txt", "csrc/bind.cpp", "csrc/build_info.h", "csrc/mixer_kernels.h"}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cu*")}
    assert needed <= built.sdist


def test_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    package = {name for name in built.sources if name.startswith("mixer_kernels/")}
    assert "mixer_kernels/py.typed" in package
    assert {name for name in built.wheel if ".dist-info/" not in name} == package


def test_wheel_is_pure_python_and_carries_the_license(built: Built) -> None:
    assert built.wheel_name.endswith("-py3-none-any.whl")
    assert built.tag["Root-Is-Purelib"] == "true"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in built.wheel)


def test_metadata(built: Built) -> None:
    assert built.metadata["Version"] == declared_version()
    assert built.metadata["License-Expression"] == "Apache-2.0"
    assert built.metadata["Requires-Python"] == ">=3.10"
    requires = built.metadata.get_all("Requires-Dist")
    always = {requirement for requirement in requires if "extra ==" not in requirement}
    assert always == {"torch>=2.6", "numpy", 'triton>=3.2; sys_platform == "linux"'}
    assert {"test", "bench", "timm"} <= set(built.metadata.get_all("Provides-Extra"))


def test_changelog_has_the_version() -> None:
    assert f"## [{declared_version()}]" in (ROOT / "CHANGELOG.md").read_text()
