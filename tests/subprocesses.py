"""How tests start pytest itself."""

from __future__ import annotations

import os


def outside_xdist() -> dict[str, str]:
    """The environment without what pytest-xdist tells its workers: pytest-benchmark does not measure in one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
