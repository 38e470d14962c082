"""The sources of csrc/cpu: under sanitizers, with vectors of every length, and what they export."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc/cpu"
X86 = platform.machine() in ("x86_64", "AMD64")
SIZES = {4: [], 8: ["-mavx2", "-mfma"], 16: ["-mavx2", "-mfma"]}  # lanes; 16 as pairs of 8, where there is no AVX-512
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="waits for a machine with a C++ compiler")


def has_avx2() -> bool:
    return X86 and Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text()


def run_driver(folder: Path, lanes: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile the kernels with vectors of ``lanes`` floats, and check them by tests/cpu_kernels/driver.cpp."""
    program = folder / "driver"
    flags = SIZES[lanes] if has_avx2() else []
    command = [
        COMPILER, "-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=fast", "-DMIXER_KERNELS_ISA=baseline",
        f"-DMIXER_KERNELS_LANES={lanes}", f"-I{CSRC}", *flags, *options, CSRC / "kernels.cpp", CSRC / "run.cpp",
        ROOT / "tests/cpu_kernels/driver.cpp", "-rdynamic", "-pthread", "-ldl", "-o", program,
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)


PLAIN, ADDRESS = (), ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")


@pytest.mark.parametrize(
    ("lanes", "options"),
    [pytest.param(4, PLAIN, id="4-plain"), *(pytest.param(lanes, ADDRESS, id=f"{lanes}-address") for lanes in SIZES)],
)
def test_right(lanes, options, tmp_path):
    """Vectors of every length, under sanitizers; and for tools/planted.py, quickly."""
    result = run_driver(tmp_path, lanes, *options)
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stdout + result.stderr[-3000:]


def test_threads_share_nothing_that_one_writes(tmp_path):
    result = run_driver(tmp_path, 8, "-g", "-fsanitize=thread")
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("waits for a kernel whose address space this compiler's ThreadSanitizer knows")
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stdout + result.stderr[-3000:]


@pytest.mark.skipif(not X86, reason="waits for a machine with several instruction sets: x86-64")
@pytest.mark.parametrize("optimised", ("-O0", "-O3"))
def test_instruction_sets_share_no_function(optimised, tmp_path):
    """A function with a name of its own for the linker could be taken from the object for a newer CPU."""
    obj = tmp_path / "kernels.o"
    command = [
        COMPILER, "-std=c++17", optimised, "-Wno-psabi", "-DMIXER_KERNELS_ISA=avx2", "-DMIXER_KERNELS_LANES=8",
        "-mavx2", "-mfma", "-c", CSRC / "kernels.cpp", "-o", obj,
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    symbols = subprocess.run(["nm", "-C", obj], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line.split()[-2] in "TVWDBRu"]
    assert [line.split()[-1] for line in shared] == ["mixer_kernels::cpu::kernels_avx2"], symbols
