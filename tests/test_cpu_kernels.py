"""The sources of csrc/cpu: under sanitizers, with vectors of every length, with bugs planted, and what they export."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
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


def run_driver(folder: Path, lanes: int, *options: str, csrc: Path = CSRC) -> subprocess.CompletedProcess[str]:
    """Compile the kernels with vectors of ``lanes`` floats, and check them by tests/cpu_kernels/driver.cpp."""
    program = folder / "driver"
    flags = [
        "-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=fast", "-DMIXER_KERNELS_ISA=baseline",
        f"-DMIXER_KERNELS_LANES={lanes}", *(SIZES[lanes] if has_avx2() else []), *options,
    ]  # fmt: skip
    sources = [*(csrc / f"{name}.cpp" for name in ("kernels", "tsmixer", "run")), ROOT / "tests/cpu_kernels/driver.cpp"]
    objects = [compiled(source, flags, csrc) for source in sources]
    compile_(*flags, *objects, "-rdynamic", "-pthread", "-ldl", "-o", program)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)


_objects: dict[tuple, Path] = {}


def compiled(source: Path, flags: list[str], csrc: Path) -> Path:
    """Its object, made once from the same text: a planted bug leaves most of them as they are."""
    rule = compile_(*flags, f"-I{csrc}", "-MM", source)
    text = [Path(name).read_bytes() for name in rule.split(":", 1)[1].replace("\\\n", " ").split()]
    key = (source.name, *flags, *text)
    if key not in _objects:
        obj = Path(tempfile.mkdtemp(dir=_folder.name), f"{source.stem}.o")
        compile_(*flags, f"-I{csrc}", "-c", source, "-o", obj)
        _objects[key] = obj
    return _objects[key]


_folder = tempfile.TemporaryDirectory(prefix="mixer_kernels_cpu_")


def compile_(*arguments: str | Path) -> str:
    """Run the compiler; what it prints."""
    result = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("lanes", "products"), [(4, BF16), (8, ()), (16, TILES)])
def test_vectors_of_every_length_under_sanitizers(lanes, products, tmp_path):
    options = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover", *products)
    result = run_driver(tmp_path, lanes, *options, csrc=on_host(tmp_path))
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stdout + result.stderr[-3000:]


def run_under_thread_sanitizer(folder: Path, csrc: Path = CSRC) -> subprocess.CompletedProcess[str]:
    result = run_driver(folder, 8, "-g", "-fsanitize=thread", csrc=csrc)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("waits for a kernel whose address space this compiler's ThreadSanitizer knows")
    return result


def test_threads_share_nothing_that_one_writes(tmp_path):
    result = run_under_thread_sanitizer(tmp_path)
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("task, work.get() + thread * plan.work);", "task, work.get());"),
        ("std::atomic<int64_t> next_task{0}", "int64_t next_task{0}"),
    ],
    ids=["one work memory for all", "tasks counted without care"],
)
def test_a_race_is_caught(right, wrong, tmp_path):
    csrc = planted(tmp_path, "run.cpp", right, wrong)
    result = run_under_thread_sanitizer(tmp_path, csrc)
    assert "WARNING: ThreadSanitizer: data race" in result.stderr, result.stdout + result.stderr


def on_host(folder: Path) -> Path:
    """csrc/cpu in ``folder``, with products of bfloat16 in plain C++."""
    csrc = folder / "cpu"
    shutil.copytree(CSRC, csrc)
    shutil.copy(ROOT / "tests/cpu_kernels/bf16.h", csrc)
    return csrc


def planted(folder: Path, name: str, right: str, wrong: str) -> Path:
    """The same, with one thing changed."""
    csrc = on_host(folder)
    text = (csrc / name).read_text()
    assert right in text, f"{name} has no {right!r}: bring the planted bug up to date"
    (csrc / name).write_text(text.replace(right, wrong))
    return csrc


PLANTED = {  # file of csrc/cpu, what is there, what is planted
    "b1 dropped": ("mixing.h", "in, in_stride, b1, false, hidden", "in, in_stride, nullptr, false, hidden"),
    "b2 dropped forward": ("mixing.h", "hidden, stride, b2, false, value", "hidden, stride, nullptr, false, value"),
    "the last vector forgotten": ("product.h", "divided_up(N, kLanes)", "N / kLanes"),
    "rows left forgotten": ("product.h", "m += done;", "m += M;"),
    "eps dropped": ("norm.h", "Vector{}) + eps;", "Vector{}) + 300 * eps;"),
    "features behind the end in the statistics": (
        "norm.h", "only(load(x[i] + f, F - f) - s.mean[i], F - f)", "load(x[i] + f, F - f) - s.mean[i]"),
    "a coefficient's sign": ("functions.h", "-0.459212065f", "0.459212065f"),
    "slope without density": ("functions.h", "+ z * density", "+ 0.0f * density"),
    "softmax not divided": ("mixing.h", "= 1.0f / total", "= 1.0f + 0.0f * total"),
    "one term of the softmax's gradient": ("mixing.h", "of_gate - total))", "of_gate))"),
    "one factor of the sigmoid's gradient": ("mixing.h", "(1.0f - p) * of_gate :", "of_gate :"),
    "the sigmoid turned round": ("mixing.h", "1.0f / (1.0f + exp(-z))", "1.0f / (1.0f + exp(z))"),
    "the gate's own gradient dropped": (
        "mixing.h", "sums->w_gate);", "sums->w1);"),
    "one term of LayerNorm's gradient": ("norm.h", "(dxhat - m[i] - xhat * v[i])", "(dxhat - m[i])"),
    "LayerNorm's gradient in the affine map's place": (
        "norm.h", "store(m, affine ? Vector{} :", "store(m, false ? Vector{} :"),
    "residual dropped": (
        "kernels.cpp", "load(in[row + i] + shape.first + f, shape.F - f) + load(branch[i] + f)", "load(branch[i] + f)"),
    "the first slice's gamma": ("kernels.cpp", "widened(of_gamma[at])", "widened(of_gamma[f])"),
    "statistics of a slice": ("kernels.cpp", "number, shape.row, mixer.eps", "number, shape.F, mixer.eps"),
    "a slice on the first one's place": ("kernels.cpp", "shape.first + f,\n", "f,\n"),
    "x as if contiguous": (
        "kernels.cpp", "axis, false).addresses(static_cast<const T*>(call.x", "axis, true).addresses(static_cast<const T*>(call.x"),
    "images of another axis": ("kernels.cpp", "image / inner_size * outer", "image / inner_size * inner"),
    "w2's gradient not turned": ("kernels.cpp", "H, K, width, true)", "H, K, width)"),
    "sums of the first task only": ("kernels.cpp", "task < plan.tasks; ++task", "task < 1; ++task"),
    "one set of sums for all tasks": ("run.cpp", "sums.get() + task * size : nullptr", "sums.get() : nullptr"),
    "one term of the joint norm's gradient": ("joint_norm.h", "(d - a - xhat * b)", "(d - a)"),
    "channels behind the end in the joint statistics": (
        "joint_norm.h", "only(function(load(x + (s + i) * stride + c, C - c)), C - c)",
        "function(load(x + (s + i) * stride + c, C - c))"),
    "features' residual dropped": ("feature_mixing.h", "p.w_skip ? p.b_skip : x;", "p.w_skip ? p.b_skip : nullptr;"),
    "tokens' residual dropped backward": ("time_mixing.h", "load(g_ + at) + load(dn + at)", "load(dn + at)"),
    "kept rows of whole vectors": ("feature_mixing.h", "call_.kept_v ? O : whole(O)", "whole(O)"),
    "weights packed in another order": ("product.h", "to[k * rows + r] =", "to[r * K + k] ="),
}  # fmt: skip


OF_BF16 = {  # the same, in products of bfloat16
    "the last pair forgotten": ("product_bf16.h", "round_up(divided_up(K, 2), kTile)", "round_up(K / 2, kTile)"),
    "what lies behind an odd K": ("product_bf16.h", "k + 1 < K ? function", "true ? function"),
    "bias of a tile dropped": ("product_bf16.h", "(bias ? bias[m + r] : 0.0f)", "0.0f"),
    "rows of the first tile twice": ("product_bf16.h", "a + (words + k) * kTile", "a + k * kTile"),
    "no tiles configured": ("kernels.cpp", "const TilesInUse tiles;", ""),
}


@pytest.mark.parametrize(("name", "right", "wrong"), PLANTED.values(), ids=PLANTED.keys())
def test_bug_is_caught(name, right, wrong, tmp_path):
    assert_caught(run_driver(tmp_path, 4, csrc=planted(tmp_path, name, right, wrong)))


@pytest.mark.parametrize(("name", "right", "wrong"), OF_BF16.values(), ids=OF_BF16.keys())
def test_bug_in_products_of_bfloat16_is_caught(name, right, wrong, tmp_path):
    assert_caught(run_driver(tmp_path, 4, *TILES, csrc=planted(tmp_path, name, right, wrong)))


def assert_caught(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 1 and "expected" in result.stdout, result.stdout + result.stderr


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
