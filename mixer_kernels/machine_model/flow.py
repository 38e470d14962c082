"""The control flow of a kernel: basic blocks, the tree of its loops, and the instructions of one turn of a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .sass import Instruction

JUMPS, TABLES, ENDS = ("BRA", "JMP"), ("BRX", "BRXU", "JMX", "JMXU"), ("EXIT", "RET")
SPIN_PENALTY = 10_000  # instructions; more than any way around a block that spins


@dataclass
class Loop:
    """A natural loop, or the whole kernel: ``header`` is its first block, ``blocks`` are all, inner loops' too."""

    header: int
    blocks: set[int]
    latches: set[int]  # where a turn ends
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        """This loop and all in it, outer loops first."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


class Flow:
    """Basic blocks by their first address, and where each may go on."""

    def __init__(self, code: list[Instruction]) -> None:
        self.blocks, self.successors = _split(code)
        self.entry = code[0].address
        self.root = self._loop_tree()

    def code_of(self, loop: Loop) -> list[Instruction]:
        """All of its instructions, in the order of their addresses."""
        return [each for block in sorted(loop.blocks) for each in self.blocks[block]]

    def trace(
        self,
        loop: Loop,
        weight: Callable[[Instruction], tuple[float, ...]],
        turns: Mapping[int, int] | None = None,
        longest: bool = False,
    ) -> list[Instruction]:
        """What a warp executes in one turn of ``loop``, or from entry to exit of the kernel.

        Of the ways through a turn it is that of the greatest sum of ``weight``, tuples that are compared in order, and
        among those the shortest, or ``longest``. An inner loop takes as many turns as ``turns`` says of its header, 1
        where it does not. A block that spins on a barrier is avoided: what it waits for has arrived.
        """
        turns = turns or {}
        owner = {block: inner for inner in loop.inner for block in inner.blocks}
        node_of = {block: owner[block].header if block in owner else block for block in loop.blocks}
        parts: dict[int, list[Instruction]] = {}
        for node in set(node_of.values()):
            if node in owner:
                parts[node] = self.trace(owner[node], weight, turns, longest) * turns.get(node, 1)
            else:
                parts[node] = self.blocks[node]
        value = {
            node: (*_sum(map(weight, part)), self._size(node, part, owner, longest)) for node, part in parts.items()
        }
        after = {node: self._after(node, loop, owner, node_of) for node in parts}
        ends = {node_of[latch] for latch in loop.latches}
        best: dict[int, tuple[tuple[float, ...], int | None]] = {}
        for node in _postorder(node_of[loop.header], after):
            ways = [(best[next_][0], next_) for next_ in after[node] if next_ in best]
            if node in ends:
                ways.append(((0.0,) * len(value[node]), None))
            if ways:
                rest, next_ = max(ways, key=lambda way: way[0])
                best[node] = (_sum([rest, value[node]]), next_)
        path, node = [], node_of[loop.header]
        while node is not None:
            path += parts[node]
            node = best[node][1]
        return path

    def _size(self, node: int, part: list[Instruction], owner: Mapping[int, Loop], longest: bool) -> int:
        spins = node in owner and any(i.name == "SYNCS" for i in part)
        return -SPIN_PENALTY if spins else len(part) if longest else -len(part)

    def _after(self, node: int, loop: Loop, owner: Mapping[int, Loop], node_of: Mapping[int, int]) -> list[int]:
        """The nodes of the same turn that may follow."""
        sources = owner[node].blocks if node in owner else (node,)
        found = [t for s in sorted(sources) for t in self.successors[s] if t in node_of and t != loop.header]
        return [n for n in dict.fromkeys(node_of[t] for t in found) if n != node]

    def _loop_tree(self) -> Loop:
        dominators, predecessors = _dominators(self.successors, self.entry)
        loops: dict[int, Loop] = {}
        for block in dominators:
            for header in self.successors[block]:
                if header in dominators[block]:
                    loop = loops.setdefault(header, Loop(header, {header}, set()))
                    loop.latches.add(block)
                    pending = [block]
                    while pending:
                        one = pending.pop()
                        if one not in loop.blocks:
                            loop.blocks.add(one)
                            pending += [p for p in predecessors[one] if p in dominators]
        exits = {block for block in dominators if not self.successors[block]}
        root = Loop(self.entry, set(dominators), exits)
        nested = [root]
        for loop in sorted(loops.values(), key=lambda loop: -len(loop.blocks)):
            parent = next(outer for outer in reversed(nested) if loop.blocks <= outer.blocks)
            parent.inner.append(loop)
            nested.append(loop)
        return root


def _sum(tuples: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*tuples, strict=True)))


def _split(code: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    breaks = (*JUMPS, *TABLES, *ENDS, "BSYNC", "CALL")
    leaders = {code[0].address}
    for here, after in zip(code, [*code[1:], None], strict=True):
        if here.name in (*JUMPS, "BSSY", "CALL") and here.target is not None:
            leaders.add(here.target)
        if after is not None and here.name in breaks:
            leaders.add(after.address)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in leaders:
            current = blocks.setdefault(instruction.address, [])
        current.append(instruction)

    successors: dict[int, list[int]] = {}
    starts = sorted(blocks)
    meets: dict[str, int | None] = {}  # where threads that parted at a BSSY join again, by its register
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        last = blocks[start][-1]
        for each in blocks[start]:
            if each.name == "BSSY":
                meets[each.operands.split(",")[0]] = each.target
        conditional = last.guard not in ("", "PT") or re.match(r"!?U?P\d", last.operands) is not None
        jumps = [last.target] if last.name in (*JUMPS, "CALL") else []
        if last.name == "BSYNC":
            jumps = [meets.get(last.operands.split(",")[0])]
        falls = [following] if conditional or last.name not in (*JUMPS, *TABLES, *ENDS, "BSYNC") else []
        successors[start] = [t for t in dict.fromkeys(jumps + falls) if t in blocks]
    _add_tables(starts, blocks, successors)
    return blocks, successors


def _add_tables(starts: list[int], blocks: dict[int, list[Instruction]], successors: dict[int, list[int]]) -> None:
    """Targets of a jump table are not in the code: blocks to which nothing else leads, of the table before them."""
    reached = {t for targets in successors.values() for t in targets}
    table = None
    for start in starts:
        if start != starts[0] and start not in reached and table is not None and blocks[start][0].name != "NOP":
            successors[table].append(start)
        if blocks[start][-1].name in TABLES:
            table = start


def _dominators(successors: Mapping[int, list[int]], entry: int) -> tuple[dict[int, set[int]], dict[int, list[int]]]:
    """Blocks on every way to a block, for those that are reached; predecessors."""
    order = list(reversed(list(_postorder(entry, successors))))
    predecessors: dict[int, list[int]] = {block: [] for block in successors}
    for block, targets in successors.items():
        for target in targets:
            predecessors[target].append(block)
    position = {block: i for i, block in enumerate(order)}
    nearest: dict[int, int] = {entry: entry}

    def common(left: int, right: int) -> int:
        while left != right:
            while position[left] > position[right]:
                left = nearest[left]
            while position[right] > position[left]:
                right = nearest[right]
        return left

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in nearest]
            new = known[0]
            for other in known[1:]:
                new = common(new, other)
            changed |= nearest.get(block) != new
            nearest[block] = new
    dominators: dict[int, set[int]] = {}
    for block in order:
        dominators[block] = {block} if block == entry else dominators[nearest[block]] | {block}
    return dominators, predecessors


def _postorder(entry: int, successors: Mapping[int, Iterable[int]]) -> Iterator[int]:
    seen, stack = {entry}, [(entry, iter(successors[entry]))]
    while stack:
        node, following = stack[-1]
        after = next((t for t in following if t not in seen), None)
        if after is None:
            yield stack.pop()[0]
        else:
            seen.add(after)
            stack.append((after, iter(successors[after])))
