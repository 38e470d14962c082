"""The report of timm's relatives of the Mixer: their own products, and the rows on the command line."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mixer_kernels.bench import cli, other_models
from mixer_kernels.bench.other_models import prepare_other_model
from mixer_kernels.bench.workloads import Workload, prepare_workload

CPU = torch.device("cpu")
TOKENS, STEM, HEAD = 196, 3 * 16 * 16, 1000
# Multiply-adds of one block for an image.
BLOCKS = {
    "gmixer_24": (384, 384 * (2 * 192 + 192) * TOKENS + TOKENS * (384 * 3 * 768)),
    "resmlp_24": (384, 384 * TOKENS**2 + TOKENS * 384 * 2 * 1536),
    "gmlp_s16": (256, TOKENS * (256 * 1536 + 768 * 256) + 768 * TOKENS**2),
}


@pytest.mark.parametrize("name", other_models.RELATIVES)
def test_the_products_are_those_of_the_model(name):
    prepared = prepare_workload(Workload("model", name, "fp32", 2, num_blocks=1), CPU, smoke=True)
    channels, block = BLOCKS[name]
    assert prepared.case.flops == 2 * 2 * (TOKENS * STEM * channels + block + channels * HEAD)


def test_the_command_line_measures_them(monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_other_model", partial(prepare_other_model, num_blocks=1))
    arguments = ["--model", "gmlp_s16", "--device", "cpu", "--backend", "torch", "--seconds", "0.01"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "whole model, gmlp_s16:1 blocks, fp32, batch 1" in output
    assert [line.split()[0] for line in output.splitlines() if line.startswith("  ") and "x" in line][:3] == [
        "eager", "torch", "bare",
    ]  # fmt: skip


def test_out_of_memory_is_a_row(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cli, "prepare_other_model", fail)
    arguments = cli._parser().parse_args(["--model", "resmlp_24"])
    rows = cli._measure_other(arguments, torch.float32, CPU, 1, {"eager", "bare"}, lambda text: None)
    assert [(row.provider, row.reason) for row in rows] == [("eager", "out of memory"), ("bare", "out of memory")]
