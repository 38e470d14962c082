"""The launchers of csrc/sm90 under sanitizers: driver_sm90.cpp. Faults in them: tools/planted/of_sm90.py."""

from __future__ import annotations

import pytest
from cuda_on_host import build


@pytest.mark.parametrize(("sanitizer", "runs"), [(None, "6"), ("address,undefined", "2"), ("thread", "1")])
def test_launchers(sanitizer, runs) -> None:
    """Every launcher over small shapes, in so many orders."""
    result = build.run(build.build_driver(sanitizer, name="driver_sm90"), runs)
    assert result.returncode == 0, result.stdout
