"""Listings as cuobjdump prints them, written by hand."""

from __future__ import annotations

from mixer_kernels.machine_model import Kernel, parse

NOTHING = 7  # no scoreboard


def line(
    address: int, text: str, stall: int = 1, waits: tuple[int, ...] = (), releases: int = NOTHING, read: int = NOTHING
) -> str:
    """One instruction and its encoding, of which only the control bits are set."""
    control = stall | releases << 5 | read << 8 | sum(1 << board for board in waits) << 11
    return f"        /*{address:04x}*/   {text} ;   /* 0x{0:016x} */\n   /* 0x{control << 41:016x} */"


def listing(target: str, *instructions: str | tuple, name: str = "kernel") -> str:
    """Instructions 16 bytes apart from 0 on: a text, or a text and the keywords of ``line``."""
    rows = [f"\tcode for {target}", f"\t\tFunction : {name}"]
    for i, each in enumerate(instructions):
        text, options = (each, {}) if isinstance(each, str) else each
        rows.append(line(16 * i, text, **options))
    return "\n".join(rows)


def kernel(target: str, *instructions: str | tuple) -> Kernel:
    return parse(listing(target, *instructions))["kernel"]
