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
# Four products of wgmma on tiles that TMA loads and stores; something in between keeps them from following each other.
WGMMA = """
#include "device/warpgroup.cuh"
namespace mixer_kernels {{
__global__ void __launch_bounds__(128, 1) products(const __grid_constant__ TensorMap map, float* out) {{
    const shared_address tile = address_of(shared_memory<char>());
    float d[32] = {{}};
    {load}
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {{
        wgmma<bfloat16, 64, Major::k, Major::k>(d, operand<Swizzle::bytes_128>(tile + 32 * i, 16, 1024),
                                                operand<Swizzle::bytes_128>(tile + 8192 + 32 * i, 16, 1024));
        {between}
    }}
    wgmma_commit();
    wgmma_wait<0>();
    keep(d);
    {store}
    for (int i = 0; i < 32; ++i) out[128 * i + threadIdx.x] = d[i];
}}
}}
"""
LOAD, STORE_TILE = "load_tile(tile, map, tile + 16384, 0, 0);", "store_tile(map, tile, 0, 0);"
# A row of a disassembly for each instruction of a word.
INSTRUCTIONS = {
    "product": "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;",
    "mma": "HMMA.16816.F32.BF16 R8, R4, R2, R8 ;",
    "fence": "WARPGROUP.ARRIVE ;",
    "all but one": "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
    "all": "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
    "load": "UTMALDG.3D [UR8], [UR4] ;",
    "store": "UTMASTG.3D [UR8], [UR4] ;",
    "gelu": "MUFU.EX2 R9, R9 ;",
}
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


def wgmma(load: str = LOAD, between: str = "", store: str = STORE_TILE) -> str:
    return WGMMA.format(load=load, between=between, store=store)


def run(folder: Path, source: str, *arguments: str, below: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "names.h").write_text("struct Half {};\n")
    planted = folder / below / "planted.cu"
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(source)
    command = [sys.executable, str(PROGRAM), str(planted), "--cache", str(folder / "cache"), *arguments]
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


# Products in a loop, and TURN, which is planted in each turn of it.
LOOP = """
#include "names.h"
namespace mixer_kernels {
__device__ float first_form(float z) { return z * __expf(-z); }
__device__ float second_form(float z) { return z * z * __expf(z + 1.f); }
__global__ void loop(float* out, unsigned a, unsigned b, int n, int columns, bool form) {
    float d[8][4] = {};
    for (int i = 0; i < n; ++i) {
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                         "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
                         : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]) : "r"(a), "r"(b));
        TURN
    }
    for (int j = 0; j < 8; ++j)
        for (int k = 0; k < 4; ++k) out[32 * (4 * j + k) + threadIdx.x] = d[j][k];
}
}
"""
# Two forms of an activation: a branch around all elements of a turn, or one around each.
ONE_BRANCH = """
        if (form) {
            #pragma unroll
            for (int j = 0; j < 8; ++j) d[j][0] = first_form(d[j][0]);
        } else {
            #pragma unroll
            for (int j = 0; j < 8; ++j) d[j][0] = second_form(d[j][0]);
        }
"""
A_BRANCH_EACH = """
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (form) { asm volatile(""); d[j][0] = first_form(d[j][0]); }
            else { asm volatile(""); d[j][0] = second_form(d[j][0]); }
        }
"""
DIVISION = ONE_BRANCH + "a += (i + static_cast<int>(b)) / columns;"
SLOW = """
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            for (int k = 0; k < 4; ++k) d[j][k] = first_form(d[j][k]);
"""


REGRESSIONS = {
    A_BRANCH_EACH: "at most 1 exponentials without a branch among them, expected 4",
    DIVISION: "1 integer divisions in a loop with products",
    SLOW: "the model gave it [0-9.]+% of the tensor peak, now [0-9.]+%, bound by mufu",
}


@needs_nvcc
def test_planted_regressions_of_machine_code_fail(tmp_path):
    kept = ("--arch", "sm_80", "--bounds", str(tmp_path / "bounds.json"))
    good = LOOP.replace("TURN", ONE_BRANCH)
    assert run(tmp_path, good, *kept, "--accept").returncode == 0
    again = run(tmp_path, good, *kept)
    assert again.returncode == 0 and "FAILED" not in again.stdout
    for turn, message in REGRESSIONS.items():
        result = run(tmp_path, LOOP.replace("TURN", turn), *kept)
        assert result.returncode == 1, result.stdout
        pattern = rf"^FAILED sm_80 planted.cu: loop: {message}.*`make cuda-gates ARGS=--accept`"
        assert re.search(pattern, result.stdout, re.MULTILINE), result.stdout


@needs_nvcc
def test_kernels_of_sm90_are_compiled_for_it_alone(tmp_path):
    result = run(tmp_path, wgmma(), "--arch", "sm_80", "sm_90a", below="sm90")
    assert result.returncode == 0, result.stdout + result.stderr
    [row] = [line.split() for line in result.stdout.splitlines() if "products" in line]
    assert row[0] == "sm_90a" and row[6:8] == ["HGMMA", "4"]


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (wgmma(between="d[0] *= 2.f;"), [r".*\(C75\d\d\)", "products: 4 WARPGROUP.ARRIVE for 4 HGMMA"]),
        (wgmma(load="", store=""), ["products: no UTMALDG", "products: no UTMASTG"]),
    ],
    ids=["serialized", "no TMA"],
)
def test_planted_problems_of_sm90_fail(tmp_path, source, messages):
    result = run(tmp_path, source, below="sm90")
    assert result.returncode == 1, result.stdout + result.stderr
    for message in messages:
        assert re.search(rf"^FAILED sm_90a planted.cu: {message}", result.stdout, re.MULTILINE), result.stdout


def sass(words: str) -> str:
    """A disassembly of two kernels, the first without a product: ``words`` of INSTRUCTIONS, with how many of each."""
    lines = [
        f"        /*{16 * i:04x}*/                   {INSTRUCTIONS[word]}"
        for i, (times, word) in enumerate(re.findall(r"(?:(\d+) )?([a-z]+(?: but one)?)", words))
        for _ in range(int(times or 1))
    ]
    return "\n".join(["\t\tFunction : other", "        /*0000*/  EXIT ;", "\t\tFunction : kernel", *lines])


STEP = "load, fence, 13 product, fence, 4 product, all but one, 64 gelu, all, 2 gelu, store"


@pytest.mark.parametrize(
    ("name", "words", "problem"),
    [
        ("token_mixing<64>", STEP, None),
        ("token_mixing<64>", STEP.replace("64 gelu, all", "all, 64 gelu"), "0 MUFU while a product runs, expected 32"),
        ("token_mixing<64>", STEP.replace("all but one", "all"), "0 MUFU while a product runs, expected 32"),
        ("token_data_gradient<64>", STEP.replace("all but one", "all but one, all"), None),  # all in a first step
        (
            "token_data_gradient<64>",
            STEP.replace(", all, 2", ", product, all, 2"),
            "0 MUFU while a product runs, expected 32",
        ),
        ("fc1<128>", STEP.replace("64 gelu, all", "all, 64 gelu"), None),
        ("fc1<128>", STEP.replace("13 product", "product, fence, product"), None),
        ("fc1<128>", STEP.replace("4 product", "").replace("13 product", "product"), "2 WARPGROUP.ARRIVE for 1 HGMMA"),
        ("fc1<128>", STEP.replace("13 product", "13 mma"), "13 HMMA: a part of its products is not wgmma"),
        ("fc1<128>", "load, 5 mma, store", "no HGMMA"),
        ("fc1<128>", STEP.replace("load", "fence"), "no UTMALDG"),
        ("fc1<128>", STEP.replace(", store", ""), "no UTMASTG"),
        ("merge_statistics", "gelu", None),
    ],
)
def test_what_machine_code_of_sm90_has_to_hold(name, words, problem):
    kernels = {mangled: gates.Kernel(mangled, sm90=True) for mangled in ("other", "kernel")}
    gates.count_instructions(kernels, sass(words))
    kernels["kernel"].name = name
    found = kernels["kernel"].problems()
    assert [each.partition(":")[0] for each in found] == ([] if problem is None else [problem.partition(":")[0]])


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
    [nested] = gates.demangled(["_ZN13mixer_kernels4sm906kernelINS0_4TileINS_8bfloat16ELi8EEEEEvT_"])
    assert nested == "kernel<Tile<bfloat16, 8>>"


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
