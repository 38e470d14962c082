"""tools/cuda_gates.py notices what it is there for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tools/cuda_gates.py"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gates = load("cuda_gates", PROGRAM)


def has_tools() -> bool:
    try:
        gates.find_tools()
    except LookupError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_tools(), reason="waits for a machine with nvcc and cuobjdump")

ATOMICS = "for (int i = 0; i < 4; ++i) atomicAdd(out + i, d[i]);"
STORE = "*reinterpret_cast<float4*>(out + 4 * threadIdx.x) = make_float4(d[0], d[1], d[2], d[3]);"
PRODUCT = """
#include "names.h"
namespace mixer_kernels {{
template <class T, int N>
__global__ void {name}(float* out, unsigned a, unsigned b) {{
    float d[4] = {{0.f, 0.f, 0.f, 0.f}};
    for (int i = 0; i < N; ++i)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{{%0,%1,%2,%3}}, {{%4,%4,%4,%4}}, {{%5,%5}}, {{%0,%1,%2,%3}};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(b));
    {end}
}}
template __global__ void {name}<Half, 3>(float*, unsigned, unsigned);
}}
"""
SPILLS = """
__global__ void __launch_bounds__(1024, 2) row_statistics(float* x) {
    float v[128];
    for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
    for (int i = 0; i < 128; ++i) v[i] = v[i] * v[(i * 7 + 1) % 128] + 1.f;
    __syncthreads();
    for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
"""
LOCAL = """
__global__ void row_statistics(float* x, int i) {
    float v[128];
    for (int j = 0; j < 128; ++j) v[j] = x[j];
    x[0] = v[i] + v[i + 1];
}
"""


def product(name: str = "products", end: str = STORE) -> str:
    return PRODUCT.format(name=name, end=end)


def run(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "names.h").write_text("struct Half {};\n")
    (folder / "planted.cu").write_text(source)
    command = [sys.executable, str(PROGRAM), str(folder / "planted.cu"), "--cache", str(folder / "cache"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@needs_nvcc
def test_a_kernel_without_problems_is_a_row_for_each_architecture(tmp_path):
    result = run(tmp_path, product(), "--arch", "sm_80", "sm_90a")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "products" in line]
    assert {row[0] for row in rows} == {"sm_80", "sm_90a"}
    for row in rows:
        assert " ".join(row[1:3]) == "products<Half, 3>"
        assert 0 < int(row[3]) <= 255 and row[4:7] == ["0", "0", "0"]
        assert row[7:9] == ["HMMA", "3"]


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SPILLS, "row_statistics: [0-9]+ bytes of spills"),
        (LOCAL, "row_statistics: [0-9]+ bytes of stack"),
        ("__global__ void fc1(float* x) { x[0] = 1.f; }", "fc1: no HMMA"),
        (product(end=ATOMICS), "products<Half, 3>: 4 atomics on floats"),
        ("__global__ void pack(float* x) { int unused; x[0] = 1.f; }", 'nvcc failed\n(.*\n)*.*"unused" was declared'),
        ("__global__ void pack(float* x) { x[0] = one; }", 'nvcc failed\n(.*\n)*.*identifier "one" is undefined'),
    ],
    ids=["spill", "local", "product", "atomic", "warning", "error"],
)  # fmt: skip
def test_planted_problems_fail(tmp_path, source, message):
    result = run(tmp_path, source, "--arch", "sm_80")
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"^FAILED sm_80 planted.cu: {message}", result.stdout, re.MULTILINE), result.stdout


@needs_nvcc
def test_what_passed_is_not_compiled_again_until_it_changes(tmp_path, monkeypatch):
    compiled = []
    original = gates.compile_file
    monkeypatch.setattr(gates, "compile_file", lambda *arguments: compiled.append(1) or original(*arguments))
    tools, source, header = gates.find_tools(), tmp_path / "planted.cu", tmp_path / "names.h"

    def reports(text: str, header_text: str = "struct Half {};\n"):
        header.write_text(header_text)
        source.write_text(text)
        before = len(compiled)
        return gates.cached(tools, source, "sm_80", tmp_path / "cache"), len(compiled) - before

    first, times = reports(product())
    assert times == 1 and first.problems() == []
    assert reports(product()) == (first, 0)
    assert reports(product(), "struct Half { int more; };\n")[1] == 1  # an included file
    broken = product(end="not C++")
    assert [reports(broken)[1], reports(broken)[1]] == [1, 1]  # what failed is compiled again


def test_performance_notes_of_ptxas_are_problems():
    note = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    report = gates.Report(True, f"ptxas info    : 0 bytes gmem\n{note}", 1.0, [])
    assert report.problems() == [note]


def test_names_are_short():
    [name] = gates.demangled(["_ZN13mixer_kernels12_GLOBAL__N_112token_mixingINS_8bfloat16ELi208EEEvNS_9ArgumentsE"])
    assert name == "token_mixing<bfloat16, 208>"


def test_without_nvcc_it_says_where_it_looked(tmp_path, monkeypatch, capsys):
    backend = load("_build", ROOT / "_build.py")
    monkeypatch.setattr(backend, "DEFAULT_TOOLKIT", str(tmp_path))
    monkeypatch.setitem(sys.modules, "_build", backend)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert gates.main(["--arch", "sm_80"]) == 2
    assert "nvcc not found. Looked for:\n  CUDA_HOME (not set): no nvcc\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--arch", "80"], ["--jobs", "0"], ["no/such/file.cu"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        gates.main(arguments)
    assert exit.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
