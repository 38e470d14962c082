"""On which GPUs a backend's results were checked and its speed was measured: measured.json, beside the package.

For "cuda:sm90" the file has beside each GPU what ran there: ``_C.sm90_sources``, a digest of the kernels' sources.
"""

from __future__ import annotations

import functools
import importlib.resources
import json

MEASURED_FILE = "measured.json"


def measured_gpus(backend: str) -> list[str]:
    """The GPUs on which ``backend`` has been checked and measured, by name."""
    return list(_measured().get(backend, ()))


def passed_on(backend: str, sources: str) -> list[str]:
    """The GPUs on which kernels of ``backend`` with this digest of their sources have been checked, by name."""
    return [name for name, digest in dict(_measured().get(backend, {})).items() if digest == sources]


@functools.cache  # a file of the installed package
def _measured() -> dict[str, list[str] | dict[str, str]]:
    package = __package__.rpartition(".")[0]
    return json.loads(importlib.resources.files(package).joinpath(MEASURED_FILE).read_text(encoding="utf-8"))
