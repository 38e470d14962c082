"""Mutants of every comparison, constant and mask of the kernels, and whether the tests see them: ``make mutants``."""

from __future__ import annotations

import sys

from planted.mutants_cli import main

if __name__ == "__main__":
    sys.exit(main())
