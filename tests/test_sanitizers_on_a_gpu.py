"""On a GPU: NVIDIA's compute-sanitizer over the kernels that nvcc compiles, on tiny inputs, each tool by itself.

Everything on the GPU is watched; what is said of PyTorch's kernels and cuBLAS is not ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixer_kernels import backends

PROGRAM = "compute-sanitizer"
EXECUTABLE = shutil.which(PROGRAM) or shutil.which(PROGRAM, path="/usr/local/cuda/bin")
OURS = "mixer_kernels::"  # the namespace of the kernels
DONE = "watched all"
SHAPES = ((49, 72, 24, 96), (196, 72, 70, 40), (256, 136, 64, 264))  # for each padded number of tokens
CALLS = f"""
import sys, torch
import mixer_kernels.functional as F
from blocks import make_block, make_x
from mixer_kernels.shapes import MixerShape
for sizes in {SHAPES}:
    block = make_block(MixerShape(*sizes), torch.bfloat16, "cpu")
    parameters = {{name: t.cuda().requires_grad_() for name, t in block.parameters.items()}}
    x = make_x(2, block.shape, torch.bfloat16, "cpu").cuda().requires_grad_()
    for memory in F.MEMORY_MODES:
        F.mixer_block(x, **parameters, memory=memory, dropout_p=0.1, backend=sys.argv[1]).sum().backward()
    with torch.no_grad():
        F.mixer_block(x, **parameters, backend=sys.argv[1])
    torch.cuda.synchronize()
print("{DONE}")
"""


def ours(log: str) -> list[str]:
    """The places in our kernels that a report names; a stack of the host is none."""
    lines = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    return [line for line in lines if OURS in line and re.match(r"at |.* access at ", line)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a machine with a GPU")
@pytest.mark.skipif(EXECUTABLE is None, reason=f"waits for a machine with {PROGRAM}")
@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck", "initcheck"))
@pytest.mark.parametrize("backend", ("cuda", "cuda:sm90"))
def test_nothing_is_reported(backend, tool):
    reason = backends.why_not(backend, torch.empty(0, device="cuda").device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    padding = ["--padding", "256", "--report-api-errors", "no"] if tool == "memcheck" else []
    command = [EXECUTABLE, "--tool", tool, "--show-backtrace", "no", "--print-limit", "50", *padding]
    root = Path(__file__).parents[1]
    # Each tensor an allocation of its own, whose end is known, and whose memory nobody wrote before.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run(
        [*command, sys.executable, "-c", CALLS, backend], capture_output=True, text=True, env=environment
    )
    log = done.stdout + done.stderr
    if "not supported" in log or "Internal Sanitizer Error" in log:
        pytest.skip(f"waits for a machine on which {PROGRAM} runs: {log[-300:]}")
    assert not ours(log), log[:4000]
    assert DONE in log and " SUMMARY: " in log, f"it came to no end: {log[-2000:]}"


@pytest.mark.parametrize(
    ("log", "count"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read of size 16 bytes\n=========     at void mixer_kernels::pack()+0x1b0\n", 1),
        ("========= Error: Race reported between Write access at void mixer_kernels::fwd_kernel<208>(mk)+0x140\n", 1),
        ("========= Uninitialized __global__ memory read\n=========     at void cutlass::Kernel2<x>(T1::Params)\n", 0),
        ("=========         Host Frame: mixer_kernels::pack [0x3c5d] in _C.so\n", 0),
    ],
)
def test_reports_on_our_kernels_are_told_from_those_on_others(log, count):
    assert len(ours(log)) == count
