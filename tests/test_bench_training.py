"""The benchmarks of training: what is counted, who gets a speed, saved bytes. No assertion on how fast anything is."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from blocks import Watched
from test_bench import CPU, ROOT, SMALL, run_cli, small_case, small_inputs, small_model
from torch.utils.flop_counter import FlopCounterMode

import mixer_kernels.functional as F
from mixer_kernels.backends.cuda import library
from mixer_kernels.backends.triton.launch import intercept_launches
from mixer_kernels.bench.bare import bare_function, bare_model
from mixer_kernels.bench.cases import function_case, model_case
from mixer_kernels.bench.memory import saved_bytes, saved_rows
from mixer_kernels.bench.progress import no_progress
from mixer_kernels.bench.providers import EAGER, Weights, function_providers, provider_names
from mixer_kernels.bench.report import table
from mixer_kernels.bench.run import is_defect, run_group
from mixer_kernels.bench.timing import rotated_inputs
from mixer_kernels.bench.training import PIECE, Step, gradients_reference, with_gradients
from mixer_kernels.bench.whole_model import model_providers
from mixer_kernels.shapes import SPECS


@pytest.mark.parametrize("level", ["token", "channel", "block"])
def test_forward_and_backward_run_the_flops_that_are_counted(level):
    infer = function_case(level, "S/32", torch.float32, 1, 64)
    case = function_case(level, "S/32", torch.float32, 1, 64, "train")
    assert (case.flops, case.bytes) == (3 * infer.flops, None)
    inputs = rotated_inputs((1, 4, 512), torch.float32, CPU)
    weights = Weights.random(case.shape, torch.float32, CPU).require_gradients()
    eager = function_providers(case, inputs, weights)[0]
    run, _ = with_gradients(eager, level, inputs, weights).build()
    for function in (run, bare_function(case, inputs).run):
        with FlopCounterMode(display=False) as counter:
            function(inputs[0])
        assert counter.get_total_flops() == case.flops


def test_a_training_step_runs_the_flops_that_are_counted_and_leaves_the_weights():
    model = small_model().train().requires_grad_()
    images = rotated_inputs((2, 3, 64, 64), torch.float32, CPU)
    case = model_case("S/32", model, images[0], "train")
    step = Step(model, 2, 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    run, _ = step.of(model_providers(case, model, images)[0]).build()
    for function in (run, bare_model(case, model, images).run):
        with FlopCounterMode(display=False) as counter:
            result = function(images[0])
        assert counter.get_total_flops() == case.flops
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter._version > versions[name], name
    result, exact = run(images[0]), step.reference(images[0])
    assert result.keys() == exact.keys() == {"output", *(f"gradient of {name}" for name in before)}
    for name in exact:
        torch.testing.assert_close(result[name].double(), exact[name], rtol=1e-3, atol=1e-5)
        assert exact[name].abs().max() > 0, name


def training_group(level: str, spoil: str | None = None):
    """Forward and backward of a small case of more images than float64 takes at a time."""
    case = replace(small_case(level, batch_size=PIECE + 1), mode="train", bytes=None)
    inputs = small_inputs(case)
    weights = Weights.random(SMALL, torch.float32, CPU).require_gradients()
    providers = [with_gradients(each, level, inputs, weights) for each in function_providers(case, inputs, weights)]
    if spoil is not None:
        ours = next(each for each in providers if each.name == "torch")
        build = ours.build

        def spoiled():
            run, _ = build()

            def off(x):
                results = run(x)
                results[spoil].flatten()[-1] += 0.01
                return results

            return off, None

        ours.build = spoiled
    providers = [each for each in providers if each.name != "compile"]
    reference = gradients_reference(level, inputs, weights)
    return run_group(
        case, inputs, providers, reference, seconds=0.001, progress=no_progress, parameters=weights.all()
    ).rows


def test_training_has_a_row_for_each_memory_mode():
    rows = {row.provider: row for row in training_group("block")}
    assert list(rows) == [name for name in provider_names("block", "train", CPU) if name != "compile"]
    assert {row.mode for row in rows.values()} == {"train"}
    for name in ("eager", "torch"):
        assert rows[name].reason is None and rows[name].ms > 0 and rows[name].memory_mib > 0
        assert rows[name].gb_per_s is None and rows[name].roofline_share is None
    assert rows["bare"].ms > 0 and rows["bare"].memory_mib is None
    assert not any(row.reason and is_defect(row.reason) for row in rows.values())
    assert "block, forward + backward, small" in table(list(rows.values()))


@pytest.mark.parametrize("name", ["output", "gradient of x", "gradient of beta1", "gradient of w4"])
def test_a_wrong_gradient_has_no_speed(name):
    ours = next(row for row in training_group("block", spoil=name) if row.provider == "torch")
    assert ours.reason.startswith(f"wrong: {name}: max error") and ours.ms is None


# Memory


@contextlib.contextmanager
def launches_skipped(backend: str):
    if backend == "triton":
        with intercept_launches(lambda *_: None):
            yield
        return
    module = library.loaded()
    library.install(Watched(module, run=False))
    yield
    library.install(module)


def test_saved_bytes_are_those_of_the_functions(backend, device):
    """The table counts on meta tensors: the same bytes as the functional API keeps, here with launches skipped."""
    shape = SPECS["S/32"].block_shape()
    weights = Weights.random(shape, torch.bfloat16, torch.device(device)).require_gradients()
    x = torch.randn(2, shape.S, shape.C, dtype=torch.bfloat16, device=device).requires_grad_()
    counted = {row.memory: row.bytes_per_image for row in saved_rows("S/32", "bf16", torch.bfloat16)}
    for memory in ("fast", "min"):
        with launches_skipped(backend):
            kept = saved_bytes(
                lambda m=memory: F.mixer_block(x, *weights.all(), backend=backend, memory=m), weights.all()
            )
        assert counted[memory] == kept / 2, memory
    assert counted["eager"] == pytest.approx(
        saved_bytes(lambda: EAGER["block"](x, weights), weights.all()) / 2, rel=0.01
    )


def test_saved_bytes_by_hand():
    """fast: x, u, two pairs of statistics, z; min: all but z."""
    fast, small = (row.bytes_per_image for row in saved_rows("B/16", "bf16", torch.bfloat16)[1:])
    inputs = 2 * 196 * 768 * 2 + 4 * 196 * 4
    assert (fast, small) == (inputs + 196 * 3072 * 2, inputs)


def test_saved_bytes_on_the_command_line(tmp_path):
    """As a user without a GPU runs it: no interpreter, no kernel."""
    path = tmp_path / "saved.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mixer_kernels", "bench", "--saved-bytes", "--json", str(path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    rows = {row["memory"]: row for row in json.loads(path.read_text())["saved_bytes"]}
    assert rows["fast"]["vs_eager"] <= 0.40 and rows["min"]["vs_eager"] <= 0.14
    lines = [line.split() for line in finished.stdout.splitlines()]
    for memory, row in rows.items():
        assert [memory, f"{row['bytes_per_image'] / 2**20:.3f}", f"{row['vs_eager']:.2f}"] in lines


def test_command_line_trains(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run_cli("--mode", "train", "--batch-size", "2", "--baseline", "bare", "--json", str(path)) == 0
    assert "training step" in capsys.readouterr().out
    rows = {row["provider"]: row for row in json.loads(path.read_text())["throughput"]}
    ours = [f"{backend} {memory}" for backend in ("triton", "cuda:sm90", "cuda") for memory in ("fast", "min")]
    assert list(rows) == ["eager", "torch", *ours, "bare"]
    assert all(rows[name]["memory_mib"] > 0 and rows[name]["images_per_s"] > 0 for name in ("eager", "torch"))
