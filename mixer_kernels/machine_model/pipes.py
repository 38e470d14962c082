"""What an instruction occupies: clocks of each pipe of a quarter of a multiprocessor, for one warp.

A multiprocessor has four schedulers, each with its tensor core and arithmetic units; shared memory is common to them,
at 128 bytes a clock. Sources: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" (results a
clock and multiprocessor; 128 over them are the clocks here), and for the tensor cores the data sheets' peak over
multiprocessors and boost clock. Assumed: F2FP and PRMT go with integer arithmetic, and wgmma and tcgen05 read operands
from shared memory at its usual rate.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .sass import Instruction

PIPES = ("tensor", "issue", "mufu", "fma", "alu", "shared")
SCHEDULERS = 4
SHARED_BYTES = 32  # a clock, a scheduler's part
REGISTERS = 65_536
RESERVED_SHARED = 1024  # that the system takes of each block's shared memory
MUFU_CLOCKS, ALU_CLOCKS, IMAD_CLOCKS = 8.0, 2.0, 2.0


@dataclass(frozen=True)
class Architecture:
    """``flops``: of the tensor cores, bfloat16 with float32 sums, a clock and multiprocessor; ``fp32``: clocks of an
    FFMA; ``shared``: bytes that a multiprocessor has for its blocks; ``warps``: that it holds; ``mma_sync``: the share
    of the peak that mma.sync reaches."""

    flops: int
    fp32: float
    shared: int
    warps: int
    mma_sync: float = 1.0


# A100 312e12 / (108 * 1.410e9); RTX 3090, 4090 and 5090 71e12 / (82 * 1.695e9), 165.2e12 / (128 * 2.52e9) and
# 209.5e12 / (170 * 2.407e9); H100 SXM 989.4e12 / (132 * 1.830e9); B200 2.25e15 / (148 * 1.85e9). mma.sync on Hopper:
# arXiv:2402.13499.
ARCHITECTURES = {
    "sm_80": Architecture(2048, 2.0, 164 << 10, 64),
    "sm_86": Architecture(512, 1.0, 100 << 10, 48),
    "sm_89": Architecture(512, 1.0, 100 << 10, 48),
    "sm_90": Architecture(4096, 1.0, 228 << 10, 64, mma_sync=0.629),
    "sm_100": Architecture(8192, 1.0, 228 << 10, 64),
    "sm_120": Architecture(512, 1.0, 100 << 10, 48),
}

_KINDS = {  # name of an instruction -> its pipe
    **dict.fromkeys("MUFU I2F F2I F2F POPC FLO BREV FRND".split(), "mufu"),
    **dict.fromkeys("FFMA FADD FMUL FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 FFMA2 FADD2 FMUL2".split(), "fma"),
    **dict.fromkeys(
        "F2FP I2FP SEL FSEL FMNMX FMNMX3 ISETP FSETP HSETP2 PLOP3 VIMNMX CSEL MOV CS2R P2R R2P IADD3 IADD LOP3 LEA SHF "
        "PRMT IABS BMSK SGXT VIADD VIADDMNMX IMNMX VOTE FCHK".split(),
        "alu",
    ),
    **dict.fromkeys("LDS STS LDSM STSM ATOMS SHFL LDGSTS".split(), "shared"),
}
EXPONENTIALS = ("MUFU.EX2", "MUFU.TANH")
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Use:
    """Of one instruction: its ``pipe`` ("" for one that occupies none) and for how many ``clocks``; ``operands``:
    bytes that a product reads from shared memory, a warp's part."""

    pipe: str
    clocks: float
    operands: float = 0.0


@dataclass
class Work:
    """Of some instructions: ``clocks`` of each of PIPES, and how many products they hold."""

    clocks: Counter[str] = field(default_factory=Counter)
    products: int = 0
    operand_clocks: float = 0.0  # of shared memory, for products; in clocks["shared"] too

    @property
    def most(self) -> str:
        """The busiest pipe."""
        return max(PIPES, key=lambda pipe: self.clocks[pipe])


class Prices:
    """What the instructions of one kernel cost on one architecture. Of tcgen05 the shape lies in a register, so that
    the whole of the code is needed."""

    def __init__(self, target: str, code: Iterable[Instruction]) -> None:
        if target not in ARCHITECTURES:
            raise ValueError(f"the model knows {', '.join(ARCHITECTURES)}; got machine code for {target}")
        self.arch = ARCHITECTURES[target]
        self._shapes: dict[int, int] = {}  # of products of tcgen05, by their addresses
        constants: dict[str, int] = {}
        for each in code:
            if match := re.fullmatch(r"(UR\d+), (0x[0-9a-f]+)", each.operands):
                constants[match[1]] = int(match[2], 16)
            elif each.name == "UTCHMMA" and (match := re.search(r"idesc\[(UR\d+)\]", each.operands)):
                self._shapes[each.address] = constants.get(match[1], 0)
        self.use = functools.cache(self._use)  # of this kernel's few distinct instructions

    def tensor(self, instruction: Instruction) -> float:
        """Clocks of the tensor core; 0 if it is no product."""
        use = self.use(instruction)
        return use.clocks if use.pipe == "tensor" else 0.0

    def work(self, code: Iterable[Instruction]) -> Work:
        total = Work()
        for each in code:
            use = self.use(each)
            total.clocks["issue"] += each.name != "NOP"
            if use.pipe:
                total.clocks[use.pipe] += use.clocks
            total.products += use.pipe == "tensor"
            total.operand_clocks += use.operands / SHARED_BYTES
        total.clocks["shared"] += total.operand_clocks
        return total

    def _use(self, instruction: Instruction) -> Use:
        name, opcode = instruction.name, instruction.opcode
        if not instruction.runs:
            return Use("", 0.0)
        if name in PRODUCTS:
            return self._product(instruction)
        if name.startswith("IMAD"):
            return Use("fma", IMAD_CLOCKS)
        pipe = _KINDS.get(name, "")
        if pipe == "mufu":
            return Use(pipe, MUFU_CLOCKS)
        if pipe == "alu":
            return Use(pipe, ALU_CLOCKS)
        if pipe == "fma":
            if name in ("FFMA2", "FADD2", "FMUL2"):
                return Use(pipe, 2 * self.arch.fp32)
            if name.startswith("H"):
                return Use(pipe, 2.0 if "BF16" in opcode and self.arch is not ARCHITECTURES["sm_90"] else 1.0)
            return Use(pipe, self.arch.fp32)
        if pipe == "shared":
            return Use(pipe, _bytes(name, opcode) / SHARED_BYTES)
        return Use("", 0.0)

    def _product(self, instruction: Instruction) -> Use:
        opcode, rate = instruction.opcode, self.arch.flops / SCHEDULERS
        rate /= 2 if "TF32" in opcode else 1
        if instruction.name == "HMMA":
            m, n, k = {"1688": (16, 8, 8), "1684": (16, 8, 4)}.get(opcode.split(".")[1], (16, 8, 16))
            return Use("tensor", 2 * m * n * k / (rate * self.arch.mma_sync))
        if instruction.name == "HGMMA":  # of four warps: each scheduler has 16 of the 64 rows, B is read once for all
            _, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", opcode).groups())
            left_in_shared = instruction.operands.split(", ")[1].startswith("gdesc")
            return Use("tensor", 2 * 16 * n * k / rate, (32 * n + 2048 * left_in_shared) / SCHEDULERS)
        # Of one thread for the block: 64 rows take as long as 128.
        shape = self._shapes.get(instruction.address, 0)
        m, n = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
        left_in_shared = not instruction.operands.startswith("tmem")
        return Use("tensor", 2 * max(m, 128) * n * 16 / (rate * SCHEDULERS), (32 * n + 32 * m * left_in_shared) / 4)


def bytes_stored(instruction: Instruction) -> float:
    """By one warp, of results: to global memory, or to shared memory by STSM."""
    name = instruction.name
    return _bytes(name, instruction.opcode) if name in ("STG", "STSM") and instruction.runs else 0.0


def _bytes(name: str, opcode: str) -> float:
    """That one warp loads or stores."""
    if name in ("LDSM", "STSM"):
        return 128 * int(opcode[-1])
    for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if f".{suffix}" in opcode:
            return 32 * size
    return 32 * 4
