"""One line on stderr that says what runs now: tqdm's bar if tqdm is installed, a rewritten line if not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def no_progress(text: str) -> None:
    """For callers that show nothing."""


@contextmanager
def progress_line(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Yield ``say(text)``, and ``advance(text)`` for each of ``total`` steps, which prints ``text``; the line is gone
    afterwards."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _plain_line(total)
        return
    with tqdm(total=total, file=sys.stderr, leave=False, bar_format="{n}/{total} |{bar:20}| {elapsed} {desc}") as bar:

        def advance(text: str) -> None:
            bar.write(text, file=sys.stdout)
            bar.update()

        yield bar.set_description_str, advance


def _plain_line(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    done, rewrite = 0, sys.stderr.isatty()

    def say(text: str) -> None:
        if rewrite:
            sys.stderr.write(f"\r\x1b[K{done}/{total} {text}")
            sys.stderr.flush()

    def erase() -> None:
        if rewrite:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        erase()
        print(text, flush=True)
        if not rewrite:
            sys.stderr.write(f"{done}/{total}\n")

    try:
        yield say, advance
    finally:
        erase()
