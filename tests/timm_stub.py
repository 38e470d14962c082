"""Let timm and transformers be imported beside a torchvision that was built for another torch.

    python tests/timm_stub.py PROGRAM [ARGUMENTS]
    python tests/timm_stub.py -m MODULE [ARGUMENTS]

runs a program or a module so.

timm's data pipeline imports torchvision, which registers fake implementations for its compiled operators ``nms`` and
``qnms`` on import. In a torchvision without its compiled library (a CPU-only torch beside the wheel from PyPI) the
operators do not exist and that registration raises. Declaring their schemas is enough: no test calls them.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that declared it


def define_torchvision_operators() -> None:
    """Declare ``torchvision::nms`` and ``torchvision::qnms`` unless torchvision's own are loaded already.

    Call it before the first ``import timm``. With a working torchvision, importing it first defines the real ones.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pass
    missing = [schema for name, schema in _SCHEMAS.items() if not _is_declared(name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)


def _is_declared(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)


if __name__ == "__main__":
    define_torchvision_operators()
    sys.argv.pop(0)
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
