"""tools/machine_model.py: what it prints of a cubin, the table of goals, wrong arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In a process that compiles: one that interprets kernels cannot.
PREAMBLE = f"""
import sys
sys.path[:0] = [{str(ROOT / "tools")!r}, {str(ROOT / "tests")!r}]
import machine_model as tool
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PREAMBLE + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)


def test_the_loops_of_a_cubin(tmp_path):
    result = python(f"""
import pathlib
from machine_model_samples import compiled
path = pathlib.Path({str(tmp_path / "product.cubin")!r})
path.write_bytes(compiled("product", "sm_80").asm["cubin"])
sys.exit(tool.main([str(path), "--warps", "8", "--shared", "147456"]))
""")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^product  sm_80\n  \d+ registers, 0 bytes of stack, 8 warps a block", result.stdout)
    assert "1 blocks a multiprocessor, 2 warps a scheduler" in result.stdout
    # 128 x 256 x 64 of 8 warps: 4 x 8 x 4 of m16n8k16, of 8 clocks.
    assert re.search(r"loop at 0x[0-9a-f]+, clocks of a turn and warp: tensor 1024  issue \d+", result.stdout)
    assert re.search(r"a 100%  b 100%  c \d+%  s \d+% \(a turn takes \d+ clocks\)  bound by tensor", result.stdout)


def test_the_goals_are_those_of_the_sources_at_hand():
    """A kernel of Triton's, whose figure is the bound that is kept; one of csrc, where there is no nvcc."""
    result = python("""
import triton
from mixer_kernels.machine_model.gates import Bounds
def no_nvcc():
    raise LookupError("nvcc not found")
tool.cuda_gates.find_tools = no_nvcc
tool.GOALS = [g for g in tool.GOALS if g.what in ("Triton weight gradient W2", "cuda token forward")][:3]
tool.print_goals()
bounds = Bounds()
same = all(bounds.kept["triton"][t]["compiler"] == f"Triton {triton.__version__}" for t in ("sm_80", "sm_90"))
kernels = {"sm_80": "token_weight_gradient_kernel", "sm_90": "token_weight_gradient_descriptor_kernel"}
kept = [bounds.bound("triton", t, f"[bf16 S=196 C=768] {kernel}") for t, kernel in kernels.items()]
print("kept", *([f"{100 * b.share:.0f}" for b in kept] if same else []))
""")
    assert result.returncode == 0, result.stderr
    figures = re.findall(r"^Triton weight gradient W2 +sm_\d+ +\d+ +(\d+) +\d+$", result.stdout, re.MULTILINE)
    assert len(figures) == 2
    assert re.search(r"^cuda token forward +sm_80 +46 +- +65$", result.stdout, re.MULTILINE)
    assert "the CUDA kernels are not compiled: nvcc not found" in result.stdout
    kept = re.search(r"^kept(.*)$", result.stdout, re.MULTILINE)[1].split()
    assert kept in ([], figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ([], "expected a cubin or --goals, one of them"),
        (["--goals", "some.cubin"], "expected a cubin or --goals, one of them"),
        (["no/such.cubin"], "no such file: no/such.cubin"),
    ),
)
def test_wrong_arguments_are_refused(arguments, message):
    result = python(f"tool.main({arguments!r})")
    assert result.returncode == 2 and message in result.stderr
