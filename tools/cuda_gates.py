"""What nvcc says of every CUDA kernel, for each GPU architecture, without a GPU. See ``--help``.

A row a kernel: registers, stack, spills, static shared memory, matrix instructions, seconds. Failures: a warning, a
spill, any use of local memory, ptxas' notes of lost performance (C75xx), a product without matrix instructions, an
atomic on floats (its order, and so the result, would change from run to run).

A model of the machine code (mixer_kernels/machine_model) adds: integer divisions in a hot loop, exponentials one by one
behind branches, unless they are known of the kernel, and a share of the tensor peak below what
mixer_kernels/tuning/bounds.json keeps for the bfloat16 kernels of csrc. ``--accept`` keeps what is found.

The kernels of csrc/sm90 are compiled for sm_90a alone. Their products have to be HGMMA on tiles that UTMALDG loads and
UTMASTG stores, not one at a time, and GELU of token mixing has to be computed while a product runs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mixer_kernels.machine_model import Analysis, read
from mixer_kernels.machine_model import Kernel as MachineCode
from mixer_kernels.machine_model.gates import Bound, Bounds, Faults, bound_of, faults_of

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SM90 = "sm90"  # the folder of kernels for one architecture, and that
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
SM90_ARCHITECTURES = ("sm_90a",)
# Optimisation as CMake's Release build has it.
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC}", "-cubin",
    "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage",
)  # fmt: skip
# Kernels with these words in their names compute no product.
WITHOUT_PRODUCT = ("statistics", "norm", "branch", "pack")
# In machine code: mma.sync, on every architecture, and of sm_90a wgmma, its fence, TMA's loads and stores.
MMA, WGMMA, FENCE, LOAD, STORE = "HMMA", "HGMMA", "WARPGROUP.ARRIVE", "UTMALDG", "UTMASTG"
WAIT = "WARPGROUP.DEPBAR"
# A product that waits for the one before it has a fence of its own; a step of these kernels has four or more to one.
LEAST_PRODUCTS_A_FENCE = 2
# GELU of 64 x 64 elements, 32 a thread, one special function each at least.
OVERLAPPED = ("token_mixing", "token_data_gradient")
LEAST_OVERLAPPED = 32
# Of the kernels of csrc/sm90 with products, one warpgroup copies.
COPYING_WARPS = 4
ACCEPT = "make cuda-gates ARGS=--accept"


class Tools(NamedTuple):
    """Programs of the CUDA toolkit."""

    nvcc: str
    version: str
    cuobjdump: str


@dataclasses.dataclass
class Kernel:
    """One function of the device code."""

    name: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0  # bytes, stores and loads
    shared: int = 0  # bytes, static
    sm90: bool = False  # one of those for sm_90a alone
    instructions: dict[str, int] | None = None  # None where there is no machine code
    overlapped: int = 0  # special functions while a product of wgmma runs, of which the next step has no need yet
    float_atomics: int = 0
    faults: Faults | None = None  # None where there is no machine code
    bound: Bound | None = None  # of kernels with products in a loop

    @classmethod
    def from_json(cls, fields: dict) -> Kernel:
        faults, bound = fields["faults"], fields["bound"]
        parts = {"faults": faults and Faults(**faults), "bound": bound and Bound(**bound)}
        return cls(**{**fields, **parts})

    @property
    def has_products(self) -> bool:
        return not any(word in bare_name(self.name) for word in WITHOUT_PRODUCT)

    @property
    def matrix(self) -> str:
        """The matrix instruction that its products are made of."""
        return WGMMA if self.sm90 else MMA

    def problems(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of spills")
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.float_atomics:
            found.append(f"{self.float_atomics} atomics on floats")
        if self.instructions is not None and self.has_products:
            if not self.instructions[self.matrix]:
                found.append(f"no {self.matrix}: its product became something else")
            elif self.sm90:
                found += self._sm90_problems(self.instructions)
        return found

    def _sm90_problems(self, count: dict[str, int]) -> Iterator[str]:
        if count[MMA]:
            yield f"{count[MMA]} {MMA}: a part of its products is not wgmma"
        for instruction, what in ((LOAD, "loads"), (STORE, "stores")):
            if not count[instruction]:
                yield f"no {instruction}: its {what} became something else"
        if count[WGMMA] < LEAST_PRODUCTS_A_FENCE * count[FENCE]:
            yield f"{count[FENCE]} {FENCE} for {count[WGMMA]} {WGMMA}: one product waits for another"
        if any(name in bare_name(self.name) for name in OVERLAPPED) and self.overlapped < LEAST_OVERLAPPED:
            yield f"{self.overlapped} MUFU while a product runs, expected {LEAST_OVERLAPPED}: GELU waits for it"


@dataclasses.dataclass
class Report:
    """One source file, compiled for one architecture."""

    compiled: bool
    output: str
    seconds: float
    kernels: list[Kernel]

    def problems(self) -> list[str]:
        found = [f"{kernel.name}: {problem}" for kernel in self.kernels for problem in kernel.problems()]
        found += re.findall(r".*\(C75\d\d\).*", self.output)
        if not self.compiled:
            lines = [line for line in self.output.splitlines() if not re.match(r"ptxas info|    \d+ bytes stack", line)]
            found.append("\n    ".join(["nvcc failed", *lines]))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the rows, return 1 if anything failed and 2 if nothing could be compiled."""
    parser = argparse.ArgumentParser(prog="tools/cuda_gates.py", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("files", nargs="*", type=Path, help="CUDA sources (default: all of csrc)")
    parser.add_argument("--arch", nargs="+", default=["all"], help=f"'all' or some such as {', '.join(ARCHITECTURES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once (default: one a core)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/cuda_gates", help="what passed is kept here")
    parser.add_argument("--bounds", type=Path, help="the model's bounds to compare with (default: csrc's own)")
    parser.add_argument("--accept", action="store_true", help="keep what the model finds now in that file")
    arguments = parser.parse_args(argv)
    architectures = ARCHITECTURES if arguments.arch == ["all"] else arguments.arch
    wrong = [name for name in architectures if not re.fullmatch(r"sm_\d+[af]?", name)]
    if wrong:
        parser.error(f"--arch: got {', '.join(wrong)}, expected 'all' or some such as {', '.join(ARCHITECTURES)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs: got {arguments.jobs}, expected 1 or more")
    files = arguments.files or sorted([*CSRC.glob("*.cu"), *CSRC.glob(f"{SM90}/*.cu")])
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        parser.error(f"no such file: {', '.join(missing) or CSRC / '*.cu'}")
    try:
        tools = find_tools()
    except LookupError as error:
        print(f"cuda-gates: {error}", file=sys.stderr)
        return 2
    gate = Gate(Bounds(arguments.bounds) if arguments.bounds else Bounds(), f"CUDA {tools.version}", arguments.accept)
    files_with_bounds = files if arguments.bounds else [file for file in files if file.resolve().is_relative_to(CSRC)]
    problems = check(tools, files, architectures, arguments.jobs, arguments.cache, gate, files_with_bounds)
    return 1 if problems else 0


class Gate:
    """What the model found in files of csrc, against what is kept."""

    BACKEND = "cuda"

    def __init__(self, bounds: Bounds, compiler: str, accept: bool) -> None:
        self._bounds, self._compiler, self._accept = bounds, compiler, accept
        self._notes: set[str] = set()

    def problems(self, file: Path, architecture: str, kernels: Sequence[Kernel]) -> list[str]:
        """Of all ``kernels`` of a file; none where they are accepted."""
        stem = f"{file.name}: " if file.resolve().parent.name != SM90 else f"{SM90}/{file.name}: "
        found = {stem + k.name: k.bound for k in kernels if k.bound is not None and "float16" not in _types(k.name)}
        faults = {stem + k.name: [k.faults] for k in kernels if k.faults is not None and k.has_products}
        if self._accept:
            self._bounds.accept(
                self.BACKEND, architecture, self._compiler, found, [stem], faults, complete=False
            )  # fmt: skip
            self._bounds.save()
            return []
        why_not = self._bounds.why_not_compared(self.BACKEND, architecture, self._compiler)
        if why_not is not None:
            self._notes.add(why_not)
            return []
        said = self._bounds.problems(self.BACKEND, architecture, found, [stem], ACCEPT)
        for name, (one,) in faults.items():
            sentences = self._bounds.unknown(self.BACKEND, architecture, name, one, ACCEPT)
            said += [f"{architecture} {name}: {sentence}" for sentence in sentences]
        return said

    def notes(self) -> list[str]:
        return sorted(self._notes)


def check(
    tools: Tools,
    files: Sequence[Path],
    architectures: Sequence[str],
    jobs: int,
    cache: Path,
    gate: Gate,
    files_with_bounds: Sequence[Path],
) -> list[str]:
    """Compile every file for every architecture, print as results come, return the problems."""
    work = [(file, architecture) for file in files for architecture in architectures_of(file, architectures)]
    print(f"CUDA {tools.version}, {len(files)} files for {len(architectures)} architectures: {len(work)} compilations")
    print(f"{'arch':8}{'kernel':74}{'regs':>5}{'stack':>6}{'spills':>7}{'shared':>7}{'matrix':>9}{'seconds':>9}")
    problems, kernels = [], 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(cached, tools, *item, cache): item for item in work}
        for done, future in enumerate(concurrent.futures.as_completed(pending), start=1):
            file, architecture = pending[future]
            report = future.result()
            for kernel in report.kernels:
                print(_row(architecture, kernel, report.seconds), flush=True)
            problems += [f"{architecture} {file.name}: {problem}" for problem in report.problems()]
            if report.compiled and file in files_with_bounds:
                problems += gate.problems(file, architecture, report.kernels)
            kernels += len(report.kernels)
            if sys.stderr.isatty():
                print(f"{done} of {len(work)} compiled, {len(problems)} problems", end="\r", file=sys.stderr)
    for problem in problems:
        print(f"FAILED {problem}")
    for note in gate.notes():
        print(note)
    print(f"{kernels} kernels compiled, {len(problems)} problems")
    return problems


def architectures_of(file: Path, architectures: Sequence[str]) -> list[str]:
    """Those of ``architectures`` for which ``file`` has kernels."""
    return [name for name in architectures if file.resolve().parent.name != SM90 or name in SM90_ARCHITECTURES]


def cached(tools: Tools, file: Path, architecture: str, cache: Path) -> Report:
    """As ``compile_file``, or the result kept from when the same text was compiled by the same nvcc."""
    digest = hashlib.sha256(repr((tools.version, FLAGS, architecture, file.name)).encode())
    model = sorted((ROOT / "mixer_kernels/machine_model").glob("*.py"))
    for path in (Path(__file__), *model, *with_includes(file)):
        digest.update(path.read_bytes())
    kept = cache / f"{digest.hexdigest()[:32]}.json"
    if kept.is_file():
        fields = json.loads(kept.read_text(encoding="utf-8"))
        return Report(**{**fields, "kernels": [Kernel.from_json(kernel) for kernel in fields["kernels"]]})
    report = compile_file(tools, file, architecture)
    if report.compiled:
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")
        partial.replace(kept)
    return report


def compile_file(tools: Tools, file: Path, architecture: str) -> Report:
    """Machine code for one architecture, and what ptxas and the disassembler say of it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        start = time.perf_counter()
        command = [tools.nvcc, *FLAGS, f"-arch={architecture}", "-o", str(cubin), str(file)]
        compiled = subprocess.run(command, capture_output=True, text=True, errors="replace")
        seconds = time.perf_counter() - start
        output = compiled.stdout + compiled.stderr
        kernels = resource_usage(output)
        if compiled.returncode == 0:
            sass = subprocess.run([tools.cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
            count_instructions(kernels, sass.stdout)
            add_model(kernels, cubin, tools.cuobjdump, file.resolve().parent.name == SM90)
    for kernel, name in zip(kernels.values(), demangled(list(kernels)), strict=True):
        kernel.name, kernel.sm90 = name, file.resolve().parent.name == SM90
    return Report(compiled.returncode == 0, output.strip(), round(seconds, 1), list(kernels.values()))


def resource_usage(output: str) -> dict[str, Kernel]:
    """Kernels by their mangled names, from the output of ``ptxas -v``."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel("")
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
            name = match[1] or match[2]
            kernel = kernels.setdefault(name, Kernel(name))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack, kernel.spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            if match := re.search(r"(\d+) bytes smem", line):
                kernel.shared = int(match[1])
    return kernels


def count_instructions(kernels: dict[str, Kernel], sass: str) -> None:
    """Matrix instructions, TMA and atomics on floats, from the output of ``cuobjdump -sass``."""
    for name, code in _functions(sass):
        if name in kernels:
            names = (MMA, WGMMA, FENCE, LOAD, STORE)
            kernels[name].instructions = {each: len(re.findall(rf"\b{each}\b", code)) for each in names}
            # From where all products but the last group are done to where that is done too, at the latest.
            waits = re.findall(rf"{WAIT}\S* gsb0, 0x1\b((?:(?!{WGMMA}).)*){WAIT}\S* gsb0, 0x0\b", code, re.DOTALL)
            kernels[name].overlapped = max((len(re.findall(r"\bMUFU\b", each)) for each in waits), default=0)
            kernels[name].float_atomics = len(re.findall(r"\b(?:RED|ATOM[GS]?)\.[\w.]*\bB?F(?:16|32|64)", code))


def add_model(kernels: dict[str, Kernel], cubin: Path, cuobjdump: str, sm90: bool) -> None:
    """What the model says of their machine code."""
    for name, code in read(cubin, cuobjdump).items():
        if name in kernels:
            analysis = analysis_of(code, sm90)
            kernels[name].faults, kernels[name].bound = faults_of(analysis), bound_of(analysis)


def analysis_of(code: MachineCode, sm90: bool) -> Analysis:
    """The model of a kernel; as many blocks as registers allow, which is what limits those with products."""
    return Analysis(code, products=max(1, code.threads // 32 - COPYING_WARPS) if sm90 else 0)


def find_tools() -> Tools:
    """nvcc, where the package's build looks for it; cuobjdump beside it, in PATH or in Triton's wheel."""
    sys.path.insert(0, str(ROOT))
    try:
        from _build import find_nvcc
    finally:
        sys.path.remove(str(ROOT))
    nvcc, looked_for = find_nvcc()
    if nvcc is None:
        raise LookupError(f"nvcc not found. Looked for:\n{looked_for}")
    triton = importlib.util.find_spec("triton")
    folders = [_toolkit(nvcc.path), None, Path(triton.origin).parent / "backends/nvidia/bin" if triton else None]
    cuobjdump = next(filter(None, (shutil.which("cuobjdump", path=folder) for folder in folders)), None)
    if cuobjdump is None:
        raise LookupError("cuobjdump not found: it comes with the CUDA toolkit and with Triton's wheel")
    return Tools(nvcc.path, ".".join(map(str, nvcc.version)), cuobjdump)


def with_includes(file: Path) -> list[Path]:
    """The file and what it includes from csrc, directly or not."""
    found = [file.resolve()]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            target = next((p for p in (path.parent / name, CSRC / name) if p.is_file()), None)
            if target and target.resolve() not in found:
                found.append(target.resolve())
    return found


def demangled(names: Sequence[str]) -> list[str]:
    """``token_mixing<bfloat16, 208>`` for its mangled name: without namespaces, casts and parameters."""
    if not names:
        return []
    filtered = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [_shortened(name) for name in filtered]


def bare_name(name: str) -> str:
    """``token_mixing`` for ``token_mixing<bfloat16, 208>``."""
    return name.partition("<")[0]


def _types(name: str) -> list[str]:
    """float16 and bfloat16 have the same code: bounds of one are enough."""
    return re.findall(r"\w+", name)


def _shortened(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|\((?:bool|int|unsigned int|long)\)", "", name)
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:position]
            break
    return name.removeprefix("void ").replace("> >", ">>")


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\S+)\s*$", sass, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def _toolkit(nvcc: str) -> Path | None:
    """Where nvcc's own programs are: it may be called through a link or a script."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    match = re.search(r"^#\$ _HERE_=(.+)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
    return Path(match[1].strip()) if match else None


def _row(architecture: str, kernel: Kernel, seconds: float) -> str:
    count = (kernel.instructions or {}).get(kernel.matrix)
    matrix = f"{kernel.matrix} {count}" if count else "-"
    return (
        f"{architecture:8}{kernel.name:74}{kernel.registers:5}{kernel.stack:6}{kernel.spilled:7}{kernel.shared:7}"
        f"{matrix:>9}{seconds:9.1f}{'  FAILED' if kernel.problems() else ''}"
    )


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
