"""What a machine with a GPU is borrowed for: correctness on hardware, then benchmarks. See ``--help`` and gpu_day/."""

from __future__ import annotations

import sys

from gpu_day.cli import main

if __name__ == "__main__":
    sys.exit(main())
