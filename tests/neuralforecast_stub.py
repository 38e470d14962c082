"""Let neuralforecast's models be imported without the rest of it.

Its top-level package imports its tuning, and that ray, optuna and more. A model, with its own ``fit``, needs
pytorch-lightning and utilsforecast.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def define_packages() -> None:
    """Put bare packages in the place of ``neuralforecast`` and ``neuralforecast.models``. Call it before importing
    them."""
    if "neuralforecast" in sys.modules:
        return
    folder = Path(importlib.util.find_spec("neuralforecast").origin).parent
    for name, path in (("neuralforecast", folder), ("neuralforecast.models", folder / "models")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
