"""``tools/gpu_day.py`` without a GPU: its phases on tiny sizes, its deadlines, and that it notices what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mixer_kernels.bench.providers import TRAINING_PROVIDERS

ROOT = Path(__file__).parents[1]
HERE = {"cuda", "cuda:sm90"}  # compiled by nvcc
PROGRAM = ROOT / "tools" / "gpu_day.py"

# A worker that needs no torch: it lists the tasks named in its argument, and each does what its name says.
FAKE_WORKER = """
import json, os, sys, time
names = sys.argv[1].split(",")
if names == ["broken"]:
    sys.exit("no such GPU")
print(json.dumps({"tasks": [{"case": name} for name in names]}), flush=True)
for line in sys.stdin:
    name = names[json.loads(line)["run"]].split()[0]
    if name == "crash":
        print("the last words", file=sys.stderr, flush=True)
        os.abort()
    time.sleep({"hang": 1e6, "slow": 0.4}.get(name, 0))
    status = "failed" if name in ("wrong", "spoil") else "ok"
    print(json.dumps({"status": status, "values": {"pid": os.getpid()}, "spoiled": name == "spoil"}), flush=True)
"""


@pytest.fixture
def supervise(monkeypatch, tmp_path):
    """``supervise(tasks, **options)``: (complete, {case: (status, values)}) of a phase of fake tasks."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_day.supervise as module

    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)

    def run(tasks: str, *, jobs=1, seconds=60.0, task_seconds=30.0):
        seen: dict[str, tuple] = {}

        def report(task, status, values):
            assert task["case"] not in seen, f"{task['case']} was reported twice"
            seen[task["case"]] = (status, values)

        command = [sys.executable, str(script), tasks]
        complete = module.run_phase(command, jobs=jobs, seconds=seconds, task_seconds=task_seconds, report=report)
        return complete, seen

    run.WorkerDied = module.WorkerDied
    return run


def gpu_day(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**cleared, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def read(directory: Path) -> dict:
    (path,) = directory.glob("**/*.json")
    return json.loads(path.read_text())


def test_rehearsal(tmp_path):
    """All phases on tiny sizes: everything is right, what needs a GPU says so, and the file has all of it."""
    out = tmp_path / "out"
    out.mkdir()
    # The phases' shares are a GPU's; a loaded machine without one takes longer.
    result = gpu_day("--rehearse", "--budget", "1800", "--output", str(tmp_path / "results"), OUT=str(out))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    document = read(tmp_path / "results")
    assert document == read(out)
    assert not document["passed"], "a rehearsal is no pass"
    assert document["versions"]["torch"] == torch.__version__
    phases = {phase["name"]: phase["complete"] for phase in document["phases"]}
    assert list(phases) == [
        "probe",
        "build",
        "hopper",
        "correctness",
        "gradients",
        "sanitizers",
        "repeats",
        "streams",
        "large",
        "compiled",
        "ladder",
        "benchmarks",
        "tests",
    ]
    assert all(phases.values())
    rows = document["rows"]
    assert {row["status"] for row in rows} == {"ok", "skipped"}
    assert {row["phase"] for row in rows} == set(phases)

    check_kernels([row for row in rows if row.get("backend") == "triton"], "sm_80", {"fp32", "bf16", "bf16 on fp32"})
    check_kernels([row for row in rows if row.get("backend") == "cuda"], "one multiprocessor", {"bf16", "bf16 on fp32"})
    check_hopper([row for row in rows if row.get("backend") == "cuda:sm90"])

    assert {"eager", "torch", "bare"} <= {row["provider"] for row in document["throughput"] if row.get("ms")}
    trained = [row for row in document["throughput"] if row["mode"] == "train"]
    assert [row["provider"] for row in trained] == list(TRAINING_PROVIDERS)
    assert all(row["memory_mib"] > 0 for row in trained if row["provider"] in ("eager", "torch"))
    benchmarks = [(row["case"], row["backend"]) for row in rows if row["phase"] == "benchmarks"]
    assert ("block S/32 bf16 batch 1", "cuda") in benchmarks and ("block S/32 bf16 batch 1", "triton") in benchmarks
    for phase, backends in (("build", {"cuda"}), ("sanitizers", HERE), ("tests", HERE)):
        its = [row for row in rows if row["phase"] == phase]
        assert {row["backend"] for row in its} == backends
        assert all(row["reason"].startswith("needs a GPU") for row in its)

    table = result.stdout[result.stdout.index("\nphase ") :]
    assert "skipped streams cuda: needs a GPU" in table and "\npassed: " in table
    assert "block S/32 bf16 batch 1" in table


def check_hopper(rows: list[dict]) -> None:
    """Only what its kernels take, in the order of the phases before all else."""
    first = [row for row in rows if row["phase"] == "hopper"]
    assert len(first) == 8 and all(row["status"] == "ok" and row["max_err"] > 0 for row in first)
    for phase in ("correctness", "gradients"):
        its = [row for row in rows if row["phase"] == phase]
        assert {row["dtype"] for row in its} <= {"bf16", "fp16"} and all(row["status"] == "ok" for row in its)
        assert any("one multiprocessor" in row["case"] for row in its)
        assert not any(layout in row["case"] for row in its for layout in ("transposed", "offset", "slice"))
    ladder = [row for row in rows if row["phase"] == "ladder"]
    assert len(ladder) == 8 + 3 * 9 and all(row["ms"] > 0 and row["vs_bare"] > 0 for row in ladder)
    assert sum("chosen" in row["config"] for row in ladder) == 4


def check_kernels(rows: list[dict], other_tiles: str, gradient_dtypes: set[str]) -> None:
    """What a rehearsal has to have checked of one backend."""
    correctness = [row for row in rows if row["phase"] == "correctness" and row["status"] == "ok"]
    assert {*gradient_dtypes, "fp16"} <= {row["dtype"] for row in correctness}
    assert all(row["max_err"] > 0 and row["err_vs_eager"] > 0 and row["config"] for row in correctness)
    assert any(row["case"].startswith(f"tiles of {other_tiles}") for row in correctness)
    assert any("constant rows" in row["case"] for row in correctness)
    repeats = [row["repeats_equal"] for row in rows if row["phase"] == "repeats"]
    assert set(repeats) == {3} and len(repeats) >= 3
    gradients = [row for row in rows if row["phase"] == "gradients"]
    assert {row["dtype"] for row in gradients} == gradient_dtypes
    assert all(row["status"] == "ok" and row["max_err"] > 0 for row in gradients)
    assert all(row["config"] for row in gradients if "tiles" in row["case"])
    for text in (f"backward tiles of {other_tiles}", "fast: channel", "min: channel", "transposed", "min: block"):
        assert any(text in row["case"] for row in gradients), text
    streams = {row["case"].split(":")[0]: row for row in rows if row["phase"] == "streams"}
    threads = streams.pop("four threads")
    assert threads["status"] == "ok"
    assert len(streams) == 7 and {row["reason"] for row in streams.values()} == {"needs a GPU"}
    compiled = [row["case"] for row in rows if row["phase"] == "compiled" and row["status"] == "ok"]
    assert len(compiled) == 4 and any("timm" in case for case in compiled)
    assert len([row for row in rows if row["phase"] == "large" and row["status"] == "ok"]) == 16


def test_what_goes_wrong_is_named(tmp_path):
    """Elements that are off in a result and in a gradient, a write beside the output, a crash: the others run."""
    plants = {
        "crash": "crash:B = 0: token triton",
        "output": "error:images far apart: channel cuda bf16 2x3x",
        "gradient": "error:backward, min: block cuda bf16",
        "redzone": "redzone:tokens far apart: token cuda bf16 2x3x",
    }
    result = gpu_day("--rehearse", "--phases", "repeats,large", "--output", str(tmp_path), "--plant", *plants.values())
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr
    rows = read(tmp_path)["rows"]
    failed = {row["case"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert len(failed) == 4 and len(rows) > 20
    reasons = {
        name: next(failed[case] for case in failed if plant.partition(":")[2] in case) for name, plant in plants.items()
    }
    assert reasons["output"].startswith("output: max error ")
    assert reasons["gradient"].startswith("gradient of x: max error ")
    assert reasons["redzone"] == "a kernel wrote behind a tensor of shape (2, 3, 8)"
    assert "SIGABRT" in reasons["crash"]
    closing = result.stdout[result.stdout.index("\nphase ") :]
    assert all(f": {case}: " in closing for case in failed)
    assert "FAILED: 4 failed, 0 not reached" in closing


def test_a_backend_whose_first_calls_go_wrong_is_left_out(tmp_path):
    """A kernel that hangs would take the time of all others."""
    plant = "error:token cuda:sm90 bf16 3x49x72"
    result = gpu_day("--rehearse", "--phases", "hopper,streams,ladder", "--output", str(tmp_path), "--plant", plant)
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr
    later = [row for row in read(tmp_path)["rows"] if row["phase"] in ("streams", "ladder")]
    (hopper, ladder) = [row for row in later if row["backend"] == "cuda:sm90"]
    assert hopper["reason"] == ladder["reason"] == "its first calls went wrong or had no end"
    assert {row["backend"] for row in later if row["status"] == "ok"} == {"cuda", "triton"}


def test_without_a_gpu(tmp_path):
    result = gpu_day("--output", str(tmp_path))
    assert result.returncode == 2
    assert "sees no GPU" in result.stderr and "--rehearse" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--phases", "repeats,streems"), "expected some of build,hopper,correctness,gradients"),
        (("--budget", "0"), "--budget must be > 0 seconds, got 0"),
        (("--plant", "typo:x"), "got 'typo:x', expected KIND:TEXT"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from gpu_day.cli import main

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_crash_costs_one_task(supervise):
    complete, seen = supervise("a,crash,b")
    assert complete
    assert [seen[case][0] for case in ("a", "crash", "b")] == ["ok", "failed", "ok"]
    assert "SIGABRT" in seen["crash"][1]["reason"] and "the last words" in seen["crash"][1]["reason"]


def test_a_hang_costs_one_task(supervise):
    complete, seen = supervise("a,hang,b", task_seconds=1)
    assert complete
    assert [seen[case][0] for case in ("a", "hang", "b")] == ["ok", "failed", "ok"]
    assert seen["hang"][1]["reason"] == "hangs: killed after 1 s"


def test_a_deadline_cuts_the_phase(supervise):
    start = time.monotonic()
    complete, seen = supervise("a,hang,b", seconds=2)
    assert time.monotonic() - start < 15
    assert not complete
    assert [seen[case][0] for case in ("a", "hang", "b")] == ["ok", "cut", "cut"]
    assert seen["hang"][1]["reason"] == "was running when the phase's 2 s were over"
    assert seen["b"][1]["reason"] == "not reached: the phase's 2 s were over"


def test_a_spoiled_process_is_replaced(supervise):
    _, seen = supervise("a,spoil,b,c")
    assert [seen[case][0] for case in ("a", "spoil", "b", "c")] == ["ok", "failed", "ok", "ok"]
    pids = {case: values["pid"] for case, (_, values) in seen.items()}
    assert pids["a"] == pids["spoil"] != pids["b"] == pids["c"]


def test_workers_share_the_tasks(supervise):
    names = ",".join(f"slow {i}" for i in range(6))
    complete, seen = supervise(names, jobs=3)
    assert complete and len(seen) == 6
    assert len({values["pid"] for _, values in seen.values()}) == 3


def test_a_phase_that_cannot_start_says_why(supervise):
    with pytest.raises(supervise.WorkerDied, match="exit status 1. no such GPU"):
        supervise("broken", jobs=2)


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_day.results as module

    return module


def test_record(results, tmp_path):
    measured, run = tmp_path / "measured.json", tmp_path / "2026-01-31.json"
    measured.write_text('{"triton": ["NVIDIA H200"]}\n')
    passed = {"passed_backends": ["cuda", "triton"], "device": {"name": "NVIDIA A100-SXM4-80GB"}}
    run.write_text(json.dumps(passed))
    results.record(run, measured, tmp_path / "results")
    both = {"cuda": ["NVIDIA A100-SXM4-80GB"], "triton": ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"]}
    assert json.loads(measured.read_text()) == both
    assert (tmp_path / "results" / "nvidia-a100-sxm4-80gb" / run.name).read_text() == run.read_text()


def test_of_the_hopper_kernels_the_sources_are_recorded(results, tmp_path):
    measured, run = tmp_path / "measured.json", tmp_path / "run.json"
    measured.write_text('{"cuda:sm90": {"NVIDIA H200": "0123", "NVIDIA H100 PCIe": "0123"}}')
    built = {"sm90": {"sources": "4567", "passed_on": []}}
    passed = {"passed_backends": ["cuda:sm90"], "device": {"name": "NVIDIA H200"}, "cuda_kernels": built}
    run.write_text(json.dumps(passed))
    results.record(run, measured, tmp_path / "results")
    assert json.loads(measured.read_text()) == {"cuda:sm90": {"NVIDIA H200": "4567", "NVIDIA H100 PCIe": "0123"}}


def test_a_failed_run_is_not_recorded(results, tmp_path):
    measured, run = tmp_path / "measured.json", tmp_path / "run.json"
    measured.write_text("{}")
    run.write_text(json.dumps({"passed_backends": [], "device": {"name": "NVIDIA H200"}}))
    with pytest.raises(ValueError, match="not of a whole run that passed"):
        results.record(run, measured, tmp_path / "results")
    assert measured.read_text() == "{}" and not (tmp_path / "results").exists()


def test_rows_are_in_the_file_as_they_come(results, tmp_path):
    """Whenever the run is killed, and beside the runs of the same day."""
    for number in (1, 2):
        written = results.Results(number=number)
        written.write_into([tmp_path])
        written.add(results.Row("large", "first", max_err=0.5))
        (path,) = written.paths
        assert json.loads(path.read_text())["rows"] == [
            {"phase": "large", "case": "first", "status": "ok", "max_err": 0.5}
        ]
        written.add(results.Row("large", "second", status="failed", reason="wrong"))
        assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["first", "second"]
    assert sorted(json.loads(path.read_text())["number"] for path in tmp_path.iterdir()) == [1, 2]
