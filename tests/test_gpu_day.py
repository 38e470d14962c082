"""``tools/gpu_day.py`` without a GPU: what goes wrong costs its own rows, a second run completes the first."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from gpu_day import plan, programs, record, results, tables  # noqa: E402

GPU = "NVIDIA H200"


def rehearse(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests/gpu_day_rehearsal.py"), "--output", str(path), "--minutes", "12"]
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900, env=environment)


def known(*paths: Path) -> results.Results:
    return results.Results(earlier=[line for path in paths for line in results.read(path)])


def statuses(found: results.Results, phase: str) -> dict[str, str]:
    rows = [row for row in found.rows.values() if row["phase"] == phase]
    return {f"{row['name']} {row['provider']}": row["status"] for row in rows}


def test_what_goes_wrong_costs_its_own_rows(tmp_path):
    """An import of a minute; kernels that hang, kill their process, are wrong by 1 %, in truth and in a benchmark."""
    plants = (
        "hang:token_mixing+small+cuda:sm90", "crash:mixer_block+small+cuda:sm90", "wrong:token_linear+small+triton",
        "wrong:token_S/32_batch_1+triton", "crash:model_ptsm_batch_2+cuda",
    )  # fmt: skip
    done = rehearse(tmp_path / "run.jsonl", "--plant", "import:60", *plants)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr
    found = known(tmp_path / "run.jsonl")
    bad = {f"{row['task']} {row['provider']}": row["status"] for row in found.bad}
    assert bad == {
        "truth: token_mixing, small [cuda:sm90] cuda:sm90": "hang",
        "truth: mixer_block, small [cuda:sm90] cuda:sm90": "fault",
        "truth: token_linear, small [triton] triton": "wrong",
        "speed: token S/32 batch 1 triton": "wrong",
        "speed: model ptsm batch 2 cuda": "fault",
    }, done.stdout[-4000:]
    truth = statuses(found, "truth")
    assert truth["channel_mixing, small cuda:sm90"] == "ok"  # between two that went wrong
    assert sum(status == "ok" for status in truth.values()) == 2 * 14 + 2 * 3 + 3 - 3
    # Two strikes: no more of this backend. What it has not done was not reached, and did not fail.
    assert set(found.missing) == {f"truth: {name}, B/16 [cuda:sm90]" for name in plan.MIXER}
    speed = statuses(found, "speed")
    assert {speed[f"token S/32 batch 1 {name}"] for name in ("eager", "compile", "torch", "cuda", "bare")} == {"ok"}
    assert speed["model ptsm batch 2 triton"] == "ok" and not [name for name in speed if name.endswith("sm90")]
    row = found.rows["speed: token S/32 batch 1", "cuda"]
    assert 0 < row["p20"] <= row["ms"] <= row["p80"]
    closing = done.stdout[done.stdout.index("\ntruth, RMS") :]
    for text in (
        "HANG, ?", "WRONG, 1.00", "FAULT", "not reached: truth: token_mixing, B/16 [cuda:sm90]",
        "cuda:sm90 sits out: hang in truth: token_mixing, small [cuda:sm90]; fault in", "5 wrong, 3 not reached",
        "rehearsal.py\", line", "SIGABRT", "output: rms error",
    ):  # fmt: skip
        assert text in closing, f"{text}\n{closing}"


def test_a_second_run_completes_the_first_and_both_give_one_table(tmp_path):
    """The first has a build that fails, and is told to stop; the second has not."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    done = rehearse(first, "--plant", "build:")
    assert done.returncode == 1
    assert "the build failed with exit status 2: x.cu(1): error: as planted" in done.stdout
    found = known(first)
    assert not found.bad and len(found.missing) == 2 * 2 * 3
    assert set(statuses(found, "truth").values()) == {"ok"} and len(statuses(found, "truth")) == 2 * 14
    lines = first.read_text().splitlines(keepends=True)
    cut = next(index for index, line in enumerate(lines) if '"done", "task": "speed: model' in line)
    first.write_text("".join(lines[:cut]) + lines[cut][:20])  # the machine was taken away in the middle of a line

    done = rehearse(second, "--resume", str(first))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "all was reached and is right" in done.stdout
    again = {row["task"] for row in known(second).rows.values()} - {"warm-up: warm-up"}
    assert again == {*found.missing, "speed: model ptsm batch 2"}, "nothing is done twice"

    root = fake_checkout(tmp_path)
    for path in (first, second):
        lines = results.read(path)
        for line in (line for line in lines if line["kind"] == "machine"):
            line |= {"device": {"device": "cuda:0", "name": GPU}, "cuda_kernels": {"sm90": {"sources": "4567"}}}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record.record([first, second], root, tmp_path / "results")
    assert json.loads((root / "mixer_kernels/measured.json").read_text())["triton"] == ["NVIDIA A100", GPU]
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n<!--") and readme.endswith("-->\nafter\n") and "nothing yet" not in readme
    assert [line.split(" | ")[0] for line in readme.splitlines() if " batch " in line] == [
        "| token S/32 batch 1", "| model ptsm batch 2",
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "results/nvidia-h200").iterdir()} == {first.name, second.name}


def fake_checkout(folder: Path) -> Path:
    root = folder / "checkout"
    (root / "mixer_kernels").mkdir(parents=True)
    (root / "mixer_kernels/measured.json").write_text('{"triton": ["NVIDIA A100"], "cuda:sm90": {"NVIDIA H100": "01"}}')
    (root / "README.md").write_text(f"before\n{record.BEGIN}\nnothing yet\n{record.END}\nafter\n")
    return root


def test_workers_die_with_the_program():
    """Even if it is killed, and somebody holds the worker's pipes."""
    worker = [sys.executable, "-c", "from gpu_day.worker import main; main()", '{"device": "cpu"}']
    code = f"import subprocess, time; print(subprocess.Popen({worker!r}).pid, flush=True); time.sleep(900)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        assert "hello" in json.loads(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        ends = time.monotonic() + 60
        while time.monotonic() < ends and Path(f"/proc/{pid}/cmdline").exists():
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                break
            time.sleep(0.1)
        else:
            assert not Path(f"/proc/{pid}").exists(), "it lives on"
        parent.stdin.close()


def test_a_program_is_killed_when_its_time_is_up_though_its_child_lives_on():
    code = "import subprocess; print('the last words', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    status, log = asyncio.run(programs.run_program([sys.executable, "-c", code], 5, dict(os.environ)))
    assert (status, log) == (None, "the last words\n") and time.monotonic() - start < 50


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/gpu_day.py"), "--output", str(tmp_path / "x.jsonl")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and "PyTorch sees no GPU here" in done.stderr, done.stdout + done.stderr


# Recording


def run_file(path: Path, sources: str = "aa", gpu: str = GPU, **changes: str) -> Path:
    """A whole day of which everything is right, but for the status of the tasks in ``changes``, by backend."""
    backends = {
        "cuda_kernels": {"sm90": {"sources": "4567"}},
        "versions": dict.fromkeys(("torch", "triton", "cuda"), "9"),
    }
    tasks = [task for phase in ("truth", "speed") for task in plan.day()[phase]]
    lines = [
        {"kind": "run", "planned": [task.key for task in tasks]},
        {"kind": "machine", "device": {"device": "cuda:0", "name": gpu}, "sources": sources, **backends},
    ]
    for task in tasks:
        for provider in [task.backend] if task.backend else plan.BACKENDS:
            status = changes.get(provider.replace(":", "_"), "ok") if task == tasks[0] or task.backend else "ok"
            row = {"kind": "row", "task": task.key, "phase": task.phase, "name": task.name, "provider": provider}
            lines.append({**row, "status": status, "ms": 1.0, "reason": "so it is"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_backend_passes_for_itself(tmp_path):
    whole = run_file(tmp_path / "a.jsonl")
    assert record.passed_backends(record.merged([whole])) == list(plan.BACKENDS)
    for status in (*plan.BAD, plan.CANNOT):
        bad = run_file(tmp_path / "b.jsonl", cuda=status)
        assert record.passed_backends(record.merged([bad])) == ["triton", "cuda:sm90"], status
    once = record.merged([run_file(tmp_path / "b.jsonl", cuda="wrong"), whole])
    assert record.passed_backends(once) == ["triton", "cuda:sm90"], "what was wrong once stays wrong"
    half = "".join(
        line for line in whole.read_text().splitlines(True) if 'mixer_block, B/16 [triton]", "ph' not in line
    )
    whole.write_text(half)
    assert record.passed_backends(record.merged([whole])) == ["cuda", "cuda:sm90"]
    lines = whole.read_text().splitlines(True)
    whole.write_text("".join(line for line in lines if "training" not in line or '"provider": "cuda"' not in line))
    assert record.passed_backends(record.merged([whole])) == ["cuda:sm90"], "truth may be of other machine code"


def test_of_the_hopper_kernels_the_sources_are_recorded(tmp_path):
    root = fake_checkout(tmp_path)
    record.record([run_file(tmp_path / "a.jsonl", triton="hang", cuda="hang")], root, tmp_path / "results")
    measured = json.loads((root / "mixer_kernels/measured.json").read_text())
    assert measured == {"triton": ["NVIDIA A100"], "cuda:sm90": {"NVIDIA H100": "01", GPU: "4567"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": "bb"}, r"b.jsonl is of .*'bb'.*, .*a.jsonl of .*'aa'"),
        ({"gpu": "NVIDIA L4"}, r"b.jsonl is of .*NVIDIA L4.*, .*a.jsonl of .*NVIDIA H200"),
        ({"triton": "hang", "cuda": "wrong", "cuda_sm90": "fault"}, "no backend passed on NVIDIA H200"),
    ],
)
def test_what_is_not_recorded(changes, message, tmp_path):
    root = fake_checkout(tmp_path)
    paths = [run_file(tmp_path / "a.jsonl"), run_file(tmp_path / "b.jsonl", **changes)]
    before = (root / "README.md").read_text()
    with pytest.raises(ValueError, match=message):
        record.record(paths if "triton" not in changes else paths[1:], root, tmp_path / "results")
    assert (root / "README.md").read_text() == before and not (tmp_path / "results").exists()


def test_the_readme_has_a_place_for_the_table():
    readme = (ROOT / "README.md").read_text()
    assert 0 < readme.index(record.BEGIN) < readme.index(record.END)


# What other programs say


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        (0, "....\n12 passed, 3 skipped in 5.01s\n", {"status": "ok", "detail": "12 passed, 3 skipped"}),
        (0, "3 skipped in 0.10s\n", {"status": "cannot run", "reason": "no test passed: 3 skipped"}),
        (1, "FAILED a.py::test_a[cuda] - x\nFAILED b.py::test_b[cuda] - x\n2 failed in 1.00s\n", {"provider": "cuda"}),
        (1, "FAILED tests/a.py::test_a[cuda]\nFAILED tests/a.py::test_a[triton]\n2 failed in 1s\n", {"provider": ""}),
        (4, "ImportError: no module\n", {"reason": "exit status 4, no counts: ImportError: no module"}),
    ],
)  # fmt: skip
def test_what_pytest_said(status, log, verdict):
    assert verdict.items() <= programs.tested(status, log).items()


def test_why_a_build_failed():
    log = '[1/14] Building\n/x.cu(40): error: identifier "foo" is undefined\n\n1 error detected\n'
    assert programs.why_failed(2, log).endswith(
        'status 2: /x.cu(40): error: identifier "foo" is undefined | 1 error detected'
    )
    assert programs.why_failed(0, log) is None and "took over" in programs.why_failed(None, "")


def test_what_is_resumed_is_of_the_same_sources():
    earlier = [{"kind": "machine", "device": {"name": GPU}, "sources": "aa"}, {"kind": "done", "task": "speed: x"}]
    for sources, done in (("aa", {"speed: x"}), ("bb", set())):
        found = results.Results(earlier=earlier)
        found.learn({"device": {"name": GPU}, "sources": sources})
        assert found.done == done and found.machine["sources"] == sources


def test_goals_stand_beside_our_ratios():
    from gpu_day.speed import figures

    from mixer_kernels.bench.report import Row
    from mixer_kernels.bench.timing import Samples

    case = {"level": "token", "name": "B/16", "S": 1, "C": 1, "D_S": 1, "D_C": 1, "dtype": "bf16", "batch_size": 256}
    ratios = {"speedup_vs_eager": 4.0, "speedup_vs_compile": 1.5, "time_vs_bare": 0.9}
    samples, goals = Samples([1e-3 * each for each in (1, 2, 3, 4, 5, 6)]), plan.GOALS["token", "infer"]
    ours = figures(Row(**case, provider="triton", ms=3.5, **ratios), samples, goals)
    assert (ours["p20"], ours["p80"]) == pytest.approx((2, 5))
    assert ours["ratios"] == [
        "4.00 x eager (goal >= 3.5, 5)", "1.50 x compile (goal >= 2, 3)", "0.90 of bare (goal <= 0.95, 0.8)",
    ]  # fmt: skip
    wrong = figures(Row(**case, provider="cuda", reason="wrong: output: rms"), None, goals)
    lacking = figures(Row(**case, provider="cuda", reason="cannot run: not built"), None, goals)
    assert wrong["status"] == "wrong" and lacking == {"status": "cannot run", "reason": "not built"}
    assert figures(Row(**case, provider="compile", reason="failed: x"), None, goals)["status"] == "cannot run"


def test_lines_that_say_the_same_are_one():
    found = known()
    for name in ("a", "b", "c", "d"):
        found.add(plan.Task("speed", name), "cuda", plan.CANNOT, reason="not built")
    assert "cannot run: a; b; c and 1 more: cuda: not built" in tables.closing(found)
