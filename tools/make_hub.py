"""``make hub``: lay out a kernel repository of the Hugging Face kernels library, in build/hub.

One variant for each kind of device, all of the same Python files: Triton compiles where they run. A variant has its
metadata, what its users import (tools/hub/), and the part of the package that needs nothing but torch and Triton. The
kernels' id has a digest of those files in it, and the operators' namespace follows from that, so that two builds can be
loaded into one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mixer_kernels"
PARTS = ("backends", "functional", "ops", "tuning")
MODULES = (
    "coverage", "environment", "freeze", "layers", "metadata", "modules", "repeat", "report", "shapes", "snapshot",
    "tracing", "words",
)  # fmt: skip
VERSION = 1  # raised with each addition to what is public
DEVICES = ("cpu", "cuda", "rocm")
INIT = '''"""The part of mixer_kernels that needs nothing but torch and Triton."""

from . import functional
from .backends import use_backend

__all__ = ["functional", "use_backend"]
'''


def main(argv: Sequence[str] | None = None) -> int:
    """Write the repository; an earlier one in its place is removed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "hub", help="default: %(default)s")
    lay_out(parser.parse_args(argv).output)
    return 0


def lay_out(output: Path) -> None:
    """The repository in ``output``."""
    if output.exists() and not (output / "CARD.md").exists():
        raise FileExistsError(f"{output} is no kernel repository: it would be overwritten")
    shutil.rmtree(output, ignore_errors=True)
    files = {**dict(_public()), **dict(_package())}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    for device in DEVICES:
        variant = output / "build" / f"torch-{device}"
        metadata = {
            "id": f"_mixer_kernels_{device}_{digest}", "name": "mixer-kernels", "version": VERSION,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": device},
        }  # fmt: skip
        for name, text in {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", output)
    shutil.copy(ROOT / "tools" / "hub" / "CARD.md", output)
    print(f"{output}: {len(files)} files for each of {', '.join(DEVICES)}, digest {digest}")


def _public() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "tools" / "hub").glob("*.py"):
        yield path.name, path.read_text(encoding="utf-8")


def _package() -> Iterator[tuple[str, str]]:
    yield "mixer_kernels/__init__.py", INIT
    chosen = [PACKAGE / f"{module}.py" for module in MODULES]
    chosen += [path for part in PARTS for path in sorted((PACKAGE / part).rglob("*.py"))]
    for path in (*chosen, PACKAGE / "measured.json"):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
