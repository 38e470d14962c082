"""A breakage: one place of the sources, what is put there, and the test that has to see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .copies import ROOT, Check, Job


class Breakage(NamedTuple):
    file: str  # from the root of the tree
    right: str  # what is there, once
    wrong: str
    check: Check
    says: str = ""  # a regular expression that the test's output then has


def in_folder(folder: str, table: Mapping[str, tuple[str, ...]]) -> dict[str, Breakage]:
    """Of rows (file in ``folder``, right, wrong, file of tests, ``-k``)."""
    return {
        name: Breakage(f"{folder}/{file}", right, wrong, Check(*check))
        for name, (file, right, wrong, *check) in table.items()
    }


def seen_by(check: Check, folder: str, table: Mapping[str, tuple[str, ...]]) -> dict[str, Breakage]:
    """Of rows (file in ``folder``, right, wrong) or (file, right, wrong, says), all seen by one test."""
    return {
        name: Breakage(f"{folder}/{file}", right, wrong, check, *says)
        for name, (file, right, wrong, *says) in table.items()
    }


def job_of(name: str, breakage: Breakage) -> Job:
    """Raises ValueError where the sources have become others."""
    text = (ROOT / breakage.file).read_text()
    if text.count(breakage.right) != 1:
        raise ValueError(
            f"{name}: {breakage.file} has {text.count(breakage.right)} times {breakage.right!r}, not once: "
            "bring the breakage up to date"
        )
    return Job(name, breakage.file, text.replace(breakage.right, breakage.wrong), (breakage.check,))
