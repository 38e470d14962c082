"""Machine code as ``cuobjdump`` prints it: instructions with the control bits that ptxas gave them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

NO_BARRIER = 7
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*(?:/\* 0x([0-9a-f]{16}) \*/)?\s*$")
_SECOND_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_PARTS = re.compile(r"(?:@(!?U?P[T\d]+)\s+)?(\S+)\s*(.*)")


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands`` at ``address``. ``control``, 21 bits, is how ptxas schedules it: clocks to wait after
    it (4 bits), yield (1), the scoreboards that it releases when its result is there and when its operands are read
    (3 and 3, 7 for none), those it waits for (6), reuse of registers (4)."""

    address: int
    guard: str
    opcode: str
    operands: str
    control: int = 1 | NO_BARRIER << 5 | NO_BARRIER << 8

    @functools.cached_property
    def name(self) -> str:
        """``HMMA`` for ``HMMA.16816.F32``."""
        return self.opcode.partition(".")[0]

    @property
    def stall(self) -> int:
        return max(1, self.control & 15)

    @property
    def releases(self) -> tuple[int, ...]:
        return tuple(b for b in (self.control >> 5 & 7, self.control >> 8 & 7) if b < 6)

    @property
    def waits(self) -> tuple[int, ...]:
        return tuple(b for b in range(6) if self.control >> 11 >> b & 1)

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        found = re.findall(r"0x[0-9a-f]+", self.operands.rpartition(",")[2])
        return int(found[0], 16) if found else None

    @property
    def runs(self) -> bool:
        """False of what is never executed: padding, and what stands under a guard that is never true."""
        return self.name != "NOP" and self.guard != "!PT"


@dataclass
class Kernel:
    """One function of a cubin: its instructions and what it takes of a multiprocessor."""

    name: str
    target: str  # "sm_90" of machine code for sm_90a too
    code: list[Instruction] = field(default_factory=list)
    registers: int = 0
    stack: int = 0
    shared: int = 0  # bytes, static
    threads: int = 0  # of a block, at most; 0 if the cubin does not say


def read(cubin: bytes | Path, disassembler: str | None = None) -> dict[str, Kernel]:
    """The kernels of a cubin by their mangled names; ``disassembler``: a path of cuobjdump (default: what is found)."""
    disassembler = disassembler or cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        path = cubin
        if isinstance(cubin, bytes):
            path = Path(folder, "kernels.cubin")
            path.write_bytes(cubin)
        listing, usage, sections = (_dump(disassembler, flag, path) for flag in ("-sass", "-res-usage", "-elf"))
    kernels = parse(listing)
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        if name in kernels:
            use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernels[name].registers, kernels[name].stack = use["REG"], use["STACK"]
            kernels[name].shared = use.get("SHARED", 0)
    for name, text in re.findall(r"\.nv\.info\.(\S+)\n(.*?)(?=\n\.section|\n\.nv\.|\Z)", sections, re.DOTALL):
        match = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*?Value:\s*0x([0-9a-f]+)", text, re.DOTALL)
        if match and name in kernels:
            kernels[name].threads = int(match[1], 16)
    return kernels


def parse(listing: str) -> dict[str, Kernel]:
    """The kernels of the output of ``cuobjdump -sass``. Encodings may be absent: then nothing stalls or waits."""
    kernels: dict[str, Kernel] = {}
    target, kernel, pending = "", None, None
    for line in listing.splitlines():
        if match := re.search(r"code for (sm_\d+)", line):
            target = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = kernels.setdefault(match[1], Kernel(match[1], target))
        elif kernel is not None and (match := _LINE.match(line)):
            guard, opcode, operands = _PARTS.match(match[2]).groups()
            kernel.code.append(Instruction(int(match[1], 16), guard or "", opcode, operands))
            pending = match[3]
        elif pending and (match := _SECOND_WORD.match(line)):
            last = kernel.code[-1]
            control = int(match[1], 16) >> 41 & 0x1FFFFF
            kernel.code[-1] = Instruction(last.address, last.guard, last.opcode, last.operands, control)
            pending = None
    return kernels


@functools.cache  # a program stays where it is while a check runs
def cuobjdump() -> str:
    """The path of the disassembler: that of Triton's wheel, which is the newest, else one in PATH."""
    try:
        import triton.backends.nvidia as nvidia

        path = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        if path.is_file():
            return str(path)
    except ImportError:
        pass
    found = shutil.which("cuobjdump")
    if found is None:
        raise LookupError("cuobjdump not found: it comes with Triton's wheel and with the CUDA toolkit")
    return found


def _dump(disassembler: str, flag: str, path: Path) -> str:
    return subprocess.run([disassembler, flag, str(path)], capture_output=True, text=True, check=True).stdout
