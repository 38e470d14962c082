"""What the gates on machine code notice, on listings written by hand, and what they keep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from sass_listing import kernel

from mixer_kernels.machine_model import Analysis
from mixer_kernels.machine_model.gates import FILE, TOLERANCE, Bound, Bounds, Faults, bound_of, faults_of

HMMA, EX2, BACK = "HMMA.16816.F32.BF16 R8, R4, R2, R8", "MUFU.EX2 R9, R9", "@P0 BRA 0x0"
HGMMA, FENCE = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", "WARPGROUP.ARRIVE"
RECIPROCAL, FUNCTION = "I2F.U32.RP R5, R6", "CALL.REL.NOINC 0x40"
GOOD = Bound(0.5, "tensor", 0.3)
NO_FAULTS, ACCEPT = Faults(0, 0, 16), "make gates ARGS=--accept"


def faults(target: str, *code: str) -> Faults:
    return faults_of(Analysis(kernel(target, *code), warps=4, blocks=1))


@pytest.mark.parametrize(
    ("code", "divisions"),
    (
        ((HMMA, RECIPROCAL, BACK, "EXIT"), 1),
        ((HMMA, FUNCTION, BACK, "EXIT", "I2F.U64.RP R5, R6", "RET.REL.NODEC R2 0x0"), 1),
        ((HMMA, f"@!P1 {FUNCTION}", BACK, "EXIT", "I2F.U64.RP R5, R6", "RET.REL.NODEC R2 0x0"), 0),  # the way out
        ((HMMA, "I2F R5, R6", "MUFU.RCP R5, R5", BACK, "EXIT"), 0),  # floats
        ((RECIPROCAL, HMMA, "@P0 BRA 0x10", "EXIT"), 0),  # before the loop
        ((RECIPROCAL, BACK, HMMA, "EXIT"), 0),  # a loop without products
        ((HMMA, "@P1 BRA 0x40", BACK, "EXIT", RECIPROCAL, "BRA 0x20"), 0),  # some turns only
    ),
)
def test_divisions_in_a_loop_with_products(code, divisions):
    assert faults("sm_80", *code).divisions == divisions


@pytest.mark.parametrize(
    ("code", "serialised"),
    (
        ((FENCE, HGMMA, FENCE, HGMMA, BACK, "EXIT"), 2),
        ((FENCE, HGMMA, HGMMA, FENCE, HGMMA, HGMMA, BACK, "EXIT"), 0),
        ((HGMMA, HGMMA, BACK, "EXIT"), 0),
    ),
)
def test_products_of_wgmma_one_by_one(code, serialised):
    assert faults("sm_90", *code).serialised == serialised


@pytest.mark.parametrize(
    ("code", "run"),
    (
        ((HMMA, *[EX2] * 5, BACK, "EXIT"), 5),
        ((HMMA, EX2, "@P1 BRA 0x30", EX2, EX2, BACK, "EXIT"), 2),
        ((HMMA, "MUFU.RCP R5, R5", BACK, "EXIT"), None),
    ),
)
def test_exponentials_between_branches(code, run):
    assert faults("sm_80", *code).run == run


@pytest.mark.parametrize(
    ("found", "fault", "says"),
    (
        (dataclasses.replace(NO_FAULTS, divisions=2), "division", "2 integer divisions in a loop with products"),
        (dataclasses.replace(NO_FAULTS, serialised=8), "serialised", "8 products of wgmma wait one for another"),
        (dataclasses.replace(NO_FAULTS, run=1), "branches", "at most 1 exponentials without a branch"),
    ),
)
def test_a_fault_is_a_problem_until_it_is_known(found, fault, says, tmp_path):
    bounds = Bounds(tmp_path / "bounds.json")
    bounds.accept("cuda", "sm_90a", "CUDA 13.0", {"a.cu: k": GOOD}, ["a.cu: "], {"a.cu: k": [NO_FAULTS]}, False)
    assert bounds.unknown("cuda", "sm_90a", "a.cu: k", NO_FAULTS, ACCEPT) == []
    [sentence] = bounds.unknown("cuda", "sm_90a", "a.cu: k", found, ACCEPT)
    assert says in sentence and sentence.endswith(f"if that is meant, `{ACCEPT}` lists it as known")
    bounds.accept("cuda", "sm_90a", "CUDA 13.0", {"a.cu: k": GOOD}, ["a.cu: "], {"a.cu: k": [found]}, False)
    assert bounds.kept["cuda"]["sm_90a"]["known"] == {"a.cu: k": [fault]}
    assert bounds.unknown("cuda", "sm_90a", "a.cu: k", found, ACCEPT) == []


def test_faults_of_kernels_without_a_bound_count_after_a_complete_run(tmp_path):
    bounds, bad = Bounds(tmp_path / "bounds.json"), dataclasses.replace(NO_FAULTS, divisions=1)
    for complete, problems in ((False, 0), (True, 1)):
        bounds.accept("triton", "sm_80", "Triton 3.9.0", {}, [], {"k": [NO_FAULTS]}, complete)
        assert len(bounds.unknown("triton", "sm_80", "other", bad, ACCEPT)) == problems


@pytest.mark.parametrize("lost", (0.0, TOLERANCE / 2, 2 * TOLERANCE))
def test_a_share_may_not_fall(lost, tmp_path):
    bounds = Bounds(tmp_path / "bounds.json")
    bounds.accept("triton", "sm_90", "Triton 3.9.0", {"[case] k": GOOD}, ["[case] "], {}, False)
    now = dataclasses.replace(GOOD, share=GOOD.share - lost, pipe="shared")
    said = bounds.problems("triton", "sm_90", {"[case] k": now}, ["[case] "], ACCEPT)
    if lost < TOLERANCE:
        assert said == []
    else:
        assert said == [
            "sm_90 [case] k: the model gave it 50.0% of the tensor peak, now 48.0%, bound by shared; "
            f"if that is meant, `{ACCEPT}` keeps it"
        ]


def test_kernels_come_and_go_by_their_case_alone(tmp_path):
    bounds = Bounds(tmp_path / "bounds.json")
    kept = {"[one] k": GOOD, "[two] k": GOOD}
    bounds.accept("triton", "sm_90", "Triton 3.9.0", kept, ["[one] ", "[two] "], {}, False)
    said = bounds.problems("triton", "sm_90", {"[one] new": GOOD}, ["[one] "], ACCEPT)
    assert [each.partition(";")[0] for each in said] == [
        "sm_90 [one] new: bounds.json has no bound for it",
        "sm_90 [one] k: bounds.json has a bound for it, it was not compiled",
    ]
    bounds.accept("triton", "sm_90", "Triton 3.9.0", {"[one] new": GOOD}, ["[one] "], {}, False)
    assert set(bounds.kept["triton"]["sm_90"]["kernels"]) == {"[one] new", "[two] k"}


def test_known_faults_go_with_their_case_or_in_a_complete_run(tmp_path):
    bounds, bad = Bounds(tmp_path / "bounds.json"), dataclasses.replace(NO_FAULTS, divisions=1)
    found = {"[one] k": [bad], "[two] k": [bad], "other": [bad]}
    bounds.accept("triton", "sm_90", "Triton 3.9.0", {}, ["[one] ", "[two] "], found, False)
    bounds.accept("triton", "sm_90", "Triton 3.9.0", {}, ["[one] "], {"[one] k": [NO_FAULTS]}, False)
    assert set(bounds.kept["triton"]["sm_90"]["known"]) == {"[two] k", "other"}
    bounds.accept("triton", "sm_90", "Triton 3.9.0", {}, [], {"third": [bad]}, True)
    assert set(bounds.kept["triton"]["sm_90"]["known"]) == {"third"}


def test_another_compiler_is_not_compared(tmp_path):
    bounds = Bounds(tmp_path / "bounds.json")
    assert bounds.why_not_compared("cuda", "sm_80", "CUDA 13.0") == "sm_80: bounds.json keeps no bounds for it"
    bounds.accept("cuda", "sm_80", "CUDA 13.0", {"a.cu: k": GOOD}, ["a.cu: "], {}, True)
    assert bounds.why_not_compared("cuda", "sm_80", "CUDA 13.0") is None
    expected = "sm_80: bounds.json keeps what CUDA 13.0 made, this is CUDA 12.8: not compared"
    assert bounds.why_not_compared("cuda", "sm_80", "CUDA 12.8") == expected
    bounds.accept("cuda", "sm_80", "CUDA 12.8", {"b.cu: k": GOOD}, ["b.cu: "], {}, False)
    entry = bounds.kept["cuda"]["sm_80"]
    assert entry["compiler"] == "CUDA 12.8" and set(entry["kernels"]) == {"b.cu: k"} and not entry["complete"]


def test_the_file_is_what_is_kept_a_line_a_kernel(tmp_path):
    bounds = Bounds(tmp_path / "bounds.json")
    bounds.accept("cuda", "sm_80", "CUDA 13.0", {"a.cu: k": GOOD, "a.cu: l": GOOD}, ["a.cu: "], {}, False)
    bounds.accept("triton", "sm_80", "Triton 3.9.0", {}, [], {"k": [dataclasses.replace(NO_FAULTS, run=1)]}, True)
    bounds.save()
    again = Bounds(bounds.path)
    assert again.kept == bounds.kept and again.bound("cuda", "sm_80", "a.cu: l") == GOOD
    assert sum("a.cu: " in line for line in bounds.path.read_text().splitlines()) == 2


def test_a_bound_is_of_the_loop_with_the_most_products():
    code = (HMMA, BACK, HMMA, HMMA, "MOV R1, R2", "@P0 BRA 0x20", "EXIT")
    found = bound_of(Analysis(kernel("sm_80", *code), warps=4, blocks=1))
    assert found.issue == round(4 / 16, 2) and found.pipe == "tensor"
    assert bound_of(Analysis(kernel("sm_80", "MOV R1, R2", "EXIT"), warps=4)) is None


def test_the_file_of_the_package_is_as_it_is_written(tmp_path):
    kept = Bounds()
    assert kept.path == FILE
    kept.path = Path(tmp_path, "again.json")
    kept.save()
    assert kept.path.read_text(encoding="utf-8") == FILE.read_text(encoding="utf-8")
    assert {"triton", "cuda"} <= set(json.loads(FILE.read_text(encoding="utf-8")))
