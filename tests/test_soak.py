"""``tools/soak.py`` for a few seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools/soak.py"


def test_a_short_soak() -> None:
    """Threads that begin at once, copies, training, freezing, forks, one spawned process."""
    result = subprocess.run([sys.executable, TOOL, "--minutes", "0.25"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 rounds" not in result.stdout
