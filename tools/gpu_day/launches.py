"""What is launched: each Triton kernel with its tile, each call into the CUDA backend's compiled module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from blocks import Watched

from mixer_kernels.backends.cuda import library
from mixer_kernels.backends.triton.launch import intercept_launches

Launch = tuple[str, dict[str, Any]]  # a kernel's name and its options; of a call into the module there are none


@contextlib.contextmanager
def noted_launches(backend: str) -> Iterator[list[Launch]]:
    """Launch as usual, and note what ``backend`` launches."""
    noted: list[Launch] = []
    if backend == "triton":

        def run(kernel: Any, grid: tuple[int], args: tuple[Any, ...], options: dict[str, Any]) -> None:
            noted.append((kernel.__name__, options))
            kernel[grid](*args, **options)

        with intercept_launches(run):
            yield noted
        return
    module = library.loaded()
    watched = Watched(module)
    library.install(watched)
    try:
        yield noted
    finally:
        library.install(module)
        noted += [(name, {}) for name in watched.calls]


def config_of(launches: list[Launch]) -> str:
    """Tiles, or what was called; row statistics and packing have none."""
    found = [
        tile_name(options) if options else name
        for name, options in launches
        if "num_stages" in options or not options
        if not any(word in name for word in ("statistics", "pack"))
    ]
    return "; ".join(found)


def tile_name(options: dict[str, Any]) -> str:
    blocks = "x".join(str(value) for name, value in options.items() if name.startswith("BLOCK_"))
    return f"{blocks} w{options['num_warps']} s{options['num_stages']}"
