"""``python -m mixer_kernels``: ``info``, ``bench``, ``cost``, ``compile-check``, ``convert``, ``timm``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each command is a module with main(argv), imported when it is asked for: `info` must run where others cannot.
COMMANDS = {
    "info": ("mixer_kernels.info", "versions, devices, which backends run here and why not"),
    "bench": ("mixer_kernels.bench.cli", "throughput of a whole model, inference or training, with its baselines"),
    "cost": (
        "mixer_kernels.cost.cli",
        "FLOPs, bytes, what bounds them and a predicted time, for each launch of a block",
    ),
    "compile-check": ("mixer_kernels.compile_check", "compile every tile config for every GPU, without one"),
    "convert": ("mixer_kernels.convert.cli", "weights of Google, lucidrains or timm to a state_dict of FusedMixer"),
    "timm": ("mixer_kernels.timm", "run a script, such as timm's train.py, that knows the fused_mixer_* models"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the arguments after its name; return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
    parser = argparse.ArgumentParser(prog="python -m mixer_kernels", description="Fused MLP-Mixer kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    parser.parse_args(argv)
    raise AssertionError("argparse ends the program: there is no command that it accepts and we do not run")


if __name__ == "__main__":
    sys.exit(main())
