"""``--benchmark`` of the root conftest.py, in a small project of its own that has the same pytest settings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import outside_xdist

ROOT = Path(__file__).parent.parent

BENCH = """
import pathlib

def test_sum(benchmark):
    calls = []
    benchmark.pedantic(lambda: calls.append(1), rounds=3, iterations=1)
    pathlib.Path("calls").write_text(str(len(calls)))
"""
TEST = """
import pathlib

def test_one():
    pathlib.Path("tested").touch()
"""
# The only part of pytest-xdist that matters here, whether that is installed or not: its option.
FAKE_XDIST = """
def pytest_addoption(parser):
    parser.addoption("--numprocesses", type=int)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {
        "benchmarks/bench_sum.py": BENCH,
        "tests/test_one.py": TEST,
        "fake_xdist.py": FAKE_XDIST,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=project,
        env=outside_xdist(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout + result.stderr


def calls(project: Path) -> int | None:
    path = project / "calls"
    return int(path.read_text()) if path.exists() else None


def ran_tests(project: Path) -> bool:
    return (project / "tested").exists()


def test_measures_and_writes_json(project: Path) -> None:
    code, output = run(project, "benchmarks", "--benchmark", "--benchmark-json=out.json")
    assert code == 0, output
    assert calls(project) == 3
    [row] = json.loads((project / "out.json").read_text())["benchmarks"]
    assert row["name"] == "test_sum" and row["stats"]["rounds"] == 3


def test_without_paths_goes_to_benchmarks(project: Path) -> None:
    code, output = run(project, "--benchmark")
    assert code == 0, output
    assert calls(project) == 3
    assert not ran_tests(project)


def test_paths_are_not_swallowed_by_the_option(project: Path) -> None:
    code, output = run(project, "--benchmark", "benchmarks/bench_sum.py")
    assert code == 0, output
    assert calls(project) == 3


def test_tests_are_left_out(project: Path) -> None:
    code, output = run(project, "tests", "benchmarks", "--benchmark")
    assert code == 0, output
    assert calls(project) == 3
    assert not ran_tests(project)


def test_benchmarks_alone_is_a_smoke_run(project: Path) -> None:
    code, output = run(project, "benchmarks")
    assert code == 0, output
    assert calls(project) == 1
    assert re.search(r"\b1 passed", output)


def test_plugins_own_switch_still_measures(project: Path) -> None:
    code, output = run(project, "benchmarks", "--benchmark-only")
    assert code == 0, output
    assert calls(project) == 3


def test_plain_pytest_runs_the_tests(project: Path) -> None:
    code, output = run(project)
    assert code == 0, output
    assert ran_tests(project)
    assert calls(project) is None


def test_without_the_plugin_says_what_to_install(project: Path) -> None:
    code, output = run(project, "--benchmark", "-p", "no:benchmark")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "pip install 'mixer_kernels[bench]'" in output


def test_without_the_plugin_tests_still_run(project: Path) -> None:
    code, output = run(project, "-p", "no:benchmark")
    assert code == 0, output
    assert ran_tests(project)


def test_more_than_one_process_is_refused(project: Path) -> None:
    code, output = run(project, "--benchmark", "-p", "no:xdist", "-p", "fake_xdist", "--numprocesses=2")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "drop -n" in output
    assert calls(project) is None
