"""What a change may not make worse unseen: bounds of the model and faults of the machine code, kept in a file.

``tuning/bounds.json`` holds, by backend and target, a ``Bound`` for each kernel that the gates look at, and which
faults are known of which kernels. compile-check keeps Triton's, tools/cuda_gates.py those of csrc; both fail where a
kernel is worse than what is kept, and write the file anew when asked to with ``--accept``. Another version of the
compiler makes other code: then nothing is compared, and the gate says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import Analysis
from .pipes import EXPONENTIALS
from .sass import Instruction

FILE = Path(__file__).parents[1] / "tuning" / "bounds.json"
TOLERANCE = 0.01  # of a share: the model's rounding, no change of a kernel
PRODUCT, FENCE = "HGMMA", "WARPGROUP.ARRIVE"
# A product that waits for the one before it has a fence of its own: ptxas says so as C75xx, Triton does not pass it on.
LEAST_PRODUCTS_A_FENCE = 2


# GELU of so many elements, one exponential each or two with its slope, stands together where nothing branches between.
LEAST_RUN = 4


@dataclass(frozen=True)
class Faults:
    """``divisions``: of integers in loops with products; ``serialised``: products of wgmma in such loops that wait one
    for another; ``run``: the most exponentials without a branch among them, None where there are none."""

    divisions: int
    serialised: int
    run: int | None

    def sentences(self) -> dict[str, str]:
        """What is wrong, by the name of the fault."""
        found = {}
        if self.divisions:
            found["division"] = (
                f"{self.divisions} integer divisions in a loop with products: find the quotient before it"
            )
        if self.serialised:
            found["serialised"] = (
                f"{self.serialised} products of wgmma wait one for another (C75xx of ptxas): something reads or writes "
                "their registers between them"
            )
        if self.run is not None and self.run < LEAST_RUN:
            found["branches"] = (
                f"at most {self.run} exponentials without a branch among them, expected {LEAST_RUN}: branch around all "
                "elements of a step, not around each"
            )
        return found


@dataclass(frozen=True)
class Bound:
    """The model's bound for a kernel: ``share`` of the tensor peak in the hottest loop, the ``pipe`` that is busiest,
    ``issue`` slots to a clock of the tensor core."""

    share: float
    pipe: str
    issue: float


def faults_of(analysis: Analysis) -> Faults:
    """Of the hot loops as they are run, and of all exponentials of the kernel."""
    blocks = analysis.flow.blocks.values()
    run = max(sum(each.opcode.startswith(EXPONENTIALS) for each in block) for block in blocks)
    divisions = serialised = 0
    for _, turn in analysis.hot_turns():
        divisions += sum(_divides(each) or _calls_division(each, analysis.kernel.code) for each in turn)
        products = sum(each.name == PRODUCT for each in turn)
        fences = sum(each.opcode == FENCE for each in turn)
        serialised += products if products < LEAST_PRODUCTS_A_FENCE * fences else 0
    return Faults(divisions, serialised, run or None)


def bound_of(analysis: Analysis) -> Bound | None:
    """None of a kernel without a loop that has products."""
    hottest = analysis.hottest()
    if hottest is None:
        return None
    return Bound(round(hottest.shares.bound, 3), hottest.shares.pipe, round(hottest.issue_per_tensor, 2))


class Bounds:
    """The file: ``kept[backend][target]`` has the ``compiler``, the ``kernels`` and the ``known`` faults."""

    def __init__(self, path: Path = FILE) -> None:
        self.path = path
        self.kept: dict = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def bound(self, backend: str, target: str, kernel: str) -> Bound | None:
        entry = self.kept.get(backend, {}).get(target, {}).get("kernels", {}).get(kernel)
        return None if entry is None else Bound(**entry)

    def why_not_compared(self, backend: str, target: str, compiler: str) -> str | None:
        """A sentence where what is kept is another compiler's, or nothing is."""
        entry = self.kept.get(backend, {}).get(target)
        if entry is None:
            return f"{target}: {self.path.name} keeps no bounds for it"
        if entry["compiler"] != compiler:
            return f"{target}: {self.path.name} keeps what {entry['compiler']} made, this is {compiler}: not compared"
        return None

    def problems(
        self, backend: str, target: str, found: Mapping[str, Bound], stems: Iterable[str], accept: str
    ) -> list[str]:
        """Sentences on ``found``, which are all kernels whose names begin with one of ``stems``; ``accept``: the
        command that keeps them."""
        how = f"if that is meant, `{accept}` keeps it"
        said = []
        for name, is_ in found.items():
            was = self.bound(backend, target, name)
            if was is None:
                said.append(f"{target} {name}: {self.path.name} has no bound for it; {how}")
            elif is_.share < was.share - TOLERANCE:
                said.append(
                    f"{target} {name}: the model gave it {was.share:.1%} of the tensor peak, now {is_.share:.1%}, "
                    f"bound by {is_.pipe}; {how}"
                )
        for name in self.kept.get(backend, {}).get(target, {}).get("kernels", {}):
            if name.startswith(tuple(stems)) and name not in found:
                said.append(f"{target} {name}: {self.path.name} has a bound for it, it was not compiled; {how}")
        return said

    def unknown(self, backend: str, target: str, kernel: str, faults: Faults, accept: str) -> list[str]:
        """Sentences on faults that are not known of ``kernel``, the name under which they are listed. Of kernels
        without a bound only where all that are known have been listed: after a complete run."""
        entry = self.kept.get(backend, {}).get(target, {})
        if not entry.get("complete") and kernel not in entry.get("kernels", {}):
            return []
        known = entry.get("known", {}).get(kernel, ())
        how = f"if that is meant, `{accept}` lists it as known"
        return [f"{text}; {how}" for fault, text in faults.sentences().items() if fault not in known]

    def accept(
        self,
        backend: str,
        target: str,
        compiler: str,
        found: Mapping[str, Bound],
        stems: Iterable[str],
        faults: Mapping[str, Iterable[Faults]],
        complete: bool,
    ) -> None:
        """Keep ``found`` in place of all whose names begin with one of ``stems``, and as known what ``faults`` hold, by
        name; ``complete``: in place of all that is known. What another version of the compiler made goes."""
        entry = self.kept.setdefault(backend, {}).get(target, {})
        if entry.get("compiler") != compiler:
            entry = {"compiler": compiler, "complete": False, "known": {}, "kernels": {}}
        stems = tuple(stems)
        kernels = {name: bound for name, bound in entry["kernels"].items() if not name.startswith(stems)}
        kernels |= {name: dataclasses.asdict(bound) for name, bound in found.items()}
        known = {name: set(v) for name, v in entry["known"].items() if not (complete or name.startswith(stems))}
        for name, each in faults.items():
            known.setdefault(name, set()).update(fault for one in each for fault in one.sentences())
        listed = {name: sorted(those) for name, those in sorted(known.items()) if those}
        self.kept[backend][target] = {
            "compiler": compiler, "complete": complete or entry["complete"], "known": listed,
            "kernels": dict(sorted(kernels.items())),
        }  # fmt: skip

    def save(self) -> None:
        """A line a kernel, so that a change is read in a diff."""
        lines = []
        for backend, targets in sorted(self.kept.items()):
            inside = []
            for target, entry in sorted(targets.items()):
                rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(b)}" for name, b in entry["kernels"].items())
                kernels = f"{{\n{rows}\n   }}" if rows else "{}"
                known = ",\n".join(f"    {json.dumps(name)}: {json.dumps(n)}" for name, n in entry["known"].items())
                known = f"{{\n{known}\n   }}" if known else "{}"
                inside.append(
                    f'  "{target}": {{\n   "compiler": {json.dumps(entry["compiler"])},\n'
                    f'   "complete": {json.dumps(entry["complete"])},\n'
                    f'   "known": {known},\n   "kernels": {kernels}\n  }}'
                )
            lines.append(f' "{backend}": {{\n' + ",\n".join(inside) + "\n }")
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _divides(instruction: Instruction) -> bool:
    """The reciprocal of an integer, rounded up, is the beginning of a division."""
    return instruction.name == "I2F" and ".RP" in instruction.opcode


def _calls_division(instruction: Instruction, code: list[Instruction]) -> bool:
    """64-bit divisions are a function. A call under a guard is how ptxas leaves some loops."""
    if instruction.name != "CALL" or instruction.guard or instruction.target is None:
        return False
    body = [each for each in code if each.address >= instruction.target]
    end = next((i for i, each in enumerate(body) if each.name == "RET"), len(body))
    return any(map(_divides, body[:end]))
