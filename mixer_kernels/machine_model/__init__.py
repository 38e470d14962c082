"""A static model of machine code: which share of the tensor peak a kernel's hot loop can reach, without a GPU.

It reads what ptxas made (``sass``), finds the loops (``flow``), counts what one turn occupies of each pipe (``pipes``)
and plays ptxas' schedule on one scheduler with its resident warps (``schedule``). All are upper bounds: no limit of
memory or L2, no bank conflicts, no tail of the grid, no lowered clocks. Differences of a few points mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .flow import Flow, Loop
from .pipes import EXPONENTIALS, PIPES, REGISTERS, RESERVED_SHARED, SCHEDULERS, Prices, Work, bytes_stored
from .sass import Instruction, Kernel, parse, read
from .schedule import Played, play

__all__ = ["Analysis", "HotLoop", "Kernel", "Shares", "parse", "read"]

REGISTER_STEP = 8  # registers are allotted to a thread in eights


@dataclass(frozen=True)
class Shares:
    """Of the tensor peak. ``overlapped``: all pipes work at once, the busiest decides (a). ``ping_pong``: a warp's
    other work runs under the products of other warps, not under its own (b). ``serial``: nothing overlaps (c).
    ``played``: by ptxas' schedule (s), None for tcgen05, whose waits are not modelled. ``pipe`` decides ``overlapped``.
    """

    overlapped: float
    ping_pong: float
    serial: float
    played: float | None
    pipe: str

    @property
    def bound(self) -> float:
        """The least that the model says of what overlaps. wgmma's operands do not block other loads in ``played``,
        which then may pass ``overlapped``."""
        return min(self.overlapped, self.ping_pong if self.played is None else self.played)


@dataclass(frozen=True)
class HotLoop:
    """An innermost loop with products: ``turn`` is what a warp executes in one turn of it."""

    loop: Loop
    turn: list[Instruction]
    work: Work
    shares: Shares
    clocks: float | None  # of a turn, as played

    @property
    def issue_per_tensor(self) -> float:
        """Issue slots to a clock of the tensor core, which has to stay well below 1."""
        return self.work.clocks["issue"] / self.work.clocks["tensor"]


class Analysis:
    """One kernel as it is launched: ``warps`` to a block, ``shared`` bytes of dynamic shared memory.

    ``products``: how many of the warps compute products (default: all); others copy. ``blocks``: on a multiprocessor
    (default: what registers, shared memory and warps allow). ``copies``: clocks that cp.async takes.

    Where a turn branches, the way is that with the most products, then the shortest, or the ``longest``: what happens
    in some turns only, such as an epilogue, is left out. Where even the shortest computes GELU, the way is that of the
    erf form, which timm's models have (a second exponential for its slope, a longer polynomial), and then that which
    stores the most bytes, as training does.
    """

    def __init__(
        self,
        kernel: Kernel,
        warps: int = 0,
        shared: int = 0,
        products: int = 0,
        blocks: int = 0,
        copies: float = 0.0,
        longest: bool = False,
    ) -> None:
        self.kernel, self.copies, self.longest = kernel, copies, longest
        self.prices = Prices(kernel.target, kernel.code)
        self.flow = Flow(kernel.code)
        self._polynomials = {
            each.address
            for block in self.flow.blocks.values()
            if any(one.opcode.startswith(EXPONENTIALS) for one in block)
            for each in block
            if each.name.startswith("FFMA")
        }
        self.warps = warps or max(1, kernel.threads // 32) if kernel.threads or warps else 4
        self.products = products or self.warps
        self.blocks = blocks or self._resident(shared)
        self.on_scheduler = max(1, self.products * self.blocks // SCHEDULERS)
        self._warps_of_block = max(1, self.products // SCHEDULERS)

    def hot_loops(self) -> Iterator[HotLoop]:
        """The innermost loops with products, in the order of their addresses."""
        for loop, turn in self.hot_turns():
            yield self._hot_loop(loop, turn)

    def hot_turns(self) -> Iterator[tuple[Loop, list[Instruction]]]:
        """Those loops, with what a warp executes in one turn."""
        loops = [loop for loop in self.flow.root.walk() if loop is not self.flow.root and self._has_products(loop)]
        for loop in sorted(loops, key=lambda loop: loop.header):
            if not any(self._has_products(inner) for inner in loop.inner):
                yield loop, self.trace(loop)

    def hottest(self) -> HotLoop | None:
        """The one with the most work for the tensor cores in a turn; None if no loop has products."""
        return max(self.hot_loops(), key=lambda hot: hot.work.clocks["tensor"], default=None)

    def trace(self, loop: Loop, turns: Mapping[int, int] | None = None, sums: bool = False) -> list[Instruction]:
        """One turn of ``loop``, inner loops with as many as ``turns`` says of their headers."""

        def of_gelu(each: Instruction) -> tuple[float, ...]:
            exponential, polynomial = each.opcode.startswith(EXPONENTIALS), each.address in self._polynomials
            added = sums and each.name in ("FADD", "FFMA")
            return self.prices.tensor(each), exponential, polynomial, bytes_stored(each), added

        plain = self.flow.trace(loop, lambda each: (self.prices.tensor(each),), turns, self.longest)
        if not any(each.opcode.startswith(EXPONENTIALS) for each in plain):
            return plain
        return self.flow.trace(loop, of_gelu, turns, self.longest)

    def whole(self, turns: Mapping[int, int]) -> HotLoop:
        """The kernel from entry to exit, as one turn; ``turns`` of loops by their headers."""
        return self._hot_loop(self.flow.root, self.trace(self.flow.root, turns), once=True)

    def outer(self, hot: HotLoop, turns: int, sums: bool = False) -> HotLoop:
        """One turn of the loop around ``hot``, which takes ``turns`` turns in it: a unit of a persistent kernel; the
        whole kernel where there is no loop around it. ``sums``: by the way that adds the most, which computes the
        statistics that are optional."""
        around = next(loop for loop in self.flow.root.walk() if hot.loop in loop.inner)
        return self._hot_loop(around, self.trace(around, {hot.loop.header: turns}, sums), once=True)

    def tile(self, hot: HotLoop, turns: int) -> HotLoop:
        """A tile of a persistent kernel, ``turns`` of ``hot``: where the loop over tiles is flattened into it, the last
        of them takes the longest way, that with the epilogue."""
        whole = Analysis(
            self.kernel, self.warps, products=self.products, blocks=self.blocks, copies=self.copies, longest=True
        )
        return self._hot_loop(hot.loop, hot.turn * (turns - 1) + whole.trace(hot.loop), once=True)

    def _has_products(self, loop: Loop) -> bool:
        return any(self.prices.tensor(each) for each in self.flow.code_of(loop))

    def _hot_loop(self, loop: Loop, turn: list[Instruction], once: bool = False) -> HotLoop:
        work = self.prices.work(turn)
        tcgen05 = any(each.name == "UTCHMMA" for each in turn)
        played: Played | None = None
        if not tcgen05 and work.clocks["tensor"]:
            few = {"turns": 3, "skip": 1} if once else {}
            played = play(turn, self.prices, self.on_scheduler, self._warps_of_block, self.copies, **few)
        shares = self._shares(work, self.blocks if tcgen05 else 0, played)
        return HotLoop(loop, turn, work, shares, played.clocks if played else None)

    def _shares(self, work: Work, tcgen05_blocks: int, played: Played | None) -> Shares:
        """``tcgen05_blocks`` on a multiprocessor: their products are the block's, the other work is every warp's."""
        tensor = work.clocks["tensor"]
        owners = tcgen05_blocks or self.on_scheduler
        scale = self.on_scheduler / owners  # warps of a scheduler to one product
        load = {pipe: work.clocks[pipe] * scale for pipe in PIPES}
        load["tensor"] = tensor
        load["shared"] = (work.clocks["shared"] - work.operand_clocks) * scale + work.operand_clocks
        others = max(load["issue"] - work.products * scale, *(load[pipe] for pipe in ("mufu", "fma", "alu")))
        others = max(others, (work.clocks["shared"] - work.operand_clocks) * scale)
        most = max(load, key=lambda pipe: load[pipe])
        ping_pong = tensor / max(load[most], (tensor + others) / owners) if tensor else 0.0
        return Shares(
            tensor / load[most] if tensor else 0.0, ping_pong, tensor / (tensor + others) if tensor else 0.0,
            played.share if played else None, most,
        )  # fmt: skip

    def _resident(self, shared: int) -> int:
        registers = -(-max(1, self.kernel.registers) // REGISTER_STEP) * REGISTER_STEP * 32 * self.warps
        arch = self.prices.arch
        memory = shared + self.kernel.shared + RESERVED_SHARED
        return max(1, min(REGISTERS // registers, arch.shared // memory, arch.warps // self.warps))
