"""One small breakage of the product at a time, in a copy, and the test that has to see it: ``make planted``."""

from __future__ import annotations

import sys

from planted.cli import main

if __name__ == "__main__":
    sys.exit(main())
