"""The report of models of time series: who gets a speed, what is written. No assertion on how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

from mixer_kernels.bench import cli, series, series_models
from mixer_kernels.bench.bare import bare_layers
from mixer_kernels.bench.progress import no_progress
from mixer_kernels.bench.series import series_rows, series_table

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """One layer, and the threads as they were."""
    config = {
        "context_length": series_models.CONTEXT, "prediction_length": series_models.PREDICTION,
        "num_input_channels": series_models.CHANNELS, "patch_length": 64, "patch_stride": 64, "num_layers": 1,
        "d_model": 8,
    }  # fmt: skip
    model = lambda: PatchTSMixerForPrediction(PatchTSMixerConfig(**config))  # noqa: E731
    monkeypatch.setitem(series_models.SERIES_MODELS, "ptsm", model)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(mode: str, *baselines: str, dtype: str = "fp32") -> dict[str, series.SeriesRow]:
    rows = series_rows("ptsm", mode, 2, baselines, 1, 0.01, no_progress, dtype)
    return {row.provider: row for row in rows}


@pytest.mark.parametrize("dtype", series.SERIES_DTYPES)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_rows_have_ratios_of_their_rounds(mode, dtype):
    rows = rows_of(mode, dtype=dtype)
    assert list(rows) == ["eager", "mixer_kernels"]
    for row in rows.values():
        assert row.reason is None and row.ms > 0 and row.rounds >= series.MIN_ROUNDS
        assert 0 < row.speedup_p20 <= row.speedup <= row.speedup_p80
    eager = rows["eager"]
    assert (eager.speedup_p20, eager.speedup, eager.speedup_p80) == (1, 1, 1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's exporter, in its own calls
def test_onnx_runtime_computes_the_forecast():
    pytest.importorskip("onnxruntime")
    rows = rows_of("infer", "ort")
    assert rows["ort"].reason is None and rows["ort"].ms > 0, rows["ort"]


@pytest.mark.parametrize(("mode", "passes"), [("infer", 1), ("train", 3)])
def test_bare_products_are_those_of_the_linear_layers(mode, passes, monkeypatch):
    seen = []
    monkeypatch.setattr(series, "bare_layers", lambda *each: seen.append(each) or bare_layers(*each))
    rows = rows_of(mode, "bare")
    assert list(rows) == ["eager", "mixer_kernels", "bare"] and rows["bare"].ms > 0
    [(products, repeated)] = seen
    # of 2 x 7 series, 8 patches of 64 steps: the embedding; patches, features and their gates; the head
    series_in_batch = 2 * series_models.CHANNELS
    layer = 2 * (8 * 16 * 8) + 8 * 8 * 8 + 8 * (2 * (8 * 16) + 8 * 8)
    expected = 8 * 64 * 8 + layer + 8 * 8 * series_models.PREDICTION
    assert sum(rows * weight.numel() for rows, weight in products) == series_in_batch * expected and repeated == passes


def test_runtimes_are_of_float32():
    assert "float32 only" in rows_of("infer", "ort", dtype="bf16")["ort"].reason


def test_who_does_not_train_says_so():
    assert "does not train" in rows_of("train", "ort")["ort"].reason


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_what_is_wrong_has_no_speed(mode, monkeypatch):
    def fuse_wrongly(model):
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)

    monkeypatch.setattr(series, "fuse_", fuse_wrongly)
    row = rows_of(mode)["mixer_kernels"]
    assert row.ms is None and "wrong by" in row.reason
    assert "wrong by" in series_table([row])


def test_the_command_writes_rows_machine_and_versions(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--model", "ptsm", "--device", "cpu", "--threads", "1", "--batch-size", "1", "2", "--baseline"]
    assert cli.main([*arguments, "--seconds", "0.01", "--json", str(path)]) == 0
    assert "ptsm, inference, batch 2, 1 thread(s)" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [(row["batch_size"], row["provider"]) for row in report["rows"]] == [
        (1, "eager"), (1, "mixer_kernels"), (2, "eager"), (2, "mixer_kernels"),
    ]  # fmt: skip
    assert report["versions"]["transformers"] and report["device"]["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "S/32", "--device", "cpu", "--baseline", "ort"], "ort and openvino go with --model ptsm or ttm"),
        (["--model", "gmixer_24", "--device", "cpu", "--mode", "train"], "--mode does not go with it"),
        (["--model", "ptsm", "--device", "cpu", "--dtype", "tf32"], "tf32 is a mode of CUDA devices"),
        (["--model", "ptsm", "--device", "cpu", "--dtype", "fp16"], "measured in fp32 or bf16"),
        (["--model", "ptsm", "--device", "cpu", "--img-size", "64"], "--img-size does not go with it"),
        (["--model", "ptsm", "--device", "cpu", "--json", "/nowhere/x.json"], "there is no directory '/nowhere'"),
    ],
)
def test_what_does_not_go_together_is_said(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_a_library_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(series_models.SERIES_MODELS, "ptsm", series_models._patchtsmixer)
    with pytest.raises(SystemExit):
        cli.main(["--model", "ptsm", "--device", "cpu", "--batch-size", "1"])
    assert "pip install 'mixer_kernels[bench-cpu]'" in capsys.readouterr().err


def test_a_library_that_does_not_import_is_not_said_to_be_missing(monkeypatch, capsys):
    def broken():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ImportError("Could not import module") from error

    monkeypatch.setitem(series_models.SERIES_MODELS, "ptsm", broken)
    with pytest.raises(SystemExit):
        cli.main(["--model", "ptsm", "--device", "cpu"])
    error = capsys.readouterr().err
    assert "does not import: operator torchvision::nms does not exist" in error and "pip install" not in error


def test_the_readme_shows_what_was_measured():
    tool, readme = _tool(), (ROOT / "README.md").read_text()
    series, mixers = (
        [json.loads(tool.path_of(name).read_text()) for name in names] for names in (tool.MODELS, tool.MIXERS)
    )
    for name, section in (("series", tool.series_section(series)), ("mixers", tool.mixers_table(mixers))):
        assert f"{tool.BEGIN.format(name)}\n{section}\n{tool.END.format(name)}" in readme
    measured = {(row["model"], row["mode"], row["batch_size"]) for row in tool.rows_of(series)}
    assert len([line for line in readme.splitlines() if line.startswith("| ") and " **" in line]) == len(measured)


def test_the_table_divides_by_the_better_runtime():
    tool = _tool()
    times = {"eager": 12.0, "ort": 6.0, "openvino": 4.0, "mixer_kernels": 2.0}
    rows = [
        {"model": "ptsm", "mode": "infer", "batch_size": 1, "threads": 1, "provider": name, "ms": ms, "reason": None,
         "speedup": 12 / ms, "speedup_p20": 11 / ms, "speedup_p80": 13 / ms}
        for name, ms in times.items()
    ]  # fmt: skip
    rows.append(rows[0] | {"provider": "compile", "ms": None, "speedup": None, "reason": "cannot run: no compiler"})
    line = tool.series_table(rows).splitlines()[2]
    assert line == (
        "| PatchTSMixer, inference | 1 | 12.0 | cannot run | 2.00 | 3.00 | **6.00** (5.50 to 6.50) | 2.00 |"
    )
    variants = {name: [row | {"ms": 1.0} for row in rows] for name in tool.VARIANTS}
    line = tool.variants_table([{"rows": rows, "variants": variants}]).splitlines()[2]
    assert line == "| PatchTSMixer, inference | 6.00 | 6.00 | 6.00 | 2.00 |"


def _tool():
    spec = importlib.util.spec_from_file_location("bench_cpu", ROOT / "tools/bench_cpu.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool
