"""Small breakages of the kernels, each of which the tests have to notice.

A copy of the package is broken by one replacement and the tests that should see it are run on the copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixer_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the strict interpreter, on the CPU")

TESTS = Path(__file__).parent
KERNELS = "test_kernels.py"
BACKWARD = "test_backward.py"

BUGS = {
    "mask one too far": (
        "token_mixing.py", "mask_s = offs_s < S", "mask_s = offs_s < S + 1", KERNELS,
        "test_matches_eager and one"),
    "store past the last channel": (
        "channel_products.py", "mask = mask_m[:, None] & mask_n[None, :]",
        "mask = mask_m[:, None] & (mask_n | True)[None, :]", KERNELS, "test_matches_eager and below"),
    "masked lanes without other": (
        "channel_products.py", "mask=mask_k[None, :], other=0.0", "mask=mask_k[None, :]", KERNELS,
        "test_matches_eager and below"),
    "rows past the hidden units": (
        "token_products.py", "mask_k = rows < K", "mask_k = rows <= K", KERNELS, "test_matches_eager and beyond"),
    "b1 dropped": (
        "token_mixing.py", "ACT(z + tl.load(b1_ptr + offs_d)[None, :])", "ACT(z)", KERNELS,
        "test_matches_eager and below"),
    "b2 dropped": (
        "token_mixing.py", " + tl.load(b2_ptr + offs_s)[:, None]", "", KERNELS, "test_matches_eager and below"),
    "residual dropped": (
        "channel_epilogue.py", "return u.to(tl.float32) + acc", "return acc", KERNELS, "test_matches_eager and below"),
    "eps dropped": ("row_statistics.py", "m2 / C + eps", "m2 / C", KERNELS, "test_eps"),
    "chunks merged without their distance": (
        "row_statistics.py", "m2 += chunk_m2 + delta * delta * (seen * count / (seen + count))", "m2 += chunk_m2",
        KERNELS, "test_layouts and transposed"),
    "sum of the unrounded weight": (
        "pack.py", "sums += folded.to(tl.float32)", "sums += w", KERNELS, "test_mean_far_from_zero and 30"),
    "scale of the folded rows dropped": (
        "channel_epilogue.py", "z *= tl.load(scale_ptr", "z += 0 * tl.load(scale_ptr", KERNELS, "test_small_gamma"),
    "a coefficient's sign": ("gelu.py", "(-3.6027187e-4", "(3.6027187e-4", "test_gelu.py", "fit"),
    "one column block for all": (
        "channel_descriptors.py", "first = n0 + i * SUB_N", "first = n0", KERNELS, "test_tensor_descriptors"),
    "TF32 always": ("../arguments.py", 'else "ieee"', 'else "tf32"', KERNELS, "test_matches_eager and below"),
    "32-bit image offset": (
        "token_mixing.py", "image = (tl.program_id(0) // c_tiles).to(tl.int64)", "image = tl.program_id(0) // c_tiles",
        "test_launches.py", "test_offsets and image"),
    "slope forgotten": (
        "token_data_gradient.py", "dz = (da * slope).to(DTYPE)", "dz = da.to(DTYPE)", BACKWARD,
        "test_matches_eager and below and float32-fast"),
    "one term of LayerNorm backward dropped": (
        "norm_backward.py", " - xhat * mean_dxhat_xhat[:, None]", "", BACKWARD,
        "test_matches_eager and below and float32-fast"),
    "two programs on one partial sum": (
        "token_weight_gradients.py", "partial_ptr += split * M * N", "partial_ptr += 0 * split", BACKWARD,
        "test_matches_eager and below and float32-fast"),
    "a step past the last channels": (
        "token_weight_gradients.py", "is_last = c0 >= C", "is_last = c0 > C + BLOCK_C", BACKWARD,
        "many_turns and sm_80-torch.float32"),
    "the next image's rows": (
        "token_weight_gradient_descriptors.py", "row_n += tl.where(is_last, N, 0)", "row_n += 0", BACKWARD,
        "many_turns and sm_90"),
    "partial sums of the first rows only": (
        "partial_sums.py", "for r0 in range(0, rows, ROWS)", "for r0 in range(0, rows - ROWS, ROWS)", BACKWARD,
        "test_matches_eager and below and float32-fast"),
    "column sums of one row tile only": (
        "channel_backward.py", "sums_ptr + (m0 // BLOCK_M) * D_C + offs_n", "sums_ptr + offs_n", BACKWARD,
        "test_matches_eager and 32 and float32-fast"),
    "another mask backward": (
        "token_data_gradient.py", "kept_hidden(noise, offs_d[None, :], offs_c[:, None], image)",
        "kept_hidden(noise, offs_d[None, :] + 1, offs_c[:, None], image)", "test_noise.py",
        "gradients_see and fused"),
    "rows of the next matrix": (
        "pack.py", "block = tl.program_id(0) - first", "block = tl.program_id(0) - first + 1", KERNELS,
        "test_matches_eager and below"),
    "packs kept for ever": (
        "pack.py", "self.made: dict[str, Tensor] = {}\n        self._kept = kept or {}",
        "self.made = self._kept = globals().setdefault('_for_ever', {})", "test_weights_are_never_stale.py",
        "data_copy and triton and Mixer"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "right", "wrong", "tests", "chosen"), BUGS.values(), ids=BUGS.keys())
def test_bug_is_caught(file, right, wrong, tests, chosen, tmp_path):
    package = tmp_path / "mixer_kernels"
    shutil.copytree(Path(mixer_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "backends" / "triton" / file
    text = source.read_text()
    assert text.count(right) == 1, f"{file} has {text.count(right)} times {right!r}: bring the planted bug up to date"
    source.write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", TESTS / tests]
    result = subprocess.run(
        [*command, "-k", f"({chosen}) and not cuda"],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "PYTEST_ADDOPTS": ""},
    )
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert "1 failed" in result.stdout, result.stdout[-2000:]
