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
BF16, TILES = ("-DMIXER_KERNELS_BF16",), ("-DMIXER_KERNELS_BF16", "-DMIXER_KERNELS_AMX")  # by tests/cpu_kernels/bf16.h
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
ISAS = {
    "avx2": (8, SIZES[8]),
    "avx512_bf16": (16, [*AVX512, "-mavx512bf16", *BF16]),
    "avx512_amx": (16, [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", *TILES]),
}
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="waits for a machine with a C++ compiler")


def has_avx2() -> bool:
    return X86 and Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text()


def run_driver(folder: Path, lanes: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile the kernels with vectors of ``lanes`` floats, and check them by tests/cpu_kernels/driver.cpp."""
    program, csrc = folder / "driver", on_host(folder)
    flags = SIZES[lanes] if has_avx2() else []
    sources = [*(csrc / f"{name}.cpp" for name in ("kernels", "tsmixer", "run")), ROOT / "tests/cpu_kernels/driver.cpp"]
    command = [
        COMPILER, "-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=fast", "-DMIXER_KERNELS_ISA=baseline",
        f"-DMIXER_KERNELS_LANES={lanes}", f"-I{csrc}", *flags, *options, *sources, "-rdynamic", "-pthread", "-ldl",
        "-o", program,
    ]  # fmt: skip
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)


def on_host(folder: Path) -> Path:
    """csrc/cpu in ``folder``, with products of bfloat16 in plain C++."""
    csrc = folder / "cpu"
    shutil.copytree(CSRC, csrc)
    shutil.copy(ROOT / "tests/cpu_kernels/bf16.h", csrc)
    return csrc


PLAIN, ADDRESS = (), ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")
DRIVEN = {
    "4-plain": (4, PLAIN),
    "4-tiles": (4, TILES),
    "4-address": (4, (*ADDRESS, *BF16)),
    "8-address": (8, ADDRESS),
    "16-address": (16, (*ADDRESS, *TILES)),
}


@pytest.mark.parametrize(("lanes", "options"), DRIVEN.values(), ids=DRIVEN)
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
@pytest.mark.parametrize(
    ("source", "isa", "optimised"),
    [
        ("kernels", "avx2", "-O0"),
        ("kernels", "avx2", "-O3"),
        ("kernels", "avx512_amx", "-O1"),
        ("tsmixer", "avx2", "-O0"),
        ("tsmixer", "avx2", "-O3"),
    ],
)
def test_instruction_sets_share_no_function(source, isa, optimised, tmp_path):
    """A function with a name of its own for the linker could be taken from the object for a newer CPU."""
    obj = compiled_for(isa, tmp_path, f"{source}.cpp", optimised, "-c")
    symbols = subprocess.run(["nm", "-C", obj], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line.split()[-2] in "TVWDBRu"]
    assert [line.split()[-1] for line in shared] == [f"mixer_kernels::cpu::{source}_{isa}"], symbols
    code = subprocess.run(["objdump", "-d", obj], capture_output=True, text=True, check=True).stdout
    for name in ("tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg", "tilerelease", "vcvtne2ps2bf16"):
        assert (name in code) == (isa == "avx512_amx"), name


def compiled_for(isa: str, folder: Path, source: str, *options: str, csrc: Path = CSRC) -> Path:
    """``source`` of csrc, or of the tests' folder, with the instructions of ``isa``."""
    lanes, flags = ISAS[isa]
    there = csrc / source if (csrc / source).exists() else ROOT / "tests/cpu_kernels" / source
    result = folder / f"{there.stem}-{csrc.parent.name}"
    command = [
        COMPILER, "-std=c++17", "-fno-exceptions", "-Wno-psabi", f"-DMIXER_KERNELS_ISA={isa}",
        f"-DMIXER_KERNELS_LANES={lanes}", *flags, f"-I{csrc}", *options, there, "-o", result,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
        pytest.skip(f"waits for a compiler that knows {isa}")
    assert done.returncode == 0, done.stderr
    return result


def test_plain_dot_products_are_the_instructions(tmp_path):
    """Bit for bit, over pairs of all kinds of numbers: what stands in for an instruction computes what it does."""
    if not (Path("/proc/cpuinfo").exists() and "avx512_bf16" in Path("/proc/cpuinfo").read_text()):
        pytest.skip("waits for a CPU with avx512_bf16")
    results = []
    for csrc in (CSRC, on_host(tmp_path)):
        program = compiled_for("avx512_bf16", tmp_path, "dots.cpp", "-O1", csrc=csrc)
        results.append(subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines())
    assert len(results[0]) > 1000 and results[0] == results[1]
