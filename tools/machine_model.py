"""Which share of the tensor peak a kernel can reach, read from its machine code without a GPU. See ``--help``.

    machine_model.py kernels.cubin [--kernel REGEX] [--warps N] [--products N] [--shared BYTES]
    machine_model.py --goals

The first prints the hot loops of a cubin: what one turn occupies of each pipe, and the shares (a) if all overlaps, (b)
if a warp's other work runs under other warps' products, (c) if nothing overlaps, (s) by ptxas' own schedule. The second
compiles the kernels for B/16 in bfloat16 and prints the table of goals: what they reach, and what they are to reach.
The model is mixer_kernels/machine_model, which says what it leaves out; how far to trust it: CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_gates

from mixer_kernels import compile_check
from mixer_kernels.machine_model import Analysis, HotLoop, Kernel, read
from mixer_kernels.machine_model.pipes import PIPES
from mixer_kernels.shapes import SPECS
from mixer_kernels.tuning.target import KNOWN_TARGETS

SHAPE = SPECS["B/16"].block_shape()
CACHE = cuda_gates.ROOT / "build/machine_model"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the loops of a cubin or the table of goals; 2 where a name is wrong."""
    parser = argparse.ArgumentParser(
        prog="tools/machine_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cubin", nargs="?", type=Path, help="machine code, as nvcc -cubin and Triton's cache have it")
    parser.add_argument("--goals", action="store_true", help="the table of goals, of the sources as they are")
    parser.add_argument("--kernel", default=".", metavar="REGEX", help="of kernels' names (default: all)")
    parser.add_argument("--warps", type=int, default=0, help="of a block (default: as __launch_bounds__ has it)")
    parser.add_argument("--products", type=int, default=0, help="warps of a block that compute products (default: all)")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory of a block (default: 0)")
    parser.add_argument("--blocks", type=int, default=0, help="on a multiprocessor (default: as resources allow)")
    parser.add_argument("--copies", type=float, default=0.0, help="clocks that cp.async takes (default: 0)")
    parser.add_argument("--longest", action="store_true", help="where a turn branches, the longest way")
    arguments = parser.parse_args(argv)
    if arguments.goals == (arguments.cubin is not None):
        parser.error("expected a cubin or --goals, one of them")
    if arguments.goals:
        print_goals()
        return 0
    if not arguments.cubin.is_file():
        parser.error(f"no such file: {arguments.cubin}")
    found = [kernel for kernel in read(arguments.cubin).values() if re.search(arguments.kernel, kernel.name)]
    if not found:
        parser.error(f"--kernel: no kernel of {arguments.cubin} matches {arguments.kernel!r}")
    for kernel in found:
        show(
            Analysis(
                kernel, arguments.warps, arguments.shared, arguments.products, arguments.blocks, arguments.copies,
                arguments.longest,
            )
        )  # fmt: skip
    return 0


def show(analysis: Analysis) -> None:
    """The hot loops of one kernel."""
    kernel = analysis.kernel
    print(
        f"{kernel.name}  {kernel.target}\n  {kernel.registers} registers, {kernel.stack} bytes of stack, "
        f"{analysis.warps} warps a block ({analysis.products} compute products), {analysis.blocks} blocks a "
        f"multiprocessor, {analysis.on_scheduler} warps a scheduler"
    )
    for hot in analysis.hot_loops():
        clocks = "  ".join(f"{pipe} {hot.work.clocks[pipe]:.0f}" for pipe in PIPES)
        shares, played = hot.shares, "-" if hot.shares.played is None else f"{hot.shares.played:.0%}"
        turn = "" if hot.clocks is None else f" (a turn takes {hot.clocks:.0f} clocks)"
        print(f"  loop at 0x{hot.loop.header:x}, clocks of a turn and warp: {clocks}")
        print(
            f"    a {shares.overlapped:.0%}  b {shares.ping_pong:.0%}  c {shares.serial:.0%}  s {played}{turn}  "
            f"bound by {shares.pipe}, {hot.issue_per_tensor:.2f} issue slots a tensor clock"
        )


# ---------------------------------------------------------------------------------------------------------- the goals


@dataclass(frozen=True)
class Goal:
    """A row: ``now`` computes its figure from a kernel as it is compiled for ``target`` and, of Triton's, the options
    of its launch. ``before``: when the goals were set. ``goal`` None: no worse."""

    what: str
    target: str
    source: str  # a file of csrc, or Triton's kernel as compile-check labels it
    kernel: str  # of a file: how the name of its kernel goes on, a pattern; the best of those that match counts
    now: Callable[[Analysis, dict], float]
    before: float
    goal: float | None
    best: Callable = max

    @property
    def is_cuda(self) -> bool:
        return self.source.endswith(".cu")


def bound(analysis: Analysis, _: dict) -> float:
    """Of the hottest loop, in percent."""
    return 100 * analysis.hottest().shares.bound


def step(analysis: Analysis, _: dict) -> float:
    """Of one step over hidden units, in percent. Where an inner loop has the last product, four tiles of 16 tokens to
    a turn, the step is the loop around it, which computes GELU."""
    hot = analysis.hottest()
    if not any(each.opcode.startswith("MUFU.EX2") for each in hot.turn):
        hot = analysis.outer(hot, turns=SHAPE.S // 16 // 4)
    return 100 * hot.shares.bound


def unit(analysis: Analysis) -> HotLoop:
    """One unit of a persistent token kernel: the hidden axis in steps of 64, the first of them before the loop; one of
    the 1 to 2 rounds of statistics."""
    return analysis.outer(analysis.hottest(), turns=SHAPE.D_S // 64 - 1, sums=True)


def unit_share(analysis: Analysis, _: dict) -> float:
    return 100 * unit(analysis).shares.bound


def unit_slots(analysis: Analysis, _: dict) -> float:
    return unit(analysis).work.clocks["issue"]


def tile(analysis: Analysis, options: dict) -> float:
    """Of a whole tile with its epilogue, if all of it overlaps, in percent."""
    turns = SHAPE.C // options["BLOCK_K"]
    if "PROGRAMS" in options:
        return 100 * analysis.tile(analysis.hottest(), turns).shares.overlapped
    return 100 * analysis.whole({analysis.hottest().loop.header: turns}).shares.overlapped


FORWARD, BACKWARD = "token_mixing_fwd_kernel", "token_mixing_bwd_kernel"
WEIGHTS, SM90_WEIGHTS = "token_weight_gradient_kernel", "token_weight_gradient_descriptor_kernel"  # of either
GELU, SM90_GELU = "channel_gelu_bwd_kernel QUARTERS", "channel_gelu_bwd_descriptor_kernel"
FC1, FC2 = "channel_product_descriptor_kernel FC1", "channel_product_descriptor_kernel"
SM90_FORWARD, SM90_BACKWARD = "sm90/token_mixing.cu", "sm90/token_data_gradient.cu"
SM90_TILE = "bfloat16, 208, 200, .*2>"  # S 193 to 200, clusters of two
# What was before: of csrc on sm_80 GELU's tanh form, which has fewer instructions than the erf form that counts now; of
# cuda:sm90 1.75 rounds of statistics, 235 slots more than one, and a fluid model or an estimate for the shares.
GOALS = (
    Goal("cuda token forward", "sm_80", "token_mixing.cu", "bfloat16, 25>", step, 46, 65),
    Goal("cuda token backward", "sm_80", "token_data_gradient.cu", "bfloat16, 25>", step, 34, 50),
    Goal("Triton token forward", "sm_80", FORWARD, "", bound, 53, 60),
    Goal("Triton token backward", "sm_80", BACKWARD, "", bound, 34, 45),
    Goal("Triton weight gradient W1", "sm_80", WEIGHTS, "", bound, 21, 45),
    Goal("Triton weight gradient W2", "sm_80", WEIGHTS, "", bound, 39, 60),
    Goal("Triton GELU backward, tile", "sm_80", GELU, "", tile, 57, 70),
    Goal("Triton fc1", "sm_80", "channel_product_kernel FC1 FOLD", "", bound, 79, None),
    Goal("Triton fc2", "sm_80", "channel_product_kernel", "", bound, 79, None),
    Goal("Triton token forward", "sm_90", FORWARD, "", bound, 40, 65),
    Goal("Triton token backward", "sm_90", BACKWARD, "", bound, 24, 50),
    Goal("Triton weight gradient W1", "sm_90", SM90_WEIGHTS, "", bound, 15, 50),
    Goal("Triton weight gradient W2", "sm_90", SM90_WEIGHTS, "", bound, 30, 75),
    Goal("Triton GELU backward, tile", "sm_90", SM90_GELU, "", tile, 41, 70),
    Goal("Triton fc1", "sm_90", FC1, "", bound, 100, None),
    Goal("Triton fc2", "sm_90", FC2, "", bound, 100, None),
    Goal("cuda:sm90 token forward, unit: slots", "sm_90a", SM90_FORWARD, SM90_TILE, unit_slots, 5088, 3900, min),
    Goal("cuda:sm90 token forward, unit", "sm_90a", SM90_FORWARD, SM90_TILE, unit_share, 72, 85),
    Goal("cuda:sm90 token backward, unit", "sm_90a", SM90_BACKWARD, "bfloat16, 208", unit_share, 62, 75),
)  # fmt: skip


def print_goals() -> None:
    """Compile what the goals are about, B/16 in bfloat16, and print what the model says now."""
    print("Share of the tensor peak in the model, in percent (slots: issue slots of a warp); B/16, bfloat16.")
    print("An upper bound, not a measurement: 0.63 to 0.99 of it was published of other kernels.")
    print(f"{'kernel':38}{'target':8}{'before':>8}{'now':>8}{'goal':>10}")
    notes: list[str] = []
    for target in dict.fromkeys(goal.target for goal in GOALS):
        goals = [goal for goal in GOALS if goal.target == target]
        found = {**_triton(target, goals), **_cuda(target, goals, notes)}
        for goal in goals:
            figures = [goal.now(analysis, options) for analysis, options in found.get((goal.source, goal.kernel), ())]
            now = f"{goal.best(figures):.0f}" if figures else "-"
            wanted = "no worse" if goal.goal is None else f"{goal.goal}"
            print(f"{goal.what:38}{target:8}{goal.before:8}{now:>8}{wanted:>10}", flush=True)
            if not figures and not notes:
                notes.append(f"{goal.what} on {target}: no kernel {goal.source} {goal.kernel}: GOALS names another")
    print("\n".join(notes))


Found = dict[tuple[str, str], list[tuple[Analysis, dict]]]


def _triton(target: str, goals: Sequence[Goal]) -> Found:
    wanted = {goal.source for goal in goals if not goal.is_cuda}
    found: Found = {}

    def visit(kernel, grid, arguments, options) -> None:
        label = compile_check.label_of(kernel.__name__, options)
        if label in wanted and (label, "") not in found:
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            [code] = read(compiled.asm["cubin"]).values()
            found[label, ""] = [(compile_check.analysis_of(compiled, code), options)]

    if wanted:
        case = compile_check.Case(SHAPE, "bf16", "bf16")
        compile_check.for_each_launch(KNOWN_TARGETS[target], case, visit)
    return found


def _cuda(target: str, goals: Sequence[Goal], notes: list[str]) -> Found:
    wanted = [goal for goal in goals if goal.is_cuda]
    found: Found = {}
    try:
        tools = cuda_gates.find_tools() if wanted else None
    except LookupError as error:
        notes.append(f"the CUDA kernels are not compiled: {error}")
        return found
    kernels = {source: list(_compiled(tools, source, target)) for source in {goal.source for goal in wanted}}
    for goal in wanted:
        found[goal.source, goal.kernel] = [
            (cuda_gates.analysis_of(code, sm90=goal.source.startswith(cuda_gates.SM90)), {})
            for name, code in kernels[goal.source]
            if re.search(goal.kernel, name)
        ]
    return found


def _compiled(tools: cuda_gates.Tools, source: str, target: str) -> Iterator[tuple[str, Kernel]]:
    """Names and machine code of a file of csrc; the cubin is kept while the sources stay what they are."""
    file = cuda_gates.CSRC / source
    digest = hashlib.sha256(repr((tools.version, cuda_gates.FLAGS, target)).encode())
    for path in cuda_gates.with_includes(file):
        digest.update(path.read_bytes())
    cubin = CACHE / f"{digest.hexdigest()[:32]}.cubin"
    if not cubin.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(".partial")
        command = [tools.nvcc, *cuda_gates.FLAGS, f"-arch={target}", "-o", str(partial), str(file)]
        subprocess.run(command, check=True, capture_output=True)
        partial.replace(cubin)
    kernels = read(cubin, tools.cuobjdump)
    yield from zip(cuda_gates.demangled(list(kernels)), kernels.values(), strict=True)


if __name__ == "__main__":
    sys.exit(main())
