"""A sample of what ``make planted`` plants: small breakages of the product, each of which a test has to see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from subprocesses import outside_xdist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from planted.breakage import job_of  # noqa: E402
from planted.cli import AREAS  # noqa: E402
from planted.mutants import mutants_of  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the strict interpreter, on the CPU")


@pytest.mark.parametrize("area", AREAS)
def test_a_sample_is_caught(area) -> None:
    command = [sys.executable, ROOT / "tools/planted.py", "-k", f"{area}: ", "--every", "9", "--untested"]
    result = subprocess.run(command, capture_output=True, text=True, env=outside_xdist())
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_all_are_breakages_of_what_is_there() -> None:
    """At least sixty, as promised."""
    jobs = [job_of(name, breakage) for breakages in AREAS.values() for name, breakage in breakages.items()]
    assert len(jobs) >= 60 and all(job.checks for job in jobs)


CHANGES = """
import json, sys
sys.path.insert(0, "tools")
from planted.copies import ROOT, Check, Job, run
file, check = "mixer_kernels/backends/triton/gelu.py", Check("test_gelu", "fit")
text = (ROOT / file).read_text()
jobs = [
    Job("comment", file, text + "# nothing else", (check, check)),
    Job("wrong", file, text.replace("return q * q", "return q"), (check,)),
    Job("no Python", file, text + "def", (check,)),
    Job("no test", file, text, (Check("test_gelu", "nothing_of_that_name"),)),
]
results = [*run(jobs), *run([Job("too long", file, text + "while True: pass", (check,))], limit=10)]
print(json.dumps({job.name: result.outcome for job, result in results}))
"""


def test_what_no_test_sees_is_said() -> None:
    result = subprocess.run([sys.executable, "-c", CHANGES], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "comment": "survived", "wrong": "caught", "no Python": "broken", "no test": "not run", "too long": "timed out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "changed"),
    [
        (
            "kernel.py",
            "@triton.jit\ndef _kernel(n):\n    mask = (offs < n) & inside\n    tl.load(p + 2, mask=mask, other=0.0)\n",
            [
                "(offs <= n) & inside", "mask = (offs < n)\n", "mask = (inside)\n", "p + 3, ", "mask=(mask) | True,",
                "other=1.0",
            ],
        ),
        (
            "kernel.cu",
            "// a < 2\n#define N 4\ntemplate <int M>\nvoid f() { if (a < M && i >= 1) b = 0.5f; }\n",
            ["a <= M", "M || i", "i > 1", ">= 2)", "b = 0.505f"],
        ),
    ],
)  # fmt: skip
def test_mutants(name, source, changed, tmp_path, monkeypatch) -> None:
    from planted import mutants

    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / name).write_text(source)
    texts = [mutant.text() for mutant in mutants_of(tmp_path / name)]
    assert len(texts) == len(changed)
    for part in changed:
        assert sum(part in text for text in texts) == 1, part
