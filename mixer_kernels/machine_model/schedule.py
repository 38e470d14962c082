"""ptxas' own schedule, played on one scheduler: who issues when, and how much of the time its tensor core works.

Warps issue one instruction a clock in turn, the one that has waited longest first. An instruction waits for the clocks
that the one before it asks for, for its scoreboards, for a place in the queue of its pipe, and at a barrier for the
other warps of its block. Products of wgmma queue on the tensor core; WARPGROUP.DEPBAR waits for their groups.

Loads hit the nearest cache, and what TMA or another warp brings has arrived; ``copies`` are the clocks that cp.async
takes. Latencies in all: special functions 20, shared memory 30, global memory 40 clocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .pipes import SHARED_BYTES, Prices
from .sass import Instruction

# Clocks from leaving the pipe to the release of the scoreboard.
_AFTER = {"mufu": 12.0, "shared": 26.0, "global": 36.0}
_AFTER_OTHERS = 12.0
# Clocks of work that may wait in front of a pipe.
_QUEUE = {"mufu": 16.0, "shared": 16.0, "global": 16.0, "tensor": 0.0, "fma": 0.0, "alu": 0.0}
_GLOBAL = ("LDG", "STG", "LD", "ST", "LDC")
_GLOBAL_CLOCKS = 4.0
_BARRIER_CLOCKS = 4.0


class Played(NamedTuple):
    """``share`` of the tensor peak in the steady state, ``clocks`` of a turn."""

    share: float
    clocks: float


class _Step(NamedTuple):
    pipe: str
    hold: float  # clocks of the pipe
    after: float
    stall: int
    waits: tuple[int, ...]
    releases: tuple[int, ...]
    action: str  # "", "product", "commit", "groups", "copy", "copies", "barrier"
    count: int  # groups or copies that may be outstanding; the barrier's number


@dataclass
class _Warp:
    block: int
    at: int = 0
    turns: int = 0
    ready: float = 0.0
    last: float = 0.0
    held_by: int = -1
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)  # when products of wgmma end, oldest first
    copies: list[float] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)  # when turns ended


def play(
    turn: Sequence[Instruction],
    prices: Prices,
    warps: int,
    warps_of_block: int,
    copies: float = 0.0,
    turns: int = 8,
    skip: int = 3,
) -> Played:
    """``turns`` turns of ``warps`` warps on a scheduler, ``warps_of_block`` of them to a block; the first ``skip`` are
    not counted."""
    steps = [_step(each, prices) for each in turn if each.name != "NOP"]
    free = dict.fromkeys(_QUEUE, 0.0)
    state = [_Warp(block=i // warps_of_block) for i in range(warps)]
    now = 0.0
    while any(warp.turns < turns for warp in state):
        earliest, chosen = float("inf"), None
        for warp in state:
            if warp.held_by >= 0:
                continue
            at = max(now, _earliest(warp, steps[warp.at], free))
            if at < earliest or (at == earliest and warp.last < chosen.last):
                earliest, chosen = at, warp
        if chosen is None:
            raise ValueError("every warp waits at a barrier: this path is not one that all take")
        now = float(-(-earliest // 1))
        _issue(chosen, steps[chosen.at], now, free, copies)
        if chosen.held_by >= 0:
            _release(state, chosen, now)
        chosen.at += 1
        if chosen.at == len(steps):
            chosen.at = 0
            chosen.turns += 1
            chosen.marks.append(now)
        now += 1.0
    clocks = max((warp.marks[turns - 1] - warp.marks[skip - 1]) / (turns - skip) for warp in state)
    return Played(warps * sum(map(prices.tensor, turn)) / clocks, clocks)


def _earliest(warp: _Warp, step: _Step, free: dict[str, float]) -> float:
    at = warp.ready
    for board in step.waits:
        at = max(at, warp.boards[board])
    if step.action in ("groups", "copies"):
        pending = warp.groups if step.action == "groups" else warp.copies
        if len(pending) > step.count:
            at = max(at, pending[-1 - step.count])
    if step.pipe and step.action not in ("product", "commit"):
        at = max(at, free[step.pipe] - _QUEUE[step.pipe])
    return at


def _issue(warp: _Warp, step: _Step, now: float, free: dict[str, float], copies: float) -> None:
    start = now
    if step.pipe:
        start = max(now, free[step.pipe])
        free[step.pipe] = start + step.hold
    done = start + step.hold
    if step.action == "commit":
        warp.groups = [*warp.groups, done][-8:]
    elif step.action == "copy":
        warp.copies = [*warp.copies, now + copies][-16:]
    elif step.action == "barrier":
        warp.held_by = step.count
    for board in step.releases:
        warp.boards[board] = max(warp.boards[board], done + step.after)
    warp.ready, warp.last = now + step.stall, now


def _release(state: list[_Warp], warp: _Warp, now: float) -> None:
    """Let the block of ``warp`` go on if it was the last one at the barrier."""
    mates = [each for each in state if each.block == warp.block]
    if all(each.held_by == warp.held_by for each in mates):
        for each in mates:
            each.held_by, each.ready = -1, max(each.ready, now + _BARRIER_CLOCKS)


def _step(instruction: Instruction, prices: Prices) -> _Step:
    use, name, opcode = prices.use(instruction), instruction.name, instruction.opcode
    pipe, hold, action, count = use.pipe, use.clocks, "", 0
    after = _AFTER.get(pipe, _AFTER_OTHERS)
    if name == "HGMMA":
        # Its operands take their time of shared memory, but do not keep the loads of other warps waiting.
        hold, after = max(hold, use.operands / SHARED_BYTES), 0.0
        action = "commit" if "gsb0" in instruction.operands else "product"
    elif name in _GLOBAL and instruction.runs:
        pipe, hold, after = "global", _GLOBAL_CLOCKS, _AFTER["global"]
    elif name == "LDGDEPBAR":
        action = "copy"
    elif match := re.fullmatch(r"(?:gsb0|SB0), 0x([0-9a-f]+)", instruction.operands):
        action, count = "groups" if opcode.startswith("WARPGROUP.DEPBAR") else "copies", int(match[1], 16)
    elif name == "BAR" and ".ARV" not in opcode and (match := re.match(r"(0x[0-9a-f]+)\s*$", instruction.operands)):
        action, count = "barrier", int(match[1], 16)
    return _Step(pipe, hold, after, instruction.stall, instruction.waits, instruction.releases, action, count)
