"""The throughput report: arithmetic, who gets a speed, what is shown. No assertion on how fast anything is."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from subprocesses import outside_xdist
from torch.utils.flop_counter import FlopCounterMode

from mixer_kernels import FusedMixer, info
from mixer_kernels.backends.cuda import library
from mixer_kernels.bench import cli, compare_model, host, roofline
from mixer_kernels.bench.bare import bare_function, bare_model
from mixer_kernels.bench.cases import Case, function_case, model_case
from mixer_kernels.bench.plot import check_plot, plot
from mixer_kernels.bench.progress import no_progress, progress_line
from mixer_kernels.bench.providers import EAGER, PROVIDERS, CannotRun, Provider, Weights, function_providers
from mixer_kernels.bench.report import Row, closing_lines, group_lines, group_rows, table
from mixer_kernels.bench.run import is_defect, run_group
from mixer_kernels.bench.timing import DeviceClock, Samples, measure, rotated_inputs
from mixer_kernels.bench.whole_model import EagerMixer, randomize_
from mixer_kernels.shapes import SPECS, MixerShape

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = MixerShape(S=12, C=16, D_S=8, D_C=32)


def small_case(level: str = "block", batch_size: int = 3, dtype: torch.dtype = torch.float32) -> Case:
    flops = {"token": SMALL.token_flops, "channel": SMALL.channel_flops, "block": SMALL.block_flops}[level](batch_size)
    return Case(level, "small", SMALL, dtype, batch_size, flops, 1000)


def small_inputs(case: Case) -> list[torch.Tensor]:
    return rotated_inputs((case.batch_size, SMALL.S, SMALL.C), case.dtype, CPU)


def small_model(**options) -> FusedMixer:
    model = FusedMixer.from_spec("S/32", img_size=64, num_blocks=2, num_classes=10, **options)
    return randomize_(model).eval().requires_grad_(False)


# Arithmetic


def test_function_case_counts_as_by_hand():
    case = function_case("token", "B/16", torch.bfloat16, 2)
    assert case.shape == MixerShape(196, 768, 384, 3072)
    assert case.flops == 2 * (2 * 384 * 196 * 768 + 2 * 196 * 384 * 768)
    x, statistics, weights = 2 * 196 * 768 * 2, 2 * 196 * 2 * 4, 2 * 196 * 384 * 2
    assert case.bytes == 3 * x + 2 * statistics + weights


def test_model_case_counts_as_by_hand():
    model = FusedMixer.from_spec("S/32", img_size=64, num_blocks=3, num_classes=10)
    case = model_case("S/32", model, torch.empty(5, 3, 64, 64, dtype=torch.float16, device="meta"))
    block = 4 * 5 * 4 * 512 * (256 + 2048)
    assert case.flops == 3 * block + 2 * 5 * 4 * (3 * 32 * 32) * 512 + 2 * 5 * 512 * 10
    assert case.bytes == 3 * case.shape.block_bytes(5, 2) + 2 * (5 * 3 * 64 * 64 + 512 * 3 * 32 * 32 + 512 * 10)
    with torch.device("meta"):
        whole = FusedMixer.from_spec("B/32")
    images = torch.empty(7, 3, 224, 224, device="meta")
    assert model_case("B/32", whole, images).flops == SPECS["B/32"].flops(7)


def test_rows_divide_what_was_measured(monkeypatch):
    peak = roofline.Peak({"fp32": 2.0}, 100.0, "by hand")
    monkeypatch.setitem(roofline.PEAKS, info.device_name(CPU), peak)
    case = Case("block", "small", SMALL, torch.float32, batch_size=8, flops=int(4e9), bytes=int(1e9))
    samples = {
        "eager": Samples([0.04, 0.05, 0.9]),
        "compile": Samples([0.04]),
        "torch": Samples([0.02, 0.02, 0.02], call_seconds=[0.03]),
        "bare": Samples([0.016]),
    }
    failures = dict.fromkeys(("cuda", "cuda:sm90", "cpu"), "cannot run: not built") | {"triton": "cannot run: no GPU"}
    rows = group_rows(case, CPU, PROVIDERS, samples, failures, {"bare": "mm"})
    assert [row.provider for row in rows] == list(PROVIDERS)
    eager, compiled, ours, _, triton, _, cuda, bare = rows
    assert (eager.ms, ours.ms, ours.call_ms, eager.call_ms) == (50.0, 20.0, 30.0, None)
    assert ours.images_per_s == pytest.approx(8 / 0.02)
    assert ours.tflops == pytest.approx(4e9 / 0.02 / 1e12)
    assert ours.gb_per_s == pytest.approx(1e9 / 0.02 / 1e9)
    assert ours.roofline_share == pytest.approx(0.01 / 0.02)  # 1e9 bytes at 100 GB/s; the products need 0.002 s
    assert ours.speedup_vs_eager == pytest.approx(2.5)
    assert ours.speedup_vs_compile == pytest.approx(2.0)
    assert ours.time_vs_bare == pytest.approx(1.25)
    assert (triton.ms, triton.speedup_vs_eager, triton.reason) == (None, None, "cannot run: no GPU")
    assert (cuda.ms, cuda.speedup_vs_eager, cuda.reason) == (None, None, "cannot run: not built")
    assert (bare.detail, ours.rounds) == ("mm", 3)


def test_rows_without_a_baseline_have_no_ratio_to_it():
    (row,) = group_rows(small_case(), CPU, ["torch"], {"torch": Samples([0.5])}, {}, {})
    assert (row.speedup_vs_eager, row.speedup_vs_compile, row.time_vs_bare) == (None, None, None)


def test_floor_is_the_longer_of_products_and_bytes():
    assert roofline.floor_seconds(int(989e12), 1, "bf16", "NVIDIA H200") == pytest.approx(1.0)
    assert roofline.floor_seconds(1, int(9.6e12), "bf16", "NVIDIA H200") == pytest.approx(2.0)
    assert roofline.floor_seconds(1, 1, "bf16", "NVIDIA H200 MIG 1g.18gb") is None
    assert roofline.floor_seconds(1, 1, "float64", "NVIDIA H200") is None


def test_peaks_have_every_dtype_in_order_and_a_source():
    for name, peak in roofline.PEAKS.items():
        ordered = [peak.tflops[dtype] for dtype in ("bf16", "fp16", "tf32", "fp32")]
        assert ordered == sorted(ordered, reverse=True), name
        assert peak.source and 100 < peak.gb_per_s < 20_000, name


# Providers


@pytest.mark.parametrize("level", ["token", "channel", "block"])
def test_eager_and_bare_run_the_flops_that_are_counted(level):
    case = small_case(level)
    inputs, weights = small_inputs(case), Weights.random(SMALL, torch.float32, CPU)
    bare = bare_function(case, inputs)
    for function in (lambda x: EAGER[level](x, weights), bare.run):
        with FlopCounterMode(display=False) as counter:
            function(inputs[0])
        assert counter.get_total_flops() == case.flops


def test_eager_and_bare_models_run_the_flops_that_are_counted():
    model = small_model()
    images = rotated_inputs((2, 3, 64, 64), torch.float32, CPU)
    case = model_case("S/32", model, images[0])
    for function in (EagerMixer(model), bare_model(case, model, images).run):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(images[0])
        assert counter.get_total_flops() == case.flops


def test_every_provider_has_a_row_and_a_line():
    case = small_case()
    inputs, weights = small_inputs(case), Weights.random(SMALL, torch.float32, CPU)
    providers = function_providers(case, inputs, weights, compiler="eager")
    group = run_group(
        case, inputs, providers, lambda x: EAGER["block"](x, weights.double()), seconds=0.01, progress=no_progress
    )
    assert [row.provider for row in group.rows] == list(PROVIDERS)
    by_name = {row.provider: row for row in group.rows}
    lines = {line.split()[0]: line for line in table(group.rows).splitlines() if line.startswith("  ") and line.strip()}
    for name in ("eager", "compile", "torch", "bare"):
        row = by_name[name]
        assert row.reason is None and row.ms == pytest.approx(group.samples[name].median * 1e3)
        assert row.speedup_vs_eager == pytest.approx(by_name["eager"].ms / row.ms)
        assert row.time_vs_bare == pytest.approx(row.ms / by_name["bare"].ms)
        assert f"{row.ms:.3f}" in lines[name]
    assert not is_defect(by_name["triton"].reason) and f"triton: {by_name['triton'].reason}" in table(group.rows)


def _raise(error: Exception):
    def run(x: torch.Tensor) -> torch.Tensor:
        raise error

    return run


def _right(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) + 1


def _with_nan(x: torch.Tensor) -> torch.Tensor:
    y = _right(x)
    y[1, 0, 0] = float("nan")  # an image that is not compared with float64
    return y


@pytest.mark.parametrize(
    "function, reason, defect",
    [
        (lambda x: torch.tanh(x) + 1 + 1e-4, "wrong: max error", True),
        (lambda x: _right(x)[:, :-1], "wrong: shape", True),
        (lambda x: _right(x).double(), "wrong: torch.float64 where eager has torch.float32", True),
        (_with_nan, "wrong: 1 values are not finite", True),
        (_raise(ValueError("bad tile")), "failed: ValueError: bad tile", True),
        (_raise(torch.OutOfMemoryError("CUDA out of memory")), "out of memory", False),
        (_raise(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")), "out of memory", False),
        (_raise(CannotRun("needs a GPU")), "cannot run: needs a GPU", False),
    ],
)
def test_a_provider_that_is_not_right_has_a_reason_and_no_speed(function, reason, defect):
    case = small_case()
    providers = [
        Provider("eager", lambda: (_right, None)),
        Provider("torch", lambda: (function, None)),
        Provider("bare", lambda: (lambda x: x, None), computes_case=False),
    ]
    eager, ours, bare = run_group(case, small_inputs(case), providers, _right, seconds=0.001, progress=no_progress).rows
    assert ours.reason.startswith(reason) and is_defect(ours.reason) is defect
    assert (ours.ms, ours.images_per_s, ours.speedup_vs_eager) == (None, None, None)
    assert eager.ms > 0 and bare.ms > 0
    assert ours.reason in table([eager, ours, bare])


def test_without_eager_nothing_is_measured():
    case = small_case()
    providers = [
        Provider("eager", lambda: (_raise(torch.OutOfMemoryError("no memory")), None)),
        Provider("torch", lambda: (_right, None)),
    ]
    eager, ours = run_group(case, small_inputs(case), providers, _right, seconds=0.001, progress=no_progress).rows
    assert (eager.reason, ours.ms) == ("out of memory", None)
    assert ours.reason == "not measured: eager has no result to compare with" and not is_defect(ours.reason)


# Timing


class FakeDevice:
    """A stream whose clock moves only by what is queued on it."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def wait(self, cycles: int) -> None:
        self.now += cycles

    def call(self, seconds: float):
        def run(x: torch.Tensor) -> None:
            self.now += seconds

        return run


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3  # milliseconds, as torch.cuda.Event


def test_event_pairs_leave_the_wait_out_and_keep_candidates_apart():
    device = FakeDevice()
    clock = DeviceClock(CPU, new_event=device.event, synchronize=lambda _: None, wait=device.wait)
    candidates = {"a": device.call(2.0), "b": device.call(0.5)}
    samples = measure(candidates, small_inputs(small_case()), seconds=1.0, min_rounds=3, max_rounds=6, clock=clock)
    assert 3 <= len(samples["a"].seconds) == len(samples["b"].seconds) <= 6
    assert samples["a"].seconds == pytest.approx([2.0] * len(samples["a"].seconds))
    assert samples["b"].seconds == pytest.approx([0.5] * len(samples["b"].seconds))
    assert len(samples["a"].call_seconds) == len(samples["a"].seconds)


def test_rounds_are_interleaved_and_inputs_rotated():
    inputs = list(torch.arange(3.0).unbind())
    log: list[tuple[str, float]] = []
    candidates = {name: (lambda x, name=name: log.append((name, x.item()))) for name in "ab"}
    samples = measure(candidates, inputs, seconds=1.0, min_rounds=4, max_rounds=4)
    rounds = log[-8:]
    assert [name for name, _ in rounds] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [x for _, x in rounds] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert {len(each.seconds) for each in samples.values()} == {4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
def test_on_a_gpu_inputs_exceed_the_cache_and_device_time_is_part_of_call_time():
    device = torch.device("cuda")
    inputs = rotated_inputs((1, 196, 768), torch.bfloat16, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    assert sum(x.numel() * x.itemsize for x in inputs) > 2 * cache
    samples = measure({"relu": torch.relu}, inputs, seconds=0.05)["relu"]
    assert 0 < samples.median < samples.call_median


# The command line


def run_cli(*arguments: str) -> int:
    return cli.main(["--model", "S/32", "--img-size", "32", "--device", "cpu", "--seconds", "0.01", *arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "Z/9"], "'B/16'"),
        (["--mode", "fit"], "'infer'"),
        (["--saved-bytes", "--batch-size", "2"], "--batch-size does not go with it"),
        (["--saved-bytes", "--mode", "train"], "--mode does not go with it"),
        (["--backend", "cudnn"], "'triton'"),
        (["--baseline", "jit"], "'compile'"),
        (["--dtype", "int8"], "'bf16'"),
        (["--batch-size", "0"], "at least 1, got '0'"),
        (["--seconds", "nan"], "above 0, got 'nan'"),
        (["--img-size", "100"], "multiple of the patch size 32, got 100"),
        (["--device", "tpu"], "must be cuda, cuda:N or cpu, got 'tpu'"),
        (["--device", "cuda:99"], "PyTorch sees"),
        (["--dtype", "tf32"], "on a CPU use fp32"),
        (["--json", "no/such/place.json"], "there is no directory 'no/such'"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run_cli(*arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_prints_and_writes_the_same_rows(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run_cli("--batch-size", "1", "2", "--baseline", "bare", "--json", str(path)) == 0
    output = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["device"]["name"] in output
    rows = [Row(**row) for row in written["throughput"]]
    names = ("eager", "torch", "cpu", "triton", "cuda:sm90", "cuda", "bare")
    expected = [(batch, name) for batch in (1, 2) for name in names]
    assert [(row.batch_size, row.provider) for row in rows] == expected
    parts = [group_lines([row for row in rows if row.batch_size == batch_size]) for batch_size in (1, 2)]
    places = [output.index(part) for part in (*parts, closing_lines(rows))]
    assert places == sorted(places)
    assert "whole model, S/32 at 32 px (S 1, " in output


def test_what_cannot_run_is_a_line_for_each_reason():
    case = small_case()
    rows = []
    for _ in range(2):
        failures = dict.fromkeys(("cuda", "cuda:sm90"), "cannot run: not built") | {"triton": "cannot run: no GPU"}
        rows += group_rows(case, CPU, ["eager", *failures], {"eager": Samples([0.5])}, failures, {})
    assert table(rows, legend=False).endswith(
        "\n\n  cuda, cuda:sm90: cannot run: not built\n  triton: cannot run: no GPU"
    )
    assert table(rows).count("cannot run") == 2


def test_a_batch_too_large_has_a_row_and_the_run_goes_on(monkeypatch, capsys):
    def limited(size, dtype, device):
        if size[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rotated_inputs(size, dtype, device)

    monkeypatch.setattr(cli, "rotated_inputs", limited)
    assert run_cli("--batch-size", "2", "1", "--baseline", "--backend", "torch") == 0
    output = capsys.readouterr().out
    assert output.count("out of memory") == 2  # eager and torch
    assert "batch 1\n" in output and output.index("batch 2\n") < output.index("batch 1\n")


def test_a_backend_asked_for_that_cannot_run_is_an_error_status(capsys):
    assert run_cli("--batch-size", "1", "--baseline", "--backend", "triton") == 1
    assert "cannot run: " in capsys.readouterr().out


def test_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        run_cli("--plot", "out.png")
    assert "pip install 'mixer_kernels[bench]'" in capsys.readouterr().err


def test_plot_has_a_bar_for_each_speed(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for batch_size, provider in itertools.product((1, 32), PROVIDERS):
        speed = None if provider == "triton" else 1000.0 * batch_size
        figures = {"images_per_s": speed, "speedup_vs_eager": speed and 2.0, "reason": None if speed else "cannot run"}
        rows.append(Row("model", "B/16", 196, 768, 384, 3072, "bf16", batch_size, provider, **figures))
    path = tmp_path / "throughput.svg"
    plot(rows, "a GPU", path)
    text = path.read_text()
    for label in (
        "batch 32",
        "torch.compile",
        "Triton kernels",
        "CUDA kernels",
        "cannot run",
        "32,000  (2.00x eager)",
        "Mixer-B/16 at 224 px, inference, bf16, a GPU",
    ):
        assert label in text, label
    with pytest.raises(ValueError, match=r"\.png.*got 'out\.xyz'"):
        check_plot("out.xyz")


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_line(2) as (say, advance):
        say("working")
        advance("one")
        advance("two")
    assert capsys.readouterr() == ("one\ntwo\n", "1/2\n2/2\n")


# A model at hand, and pytest


def test_compare_model_measures_fused_against_eager():
    model, images = small_model(), torch.randn(2, 3, 64, 64)
    report = compare_model(model, images, name="mine", seconds=0.01)
    eager, ours = report.rows
    assert (eager.provider, ours.provider, ours.name, ours.batch_size) == ("eager", "torch", "mine", 2)
    assert ours.speedup_vs_eager == pytest.approx(eager.ms / ours.ms)
    assert str(report) == table(report.rows)
    assert report.to_dict()["throughput"] == [asdict(eager), asdict(ours)]


def test_compare_model_rejects_what_it_cannot_measure():
    with pytest.raises(ValueError, match="model.eval"):
        compare_model(small_model().train(), torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"got shape \(0, 3, 64, 64\)"):
        compare_model(small_model(), torch.randn(0, 3, 64, 64))


def test_eager_is_the_model_itself():
    model, images = small_model().double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(EagerMixer(model)(images), model(images))


def test_pytest_benchmark_prints_and_writes_the_same_rows(tmp_path):
    path = tmp_path / "out.json"
    chosen = "test_token_mixing and S/32 and not compile"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark", "-k", chosen, f"--benchmark-json={path}"]
    environment = {
        **outside_xdist(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    finished = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    written = json.loads(path.read_text())
    rows = [Row(**row) for row in written["throughput"]]
    assert [row.provider for row in rows] == [name for name in PROVIDERS if name != "compile"]
    assert table(rows) in finished.stdout
    assert written["versions"]["mixer_kernels"] and written["machine_info"]["device"]["name"]
    medians = {each["extra_info"]["provider"]: each["stats"]["median"] for each in written["benchmarks"]}
    timed = {row.provider: row.ms * 1e-3 for row in rows if row.ms is not None}
    assert "eager" in timed and medians == pytest.approx(timed)


# Host time


def test_host_times_on_the_command_line(capsys):
    """Every row, in modules, providers and modes, with a figure where the machine can give one."""
    before = library._installed, torch.get_num_threads()
    assert cli.main(["--host", "--seconds", "0.001"]) == 0
    assert (library._installed, torch.get_num_threads()) == before
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines[2:]]
    providers = {"B/16 block": ["nn.Linear", "eager", "cuda", "triton"]}
    providers["PatchTSMixer layer"] = ["nn.Linear", "eager", "cpu", "triton"]
    modes = ["inference", "inference, frozen", "training"]
    assert [row[:3] for row in rows] == [
        [module, provider, mode] for module, names in providers.items() for mode in modes for provider in names
    ]
    goals = {tuple(row[:3]): row[6] for row in rows if len(row) > 6}
    assert goals[("B/16 block", "cuda", "inference")] == "<= 0.4x"
    assert goals[("PatchTSMixer layer", "cpu", "inference")] == "<= 15us"
    for row in rows:
        if row[1:3] not in (["cuda", "inference, frozen"], ["cpu", "inference, frozen"]):
            assert float(row[3]) > 0 and float(row[-1 if row[-1][0] != "<" else -2]) > 0, row


def test_host_times_count_what_is_called(monkeypatch):
    """The kernels' way, and none of PyTorch's products."""
    seen = []
    monkeypatch.setattr(host, "_measure", lambda calls, seconds: seen.append(calls) or dict.fromkeys(calls, 1.0))
    with host._without_kernels() as reasons:
        assert not reasons
        assert {row.microseconds for row in host._block_rows(0, reasons) if row.reason is None} == {1.0}
        for provider in ("cuda", "triton"):
            with torch.profiler.profile() as profile:
                seen[0][provider]()
            names = {event.key for event in profile.key_averages()}
            assert "mixer_kernels::mixer_block" in names and not {"aten::linear", "aten::mm"} & names


@pytest.mark.parametrize("arguments", [["--mode", "train"], ["--saved-bytes"], ["--json", "host.json"]])
def test_host_goes_with_seconds_alone(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--host", *arguments])
    assert "does not go with it" in capsys.readouterr().err
