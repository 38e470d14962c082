"""One line on stderr that says what runs now: tqdm's bar if tqdm is installed, a rewritten line if not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def no_progress(text: str) -> None:
    """For callers that show nothing."""


@contextmanager
def progress_line(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yield ``say(text)`` and ``advance()``, for ``total`` steps; the line is gone afterwards."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _plain_line(total)
        return
    with tqdm(total=total, file=sys.stderr, leave=False, bar_format="{n}/{total} |{bar:20}| {elapsed} {desc}") as bar:
        yield bar.set_description_str, bar.update


def _plain_line(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    done, rewrite = 0, sys.stderr.isatty()

    def say(text: str) -> None:
        if rewrite:
            sys.stderr.write(f"\r\x1b[K{done}/{total} {text}")
            sys.stderr.flush()

    def advance() -> None:
        nonlocal done
        done += 1
        if not rewrite:
            sys.stderr.write(f"{done}/{total}\n")

    try:
        yield say, advance
    finally:
        if rewrite:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
