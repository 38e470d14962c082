"""``python -m mixer_kernels cost``: what it counts against what the kernels do, and what it says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from blocks import make_block, make_x, run

from mixer_kernels.cost.cli import _tail
from mixer_kernels.cost.gpus import GPUS, gpu
from mixer_kernels.cost.launches import Block, Work, launches, work_of
from mixer_kernels.shapes import SPECS, MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS, assume_target

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="waits for a machine without a GPU: counts in the strict interpreter"
)
SMALL = MixerShape(S=196, C=128, D_S=64, D_C=256)


@needs_interpreter
@pytest.mark.parametrize("stream", (torch.bfloat16, torch.float32), ids=("bf16", "bf16 on fp32"))
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_bytes_and_products_are_what_the_kernels_move_and_compute(target, stream):
    """Launch by launch, as the strict interpreter counts them. Bytes: what is read of the vectors' padding differs."""
    import strict_interpreter

    block, x = make_block(SMALL, stream, "cpu"), make_x(2, SMALL, stream, "cpu")
    with (
        assume_target(KNOWN_TARGETS[target]),
        strict_interpreter.record() as done,
        torch.autocast("cpu", torch.bfloat16, enabled=stream is torch.float32),
    ):
        run(block, x, "triton")
    found = launches(Block(SMALL, 2, torch.bfloat16, stream), KNOWN_TARGETS[target])
    found = [one for one in found if not one.is_library]
    assert [one.name for one in found] == [one.kernel.strip("_") for one in done]
    for counted, real in zip(found, done, strict=True):
        assert (counted.programs, counted.work.executed) == (real.grid[0], real.dot_flops), counted.name
        moved = real.bytes_read + real.bytes_written
        assert moved == pytest.approx(counted.bytes, rel=0.02), counted.name


@needs_interpreter
def test_a_training_step_needs_three_times_the_forward_products():
    found = launches(Block(SMALL, 3, torch.bfloat16, torch.bfloat16, training=True), KNOWN_TARGETS["sm_90"])
    assert sum(one.work.useful for one in found) == 3 * SMALL.block_flops(3)
    assert sum(one.name == "aten.mm" for one in found) == 3
    # The halves' backward passes: at most eight launches each, sums of all parameters by one of them.
    assert [one.name.removeprefix("aten.").removesuffix("_kernel") for one in found[7:]] == [
        "channel_gelu_bwd_descriptor", "mm", "mm", "norm_bwd", "mm", "sum_parts",
        "pack", "token_mixing_bwd", "norm_bwd",
        "token_weight_gradient_descriptor", "token_weight_gradient_descriptor", "sum_parts",
    ]  # fmt: skip
    wasted = {one.name: one.work.executed / one.work.useful for one in found if one.work.useful}
    assert all(1 <= ratio for ratio in wasted.values()) and wasted["aten.mm"] == 1


@needs_interpreter
def test_frozen_weights_are_not_packed():
    names = [[one.name for one in launches(
        Block(SMALL, 1, torch.bfloat16, torch.bfloat16, frozen=frozen), KNOWN_TARGETS["sm_90"]
    )] for frozen in (False, True)]  # fmt: skip
    assert names[0] == ["pack_kernel", *names[1]]


def test_a_kernel_without_a_formula_is_named():
    with pytest.raises(ValueError, match="no formula for the products of new_kernel: add it to work_of"):
        work_of("new_kernel", {}, SMALL)
    assert work_of("norm_bwd_kernel", {}, SMALL) == Work()


@pytest.mark.parametrize(("tiles", "slots", "longer"), ((132, 132, 1.0), (133, 132, 264 / 133), (6, 108, 18.0)))
def test_the_last_tiles_fill_a_part_of_the_gpu(tiles, slots, longer):
    assert _tail(tiles, slots) == longer


def test_gpus_have_their_ceilings():
    for name in GPUS:
        assert gpu(name.upper()).peak.tflops["bf16"] > 0 and gpu(name).target.name in KNOWN_TARGETS


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "mixer_kernels", "cost", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=kept | environment, timeout=300)


def test_the_command_says_what_it_is(tmp_path):
    path = tmp_path / "cost.json"
    result = command("--model", "B/16", "--batch-size", "256", "--gpu", "h200", "--json", str(path))
    assert result.returncode == 0, result.stderr
    assert "A prediction, not a measurement" in result.stdout and "NVIDIA H200" in result.stdout
    cost = json.loads(path.read_text())
    rows = {row["launch"]: row for row in cost["rows"]}
    assert cost["is_prediction"] and len(cost["rows"]) == 6
    shape = SPECS["B/16"].block_shape()
    token = rows["token_mixing_fwd_kernel"]
    assert token["useful_flops"] == shape.token_flops(256)
    assert token["executed_flops"] == 256 * 4 * 208 * 768 * 384  # 196 tokens padded to 208
    # The tensor peak of an H200 is 989 TFLOP/s; no kernel is predicted to be faster than its share of it.
    assert token["seconds"][0] >= token["executed_flops"] / (token["share"] * 989e12)
    statistics = rows["row_statistics_kernel"]
    assert statistics["bound_by"] == "memory" and statistics["share"] is None
    assert statistics["bytes"] == 256 * 196 * (768 * 2 + 2 * 4)
    assert all(row["seconds"][0] <= row["seconds"][1] for row in cost["rows"])
    assert sum(row["seconds"][0] for row in cost["rows"]) > cost["floor_seconds"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    (
        (["--gpu", "h300"], {}, "--gpu: got h300, expected one of a100"),
        (["--model", "X/16"], {}, "--model: got X/16, expected one of S/32"),
        (["--img-size", "100"], {}, "a multiple of the patch size 16, got 100"),
        (["--batch-size", "0"], {}, "--batch-size: got 0, expected 1 or more"),
        (["--frozen", "--training"], {}, "--frozen goes with inference"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ),
)
def test_wrong_arguments_are_refused(arguments, environment, message):
    result = command(*arguments, **environment)
    assert result.returncode == 2 and message in result.stderr
