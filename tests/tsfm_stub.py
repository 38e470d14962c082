"""Let the models of granite-tsfm (TinyTimeMixer, TSPulse) be imported without the rest of it.

Its top-level package imports its whole toolkit, with data sets and pipelines, and those pandas, pyarrow and more. Its
models need transformers alone.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def define_packages() -> None:
    """Put bare packages in the place of ``tsfm_public`` and ``tsfm_public.models``. Call it before importing them."""
    if "tsfm_public" in sys.modules:
        return
    folder = Path(importlib.util.find_spec("tsfm_public").origin).parent
    for name, path in (("tsfm_public", folder), ("tsfm_public.models", folder / "models")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
