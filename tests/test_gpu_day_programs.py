"""What ``tools/gpu_day`` makes of other programs' output, and of one backend that passes where the other does not."""

from __future__ import annotations

import functools
import importlib
import sys
import time
from pathlib import Path

import pytest
import torch

from mixer_kernels.bench.providers import TRAINING_PROVIDERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def module(name: str):
    return importlib.import_module(f"gpu_day.{name}")


def settings(seconds: float = 60.0, **options):
    return module("tasks").Settings("tests", ends=time.time() + seconds, **options)


# Programs


def test_a_program_runs_in_the_checkout_and_its_output_comes_back():
    code = "import os, sys; print(os.getcwd()); print('error', file=sys.stderr); sys.exit(3)"
    status, log = module("programs").run_program([sys.executable, "-c", code], settings())
    assert status == 3 and sorted(log.split()) == sorted([str(ROOT), "error"])


def test_a_program_is_killed_when_its_time_is_up_though_its_child_lives_on():
    programs, tasks = module("programs"), module("tasks")
    code = "import subprocess; print('the last words', flush=True); subprocess.run(['sleep', '20'])"
    start = time.monotonic()
    with pytest.raises(tasks.Cut, match="no end within 2 s; its last lines: the last words"):
        programs.run_program([sys.executable, "-c", code], settings(programs.MARGIN + 2))
    assert time.monotonic() - start < 15


# Build


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 0), "120")])
def test_the_kernels_are_built_for_the_gpu_at_hand(capability, name):
    build = module("build")
    assert build.architecture_of(capability) == name
    environment = build.environment_of(name)
    assert (environment["MIXER_KERNELS_BUILD_CUDA"], environment["MIXER_KERNELS_CUDA_ARCHS"]) == ("1", name)
    assert build.COMMAND[1:] == ["setup.py", "build_ext", "--inplace"] and (ROOT / "setup.py").exists()


def test_what_is_missing_to_build_is_named():
    missing_tools = module("build").missing_tools
    here = {"cmake": "/usr/bin/cmake", "ninja": None, "pybind11": None}
    assert missing_tools(lambda name, path: here[name], lambda name: here[name]) == ["ninja", "pybind11"]
    here.update(ninja="/usr/bin/ninja", pybind11=object())
    assert missing_tools(lambda name, path: here[name], lambda name: here[name]) == []


def test_why_a_build_failed():
    why_it_failed = module("build").why_it_failed
    log = """\
[1/14] Building CUDA object CMakeFiles/kernels.dir/csrc/pack_weights.cu.o
FAILED: CMakeFiles/kernels.dir/csrc/token_mixing.cu.o
/x/csrc/token_mixing.cu(40): error: identifier "foo" is undefined

1 error detected in the compilation of "/x/csrc/token_mixing.cu".
ninja: build stopped: subcommand failed.
error: building the CUDA kernels failed (exit status 1); the compiler's output is above.
"""
    assert why_it_failed(log).startswith('/x/csrc/token_mixing.cu(40): error: identifier "foo" is undefined | 1 error')
    assert why_it_failed("one\n\ntwo\n") == "one | two"


# Sanitizers

CLEAN = """\
========= COMPUTE-SANITIZER
gpu_day.sanitized: calls: 15
========= {summary}
"""
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void mixer_kernels::<unnamed>::pack_weights_kernel(mixer_kernels::Table)+0x1b0
=========     by thread (3,0,0) in block (5,0,0)
=========     Access at 0x7f1c0e200780 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f1c0e200000 of size 1,920 bytes
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure"
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: mixer_kernels::pack [0x3c5d] in _C.so
=========
Traceback (most recent call last):
torch.AcceleratorError: CUDA error: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void mixer_kernels::token_mixing_fwd_kernel<208>(mk)+0x140
=========     and Read access at void mixer_kernels::token_mixing_fwd_kernel<208>(mk)+0xe0 [4 hazards]
=========
gpu_day.sanitized: calls: 15
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
OTHERS = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cutlass::Kernel2<cutlass_80_wmma_tensorop>(T1::Params)+0x990
=========     by thread (32,0,0) in block (0,0,0)
=========     Address 0x7f1832e04c00
=========
gpu_day.sanitized: calls: 15
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize("summary", ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors)"))
def test_a_clean_report(summary):
    report = module("sanitizers").parse(CLEAN.format(summary=summary))
    assert (report.ours, report.others, report.calls, report.summary) == ([], 0, 15, 0)
    assert report.problem(0) is None


def test_reports_on_these_kernels_are_told_from_those_on_others():
    parse = module("sanitizers").parse
    memory = parse(MEMCHECK)
    assert len(memory.ours) == 1 and memory.others == 1
    assert memory.problem(1).startswith("1 reports: Invalid __global__ read of size 16 bytes at void mixer_kernels::")
    race = parse(RACECHECK)
    assert len(race.ours) == 1 and race.others == 0 and race.problem(0).count("Race reported") == 1
    others = parse(OTHERS)
    assert (others.ours, others.others, others.problem(0)) == ([], 1, None)


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ("", "the program came to no end (exit status 9)"),
        ("========= COMPUTE-SANITIZER\ngpu_day.sanitized: calls: 15\n", "no summary (exit status 9)"),
        (CLEAN.format(summary="ERROR SUMMARY: 3 errors"), "3 errors in a report that this program cannot read"),
    ],
)
def test_silence_is_no_clean_report(log, problem):
    assert module("sanitizers").parse(log).problem(9) == problem


def test_a_device_that_sanitizers_refuse():
    report = module("sanitizers").parse("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n")
    assert "Device not supported" in report.unsupported


@pytest.mark.parametrize(
    ("log", "outcome"),
    [
        (CLEAN.format(summary="ERROR SUMMARY: 0 errors"), None),
        (OTHERS, None),
        (MEMCHECK, AssertionError),
        ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", "Skip"),
    ],
    ids=("clean", "others", "ours", "refused"),
)
def test_what_becomes_of_a_report(log, outcome, tmp_path):
    """A program that prints a log stands in for the sanitizer."""
    executable = tmp_path / "compute-sanitizer"
    executable.write_text(f"#!{sys.executable}\nprint({log!r})\n")
    executable.chmod(0o755)
    values = {}
    check = functools.partial(module("sanitizers")._check, settings(), str(executable), "cuda", "memcheck", values)
    if outcome is None:
        check()
        assert values["config"] == "15 calls" + (", 1 reports on others' kernels" if log is OTHERS else "")
    else:
        with pytest.raises(outcome if outcome is AssertionError else module("tasks").Skip):
            check()


def test_what_a_sanitizer_is_told_to_run():
    command = module("sanitizers").command("compute-sanitizer", "memcheck", "--beyond")
    assert command[:3] == ["compute-sanitizer", "--tool", "memcheck"] and "--padding" in command
    assert command[-4:] == [sys.executable, "-m", "gpu_day.sanitized", "--beyond"]
    assert "--padding" not in module("sanitizers").command("compute-sanitizer", "synccheck")


def test_sanitizers_watch_every_launcher(cuda_kernels, device):
    """The program that they watch, here on the model of a GPU, calls all functions of the module that launch."""
    from blocks import Watched

    from mixer_kernels.backends.cuda import library

    launchers = {name for name in dir(cuda_kernels) if callable(getattr(cuda_kernels, name))} - {*Watched.SIZES}
    watched = Watched(cuda_kernels)
    library.install(watched)
    results = [result for backend in ("cuda", "cuda:sm90") for result in module("sanitized").calls(device, backend)]
    library.install(cuda_kernels)
    assert all(bool(result.isfinite().all()) for result in results) and len(results) >= 15
    assert {name for name in launchers if not name.startswith("_")} == set(watched.calls)


# Tests


@pytest.mark.parametrize(
    ("status", "log", "counts", "problem"),
    [
        (0, "....\n12 passed, 3 skipped, 9 deselected in 5.01s\n", "12 passed, 3 skipped, 9 deselected", None),
        (0, "== 1 passed, 2 warnings in 70.3s (0:01:10) ==\n", "1 passed, 2 warnings", None),
        (5, "9 deselected in 0.10s\n", "9 deselected", "exit status 5, 9 deselected: 9 deselected in 0.10s"),
        (0, "3 skipped in 0.10s\n", "3 skipped", "no test passed: 3 skipped"),
        (
            1,
            "FAILED tests/test_kernels.py::test_a[cuda] - AssertionError: max\n1 failed, 2 passed in 1.00s\n",
            "1 failed, 2 passed",
            "exit status 1, 1 failed, 2 passed: tests/test_kernels.py::test_a[cuda] - AssertionError: max",
        ),
        (4, "ImportError: no module\n", "", "exit status 4, no counts: ImportError: no module"),
    ],
)
def test_what_pytest_said(status, log, counts, problem):
    assert module("tests").verdict(status, log) == (counts, problem)


# Which backend passed


def row(phase: str, backend: str = "", status: str = "ok"):
    return module("results").Row(phase, "case", backend=backend, status=status)


def test_each_backend_passes_for_itself():
    passed = module("results").passed_backends
    both = [row(phase, backend) for phase in ("correctness", "large") for backend in ("cuda", "triton")]
    needed = {"correctness", "large"}
    assert passed(both, needed, needed) == ["cuda", "triton"]
    assert passed([*both, row("large", "cuda", "failed")], needed, needed) == ["triton"]
    assert passed([*both, row("large", "triton", "cut")], needed, needed) == ["cuda"]
    assert passed([*both, row("benchmarks", "triton", "cut")], needed, needed) == ["cuda", "triton"]
    assert passed([*both, row("probe", "", "failed")], needed, needed) == []
    hopper = [row(phase, "cuda:sm90") for phase in needed]
    assert passed([*both, *hopper], needed, needed) == ["cuda:sm90", "cuda", "triton"]
    assert passed([*both, *hopper, row("hopper", "cuda:sm90", "failed")], needed, needed) == ["cuda", "triton"]
    absent = [row("build", "cuda", "skipped"), *(row(phase, "cuda", "skipped") for phase in needed)]
    assert passed([*absent, *(each for each in both if each.backend == "triton")], needed, needed) == ["triton"]


def throughput(**reasons: str):
    from mixer_kernels.bench.report import Row

    names = TRAINING_PROVIDERS
    common = {"level": "block", "name": "B/16", "S": 196, "C": 768, "D_S": 384, "D_C": 3072, "dtype": "bf16"}
    return [
        Row(
            **common, batch_size=32, mode="train", provider=name, detail="mode=default" if name == "compile" else None,
            **({"reason": reasons[name]} if name in reasons else {"ms": float(len(name)), "call_ms": 1.0}),
        )
        for name in names
    ]  # fmt: skip


def test_a_benchmark_has_a_row_for_each_backend():
    rows_of = module("benchmarks").rows_of
    hopper, cuda, triton = rows_of(throughput())
    assert (hopper["backend"], hopper["ms"]) == ("cuda:sm90", 14.0)
    assert (cuda["backend"], cuda["status"], cuda["ms"], cuda["call_ms"]) == ("cuda", "ok", 9.0, 1.0)
    assert (triton["backend"], triton["ms"], triton["config"]) == ("triton", 11.0, "compile: mode=default")
    assert [each["backend"] for each in rows_of([row for row in throughput() if "sm90" not in row.provider])] == [
        "cuda",
        "triton",
    ]
    _, *wrong = rows_of(throughput(**{"cuda min": "wrong: output: max error", "compile": "failed: RuntimeError: oh"}))
    assert [(each["backend"], each["status"]) for each in wrong] == [
        ("cuda", "failed"),
        ("triton", "ok"),
        ("", "failed"),
    ]
    assert wrong[0]["reason"] == "cuda min: wrong: output: max error"
    _, *absent = rows_of(throughput(**{"cuda fast": "cannot run: not built", "cuda min": "cannot run: not built"}))
    assert (absent[0]["status"], absent[0]["reason"]) == ("skipped", "cannot run: not built")


def test_speeds_of_all_providers_stand_in_a_line():
    from dataclasses import asdict

    speed_table = module("tables").speed_table
    rows = [asdict(each) for each in throughput(**{"cuda fast": "cannot run: not built"})]
    header, line = speed_table(rows, "ms", "ms").splitlines()
    assert header.split() == ["ms", "eager", "compile", "torch", "triton", "cuda", "cuda:sm90", "bare"]
    assert line.split()[-7:] == ["5.000", "7.000", "5.000", "11.000", "-", "14.000", "4.000"]
    assert line.startswith("block B/16 bf16 batch 32 training")
    assert speed_table([], "ms", "ms") == ""


def test_a_backend_that_is_not_here_is_one_row_that_says_why(cuda_kernels):
    from mixer_kernels.backends.cuda import library

    if torch.cuda.is_available():
        pytest.skip("waits for a machine without a GPU")
    tasks = module("tasks")
    on_each_backend, options = module("kernels").on_each_backend, settings(rehearse=True)
    made = on_each_backend(options, lambda backend: [tasks.Task(backend, print, backend=backend)])
    assert [task.case for task in made] == ["cuda:sm90", "cuda", "triton"]
    library.install(None)
    _, absent, _ = on_each_backend(options, lambda backend: [tasks.Task(backend, print, backend=backend)])
    assert (absent.case, absent.backend) == ("backend cuda", "cuda")
    with pytest.raises(tasks.Skip, match="use backend='torch'"):
        absent.run({})
