"""``python -m mixer_kernels compile-check``: every shipped tile, compiled ahead of time for GPUs that need not exist.

The package's own launchers run on meta tensors, so that what is compiled is what is launched: the same choice of
kernel, tile, specialisation. Each kernel is read back from its binary: registers, stack, shared memory, matrix
instructions. A spill, shared memory over the target's limit, a product that did not become the expected matrix
instruction, TF32 where IEEE arithmetic was asked for, and an atomic on floats are failures.

So are faults that a model sees in the machine code (products of wgmma that wait one for another, integer divisions in
a hot loop, exponentials one by one behind branches) if they are not known of the kernel, and a share of the tensor peak
below what tuning/bounds.json keeps for some cases. ``--accept`` keeps what is found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from .backends.arguments import AffineLinear, GatedHalf, Half, Options, SpatialGate, precision_of
from .backends.backward import Pass, channel_mixing_backward, differentiate, token_mixing_backward
from .backends.relatives import gated_channel_mixing_backward, gated_mixing_backward, token_linear_backward
from .machine_model import Analysis, Kernel, read
from .machine_model.gates import Bound, Bounds, Faults, bound_of, faults_of
from .shapes import SPECS, MixerShape
from .tuning.target import KNOWN_TARGETS, Target, assume_target


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a block: what decides which kernels are compiled."""

    shape: MixerShape
    dtype: str  # of the products: "bf16", "fp16", "fp32" (IEEE), "tf32"
    stream: str  # of x: "bf16", "fp16", "fp32"
    approximate: str = "none"
    transposed: bool = False  # x with strides (S*C, 1, S), as timm's patch embedding gives it
    bare: bool = False  # no bias, no gamma, no beta
    offset: int = 0  # elements by which x is off its alignment
    noise: bool = False  # dropout and stochastic depth
    backward: bool = True  # the backward pass as well
    relative: str = ""  # one of RELATIVES; gmlp's F is D_C, patchtsmixer has S patches
    gate: str = "softmax"  # of patchtsmixer
    norm: str = "layer"  # the same; resmlp's is affine


@dataclasses.dataclass
class Row:
    """One compiled kernel."""

    target: str
    kernel: str
    case: str
    tile: str
    registers: int
    stack: int
    shared: int
    instruction: str  # the matrix instruction and how often it occurs, e.g. "HGMMA 12"
    seconds: float
    problems: list[str]
    label: str = ""  # the kernel with its flags
    faults: Faults | None = None  # None where there is no machine code that the model reads
    bound: Bound | None = None  # of the cases whose bounds are kept, and kernels with products


ACCEPT = "make compile-check ARGS=--accept"
RELATIVES = ("gmixer", "resmlp", "gmlp", "patchtsmixer")
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}

# The matrix instruction of 16-bit and of TF32 products in SASS, where it is not Ampere's, HMMA.
MATRIX_INSTRUCTIONS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
PRODUCTS_AND_STREAMS = (("bf16", "bf16"), ("fp32", "fp32"), ("tf32", "fp32"), ("bf16", "fp32"))


# Flags of a kernel that are no variation of what it computes in the cases whose bounds are kept.
_NO_LABEL = ("EVEN_K", "INT64", "DROPOUT", "DROP_PATH")


def cases_with_bounds() -> tuple[Case, ...]:
    """Those for which tuning/bounds.json keeps bounds: the models' token counts in bfloat16, B/16 under autocast."""
    b16, b32, h14 = (SPECS[name].block_shape() for name in ("B/16", "B/32", "H/14"))
    return (*(Case(shape, "bf16", "bf16") for shape in (b32, b16, h14)), Case(b16, "bf16", "fp32"))


def cases() -> Iterator[Case]:
    """The cases that reach every tile configuration, and every combination of token segments in bfloat16."""
    b16 = SPECS["B/16"].block_shape()
    shapes = {
        49: SPECS["B/32"].block_shape(),
        196: b16,
        256: SPECS["H/14"].block_shape(),
        784: SPECS["L/16"].block_shape(img_size=448),
    }
    for dtype, stream in (*PRODUCTS_AND_STREAMS, ("fp16", "fp16"), ("fp16", "fp32")):
        for shape in shapes.values():
            yield Case(shape, dtype, stream)
        yield Case(b16, dtype, stream, approximate="tanh")
        yield Case(b16, dtype, stream, transposed=True)
        yield Case(b16, dtype, stream, noise=True)
        yield Case(MixerShape(S=197, C=99, D_S=50, D_C=397), dtype, stream, bare=True, offset=1)
    for shape in (shapes[256], shapes[784]):
        yield Case(shape, "bf16", "bf16", noise=True)
    for tokens in range(16, 257, 16):
        yield Case(dataclasses.replace(b16, S=tokens), "bf16", "bf16", backward=tokens in (208, 224))
    yield from _cases_of_relatives()


def _cases_of_relatives() -> Iterator[Case]:
    """timm's gmixer_24, resmlp_24, gmlp_s16; gmixer at 448 px; odd sizes."""
    for relative, shape in (
        ("gmixer", MixerShape(S=196, C=384, D_S=192, D_C=768)),
        ("resmlp", MixerShape(S=196, C=384, D_S=0, D_C=1536)),
        ("gmlp", MixerShape(S=196, C=256, D_S=0, D_C=1536)),
    ):
        yield Case(shape, "fp16", "fp16", relative=relative)
        for dtype, stream in PRODUCTS_AND_STREAMS:
            yield Case(shape, dtype, stream, relative=relative)
            yield Case(shape, dtype, stream, noise=True, transposed=True, relative=relative)
            odd = MixerShape(S=197, C=99, D_S=50, D_C=398)
            yield Case(odd, dtype, stream, bare=relative != "resmlp", offset=1, relative=relative)
            if relative == "gmixer":
                yield Case(dataclasses.replace(shape, S=784), dtype, stream, relative=relative)
    for tokens, channels in ((4, 8), (13, 48), (32, 64), (64, 64), (8, 192), (64, 192)):
        for dtype, stream in PRODUCTS_AND_STREAMS:
            # float32 products over 192 features spill a few bytes, since a warp holds whole rows of an operand; 16-bit
            # ones with dropout up to 48; IEEE's over 64 with dropout one value on sm_120, under Triton 3.9.
            if dtype == "bf16" or channels < 192:
                shape = MixerShape(S=tokens, C=channels, D_S=0, D_C=0)
                noise = tokens == channels and dtype != "fp32"
                yield Case(shape, dtype, stream, noise=noise, relative="patchtsmixer")
    for dtype, stream in PRODUCTS_AND_STREAMS:
        shape = MixerShape(S=13, C=48, D_S=0, D_C=0)
        yield Case(shape, dtype, stream, relative="patchtsmixer", gate="sigmoid", norm="affine")


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a row a kernel, return 1 if any has a problem."""
    parser = argparse.ArgumentParser(prog="python -m mixer_kernels compile-check", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch", nargs="+", default=["all"], metavar="ARCH", help=f"'all' or some of {', '.join(KNOWN_TARGETS)}"
    )
    parser.add_argument(
        "--dtype", nargs="+", default=list(TORCH_DTYPES), choices=TORCH_DTYPES, help="of the products (default: all)"
    )
    parser.add_argument(
        "--model", nargs="+", default=["mixer", *RELATIVES], choices=("mixer", *RELATIVES), help="default: all"
    )
    parser.add_argument("--tokens", nargs="+", type=int, metavar="S", help="cases of so many alone (default: all)")
    parser.add_argument("--with-bounds", action="store_true", help="only the cases whose bounds are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--bounds", type=Path, default=Bounds().path, help="what is kept (default: %(default)s)")
    parser.add_argument("--accept", action="store_true", help="keep what the model finds now in that file")
    arguments = parser.parse_args(argv)
    import triton

    names = list(KNOWN_TARGETS) if arguments.arch == ["all"] else arguments.arch
    unknown = [name for name in names if name not in KNOWN_TARGETS]
    if unknown:
        parser.error(f"--arch: got {', '.join(unknown)}, expected 'all' or some of {', '.join(KNOWN_TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

    wanted = cases_with_bounds() if arguments.with_bounds else cases()
    chosen = [c for c in wanted if c.dtype in arguments.dtype and (c.relative or "mixer") in arguments.model]
    chosen = [c for c in chosen if arguments.tokens is None or c.shape.S in arguments.tokens]
    work = [(name, case) for name in names for case in chosen]
    rows: dict[str, Row] = {}
    gate = _Gate(Bounds(arguments.bounds), f"Triton {triton.__version__}")
    print(f"Triton {triton.__version__}, {len(names)} targets, {len(work)} cases")
    print(_HEADER, flush=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for done, found in enumerate(pool.map(_compile_case, *zip(*work, strict=True)), start=1):
            gate.add(*work[done - 1], found.values())
            for key, row in found.items():
                if key not in rows:
                    rows[key] = row
                    print(_line(row), flush=True)
            if sys.stderr.isatty():
                print(f"\r{done} of {len(work)} cases, {len(rows)} kernels", end="\r", file=sys.stderr, flush=True)
    failed = [row for row in rows.values() if row.problems]
    for row in failed:
        print(f"FAILED {row.target} {row.kernel} [{row.case}] [{row.tile}]: {'; '.join(row.problems)}")
    lowered = [] if arguments.accept else gate.problems()
    for problem in lowered:
        print(f"FAILED {problem}")
    if arguments.accept:
        gate.accept(complete=chosen == list(cases()))
    for note in gate.notes():
        print(note)
    print(f"{len(rows)} kernels compiled, {len(failed) + len(lowered)} with problems")
    if arguments.json:
        document = {"triton": triton.__version__, "kernels": [dataclasses.asdict(row) for row in rows.values()]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed or lowered else 0


class _Gate:
    """What the model found, case by case, against what is kept."""

    BACKEND = "triton"

    def __init__(self, bounds: Bounds, compiler: str) -> None:
        self._bounds, self._compiler = bounds, compiler
        self._found: dict[str, dict[str, Bound]] = {}  # by target, then kernel and case
        self._stems: dict[str, list[str]] = {}  # by target: how these names begin, case by case
        self._faults: dict[str, dict[str, list[Faults]]] = {}  # by target, then the same, or kernel alone

    def add(self, target: str, case: Case, rows: Iterable[Row]) -> None:
        """``rows``: all kernels of ``case`` on ``target``."""
        if not KNOWN_TARGETS[target].is_nvidia:
            return
        kept = case in cases_with_bounds()
        if kept:
            self._stems.setdefault(target, []).append(f"[{_title(case)}] ")
        for row in rows:
            name = f"[{row.case}] {row.label}" if kept else row.kernel
            if row.faults is not None:
                self._faults.setdefault(target, {}).setdefault(name, []).append(row.faults)
            if row.bound is not None:
                # Two of one name differ in what is wanted of them, z alone for one: the lower one counts.
                found = self._found.setdefault(target, {})
                found[name] = min(row.bound, found.get(name, row.bound), key=lambda bound: bound.share)

    def problems(self) -> list[str]:
        said = []
        for target, kernels in self._faults.items():
            if self._bounds.why_not_compared(self.BACKEND, target, self._compiler) is None:
                for kernel, faults in kernels.items():
                    for one in dict.fromkeys(faults):
                        found = self._bounds.unknown(self.BACKEND, target, kernel, one, ACCEPT)
                        said += [f"{target} {kernel}: {sentence}" for sentence in found]
                found, stems = self._found.get(target, {}), self._stems.get(target, [])
                said += self._bounds.problems(self.BACKEND, target, found, stems, ACCEPT)
        return said

    def notes(self) -> list[str]:
        reasons = [self._bounds.why_not_compared(self.BACKEND, target, self._compiler) for target in self._faults]
        return [reason for reason in reasons if reason is not None]

    def accept(self, complete: bool) -> None:
        for target, faults in self._faults.items():
            found, stems = self._found.get(target, {}), self._stems.get(target, [])
            self._bounds.accept(self.BACKEND, target, self._compiler, found, stems, faults, complete)
        self._bounds.save()


_HEADER = (
    f"{'target':8}{'kernel':34}{'case':34}{'tile':26}{'regs':>5}{'stack':>6}{'shared':>8}  {'matrix':14}{'seconds':>8}"
)


def _line(row: Row) -> str:
    return (
        f"{row.target:8}{row.kernel:34}{row.case:34}{row.tile:26}{row.registers:5}{row.stack:6}{row.shared:8}"
        f"  {row.instruction:14}{row.seconds:8.1f}{'  FAILED' if row.problems else ''}"
    )


class _CompileOnlyDriver:
    """What Triton's JIT asks of a driver before it launches anything."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self.target = (
            GPUTarget("cuda", target.capability, 32) if target.is_nvidia else GPUTarget("hip", target.name, 64)
        )
        # Triton's JIT keeps its cache per device, whatever its target: each target is a device of its own.
        self.device = list(KNOWN_TARGETS).index(target.name)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _compile_case(target_name: str, case: Case) -> dict[str, Row]:
    """The kernels of one case by what was compiled; in a process of its own, since it replaces Triton's driver."""
    target = KNOWN_TARGETS[target_name]
    rows: dict[str, Row] = {}

    def compile_launch(kernel, grid, args, options):
        start = time.perf_counter()
        try:
            compiled = kernel.warmup(*args, grid=grid, **options)
        except Exception as error:  # the compiler's errors have no common base: each is a row
            cause = error
            while cause.__cause__ is not None:  # an error in a helper arrives wrapped in one of its caller
                cause = cause.__cause__
            message = f"{type(error).__name__}: {str(cause).strip().splitlines()[-1][:300]}"
            key = f"{kernel.__name__}{options}"
            rows[key] = Row(target_name, kernel.__name__, _title(case), _tile(options), 0, 0, 0, "", 0.0, [message])
            return
        seconds = time.perf_counter() - start
        rows[compiled.hash] = _inspect(target, kernel.__name__, case, options, compiled, seconds)

    for_each_launch(target, case, compile_launch)
    return rows


def for_each_launch(target: Target, case: Case, visit: Callable) -> None:
    """Call ``visit(kernel, grid, args, options)`` for every launch of ``case`` on ``target``, on meta tensors, with
    Triton's driver replaced by one that compiles for ``target``: ``kernel.warmup(*args, grid=grid, **options)``."""
    from .backends import triton as backend
    from .backends.triton.launch import intercept_launches

    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    compile_for(target)
    try:
        with assume_target(target), intercept_launches(visit):
            _run(backend, case)
    finally:
        torch.set_float32_matmul_precision(previous)


def compile_for(target: Target) -> None:
    """Replace Triton's driver, for the rest of this process, by one that compiles for ``target`` and runs nothing."""
    import triton

    triton.runtime.driver.set_active(_CompileOnlyDriver(target))


def _run(backend, case: Case) -> None:
    """A block on meta tensors, forward and backward."""
    shape, dtype = case.shape, TORCH_DTYPES[case.dtype]
    weight = TORCH_DTYPES[case.stream]

    def parameter(*sizes: int):
        return torch.empty(sizes, dtype=weight, device="meta")

    def vector(size: int):
        return None if case.bare else parameter(size)

    def half(columns: int, hidden: int) -> Half:
        rows = hidden * (1 + options.glu)
        fc1, fc2 = (parameter(rows, columns), vector(rows)), (parameter(columns, hidden), vector(columns))
        return Half(vector(shape.C), vector(shape.C), *fc1, *fc2)

    def gradients(backward, inputs, kept, *parameters, **further):
        wanted = [t is not None for t in (inputs, *itertools.chain(*parameters))]
        dy = torch.empty(inputs.shape, dtype=inputs.dtype, device="meta")
        differentiate(backward, Pass(backend, dy, kept, inputs, options, wanted), parameters, **further)

    x = torch.empty(2 * shape.S * shape.C + case.offset, dtype=TORCH_DTYPES[case.stream], device="meta")[case.offset :]
    x = x.view(2, shape.C, shape.S).transpose(1, 2) if case.transposed else x.view(2, shape.S, shape.C)
    rate, seed = (0.1, torch.empty(1, dtype=torch.int64, device="meta")) if case.noise else (0.0, None)
    options = Options(
        dtype, activation="swiglu" if case.relative == "gmixer" else "gelu", approximate=case.approximate,
        norm="affine" if case.relative == "resmlp" else case.norm, gate=case.gate, dropout_p=rate, drop_path_p=rate,
        seed=seed, precision=precision_of(dtype),
    )  # fmt: skip

    if case.relative == "patchtsmixer":
        x = x.view(1, 2, shape.S, shape.C)
        halves = []
        for axis, extent in ((1, 2), (2, shape.S), (3, shape.C)):
            halves.append(GatedHalf(*half(extent, 2 * extent), parameter(extent, extent), vector(extent)))
            mixing = {"axis": axis, "gate_first": axis == 1}
            backend.gated_mixing_forward(x, halves[-1], options, **mixing)
            gradients(gated_mixing_backward, x, (), halves[-1], **mixing)
        options = options._replace(seed=None if seed is None else seed.repeat(2))
        backend.gated_mixer_layer_forward(x, *halves[1:], options, eps2=1e-5, keep_u=True)
        return
    if case.relative == "gmlp":
        units = shape.D_C // 2
        gate = SpatialGate(vector(units), vector(units), parameter(shape.S, shape.S), vector(shape.S))
        fc1 = (parameter(shape.D_C, shape.C), vector(shape.D_C))
        whole = Half(vector(shape.C), vector(shape.C), *fc1, parameter(shape.C, units), vector(shape.C))
        _, *kept = backend.gated_channel_mixing_forward(x, whole, gate, options, gate_eps=1e-5, keep_z=True)
        gradients(gated_channel_mixing_backward, x, kept, whole, gate, gate_eps=1e-5)
        return
    channels = half(shape.C, shape.D_C)
    if case.relative == "resmlp":
        vectors = (vector(shape.C), vector(shape.C), parameter(shape.S, shape.S), vector(shape.S), vector(shape.C))
        linear, affine = AffineLinear(*vectors), options
        options = options._replace(dropout_p=0.0)
        u = backend.token_linear_forward(x, linear, options)
        gradients(token_linear_backward, x, (), linear)
        options = affine
    else:
        tokens = half(shape.S, shape.D_S)
        backend.mixer_block_forward(x, tokens, channels, options.without_noise(), eps2=1e-6)  # packs as one launch
        u, *statistics = backend.token_mixing_forward(x, tokens, options)
    if case.offset:  # u as a user's own tensor may lie, not as the token half writes it
        u = x
    _, *kept = backend.channel_mixing_forward(u, channels, options, keep_z=case.backward)
    if case.backward:
        if case.relative != "resmlp":
            gradients(token_mixing_backward, x, statistics, tokens)
        gradients(channel_mixing_backward, u, kept, channels)


def _title(case: Case) -> str:
    shape = case.shape
    traits = "".join(f" {name}" for name in ("transposed", "noise", "bare") if getattr(case, name))
    stream = "" if case.stream in (case.dtype, "fp32" if case.dtype == "tf32" else case.dtype) else f" on {case.stream}"
    tanh = " tanh" if case.approximate == "tanh" else ""
    relative = f"{case.relative} " if case.relative else ""
    traits += "".join(f" {value}" for value in (case.gate, case.norm) if value not in ("softmax", "layer"))
    return f"{relative}{case.dtype}{stream} S={shape.S} C={shape.C}{tanh}{traits}"


def _tile(options: dict) -> str:
    names = ("BLOCK_R", "BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_D", "BLOCK_K")
    blocks = "x".join(str(options[name]) for name in names if name in options)
    return f"{blocks} w{options['num_warps']} s{options.get('num_stages', '-')}"


def _inspect(target: Target, kernel: str, case: Case, options: dict, compiled, seconds: float) -> Row:
    expected = MATRIX_INSTRUCTIONS.get(target.name, "HMMA")
    faults = bound = None
    if target.is_nvidia:
        machine_code, faults = _read_cubin(compiled.asm["cubin"])
        registers, stack, text = machine_code.registers, machine_code.stack, compiled.asm["ptx"]
        tf32 = "tf32" in text
        float_atomic = re.search(r"\b(red|atom)\.[\w.]*\.(f16|bf16|f32|f64)", text) is not None
        products = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "IMMA")
        instructions = [each.name for each in machine_code.code if each.name in products]
        if case in cases_with_bounds():
            bound = bound_of(analysis_of(compiled, machine_code))
    else:
        text = code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]) if spilled else 0
        tf32 = "xf32" in text
        float_atomic = re.search(r"(global|flat)_atomic_(pk_)?add_(f|bf)", text) is not None
        instructions = re.findall(r"\b(v_mfma)\w*", code)
    found = max(set(instructions), key=instructions.count) if instructions else "-"
    problems = []
    if stack:
        problems.append(f"spills: {stack} bytes of stack")
    if compiled.metadata.shared > target.shared_memory:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory, {target.name} has {target.shared_memory}")
    is_product = not any(word in kernel for word in ("statistics", "norm", "branch", "hidden", "pack", "sum_parts"))
    ieee = case.dtype in ("fp32", "tf32") and options.get("PRECISION") == "ieee"
    small = "gated_mix" in kernel and found == "HMMA"  # tiles below the 64 rows of wgmma and tcgen05
    if is_product and not ieee and found != expected and not small:
        problems.append(f"expected {expected}, found {found}")
    if is_product and (ieee or case.dtype == "fp32") and (tf32 or (target.is_nvidia and instructions)):
        problems.append("IEEE arithmetic was asked for, the product is TF32")
    if float_atomic:
        problems.append("an atomic on floats")
    instruction = f"{found} {len(instructions)}" if instructions else "-"
    return Row(
        target.name, kernel.strip("_"), _title(case), _tile(options), registers, stack, compiled.metadata.shared,
        instruction, seconds, problems, label_of(kernel, options), faults, bound,
    )  # fmt: skip


def label_of(kernel: str, options: dict) -> str:
    """``channel_product_kernel FC1 FOLD``: a kernel's name with the flags that say what it computes."""
    flags = [name for name, value in options.items() if value is True and name.isupper() and name not in _NO_LABEL]
    return " ".join([kernel.strip("_"), *flags])


def analysis_of(compiled, machine_code: Kernel) -> Analysis:
    """The model of what Triton compiled."""
    metadata = compiled.metadata
    return Analysis(machine_code, warps=metadata.num_warps, shared=metadata.shared)


@functools.lru_cache(maxsize=128)  # neighbouring cases share kernels
def _read_cubin(cubin: bytes) -> tuple[Kernel, Faults]:
    """The machine code and what the model finds wrong in it."""
    [kernel] = read(cubin).values()
    return kernel, faults_of(Analysis(kernel))
