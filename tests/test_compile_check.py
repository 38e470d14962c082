"""compile-check: that it compiles, and that it notices what it is there to notice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Each check replaces Triton's driver and compiles for real, which a process that interprets cannot.
PREAMBLE = """
import dataclasses, functools, sys
import torch
from mixer_kernels import compile_check
Case = functools.partial(compile_check.Case, backward=False)
from mixer_kernels.shapes import MixerShape
SHAPE = MixerShape(S=49, C=64, D_S=32, D_C=64)
def show(rows):
    for row in rows.values():
        print(row.kernel, row.tile, row.instruction.split(" ")[0], "|".join(row.problems) or "clean", sep=";")
"""


def compiled(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return [line.split(";") for line in result.stdout.splitlines()]


def has_products(kernel: str) -> bool:
    return "statistics" not in kernel and "pack" not in kernel


def test_the_kernels_of_one_block():
    rows = compiled("show(compile_check._compile_case('sm_90', Case(SHAPE, 'bf16', 'bf16')))")
    kernels = [row[0] for row in rows]
    assert kernels.count("row_statistics_kernel") == 1 and kernels.count("token_mixing_fwd_kernel") == 1
    assert kernels.count("channel_product_descriptor_kernel") == 2
    assert all(row[3] == "clean" for row in rows)
    assert {row[2] for row in rows if has_products(row[0])} == {"HGMMA"}


def test_ieee_and_tf32():
    rows = compiled(
        "show(compile_check._compile_case('sm_80', Case(SHAPE, 'fp32', 'fp32')))\n"
        "show(compile_check._compile_case('sm_80', Case(SHAPE, 'tf32', 'fp32')))"
    )
    assert all(row[3] == "clean" for row in rows)
    products = [row[2] for row in rows if has_products(row[0])]
    assert products == ["-"] * 3 + ["HMMA"] * 3


@pytest.mark.parametrize(
    ("plant", "problem"),
    (
        ("tm.token_config = lambda *a, **k: TokenConfig(128, 64, 4, 2)", "spills"),
        ("compile_check.KNOWN_TARGETS['sm_80'] = dataclasses.replace(compile_check.KNOWN_TARGETS['sm_80'], "
         "shared_memory=10_000)", "bytes of shared memory, sm_80 has 10000"),
        ("compile_check.MATRIX_INSTRUCTIONS['sm_80'] = 'HGMMA'", "expected HGMMA, found HMMA"),
    ),
    ids=("spill", "shared memory", "instruction"),
)  # fmt: skip
def test_planted_problems_are_seen(plant, problem):
    rows = compiled(
        "from mixer_kernels.backends.triton import token_mixing as tm\n"
        "from mixer_kernels.tuning.configs import TokenConfig\n"
        f"{plant}\n"
        "show(compile_check._compile_case('sm_80', Case(dataclasses.replace(SHAPE, S=256), 'bf16', 'bf16')))"
    )
    assert any(problem in row[3] for row in rows), rows


def test_tf32_where_ieee_was_asked_for_is_seen():
    rows = compiled(
        "compile_check.precision_of = lambda dtype: 'tf32'\n"
        "show(compile_check._compile_case('sm_80', Case(SHAPE, 'fp32', 'fp32')))"
    )
    assert all("IEEE" in row[3] for row in rows if has_products(row[0]))


def test_a_kernel_that_does_not_compile_is_a_row():
    rows = compiled(
        "from mixer_kernels.backends.triton import token_mixing as tm\n"
        "from mixer_kernels.tuning.configs import TokenConfig\n"
        "tm.token_config = lambda *a, **k: TokenConfig(48, 32, 4, 2)\n"
        "show(compile_check._compile_case('sm_80', Case(SHAPE, 'bf16', 'bf16')))"
    )
    assert any("power of 2" in row[3] for row in rows if "token" in row[0]), rows


GATE = """
import pathlib
from mixer_kernels.machine_model.gates import Bounds
from mixer_kernels.backends.triton import token_mixing as tm
from mixer_kernels.tuning.configs import TokenConfig
CASE = Case(dataclasses.replace(SHAPE, S=196, C=128), "bf16", "bf16")
compile_check.cases_with_bounds = lambda: (CASE,)
bounds = Bounds(pathlib.Path(sys.argv[0]))
def gate():
    found = compile_check._Gate(bounds, "Triton of today")
    found.add("sm_80", CASE, compile_check._compile_case("sm_80", CASE).values())
    return found
gate().accept(complete=False)
print(len(gate().problems()), len(bounds.kept["triton"]["sm_80"]["kernels"]))
"""


def test_a_lower_share_of_the_tensor_peak_is_seen(tmp_path):
    """Few channels to a program: each weight that is loaded feeds few products."""
    rows = compiled(
        GATE.replace("sys.argv[0]", repr(str(tmp_path / "bounds.json")))
        + "tm.token_config = lambda *a, **k: TokenConfig(32, 16, 4, 2)\n"
        + "print(*gate().problems(), sep='\\n')"
    )
    assert rows[0] == ["0 3"]
    sentence = ";".join(rows[1])
    assert sentence.startswith("sm_80 [bf16 S=196 C=128] token_mixing_fwd_kernel: the model gave it ")
    assert sentence.endswith("if that is meant, `make compile-check ARGS=--accept` keeps it")
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    (
        (["--arch", "sm_70"], {}, "got sm_70, expected 'all' or some of sm_80"),
        (["--arch", "sm_90"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ),
)
def test_bad_arguments(arguments, environment, message):
    result = subprocess.run(
        [sys.executable, "-m", "mixer_kernels", "compile-check", *arguments],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
    )
    assert result.returncode == 2 and message in result.stderr
