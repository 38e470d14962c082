"""On which GPUs a backend's results were checked and its speed was measured: measured.json, beside the package."""

from __future__ import annotations

import functools
import importlib.resources
import json

MEASURED_FILE = "measured.json"


def measured_gpus(backend: str) -> list[str]:
    """The GPUs on which ``backend`` has been checked and measured, by name."""
    return list(_measured().get(backend, ()))


@functools.cache
def _measured() -> dict[str, list[str]]:
    package = __package__.split(".")[0]
    return json.loads(importlib.resources.files(package).joinpath(MEASURED_FILE).read_text(encoding="utf-8"))
