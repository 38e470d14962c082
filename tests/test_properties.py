"""Hypothesis drives the combinations, a few of what ``make fuzz`` draws; and what it found once (fuzzing.py)."""

from __future__ import annotations

import pytest
import torch
from fuzzing import BACKENDS, Call, calls, check, check_model, models
from hypothesis import HealthCheck, given, settings

from mixer_kernels.backends.cpu import library

CALLS = {"torch": 50, "triton": 25, "cuda": 15, "cpu": 50}
MODELS = {"torch": 3, "triton": 4, "cuda": 2, "cpu": 4, "auto": 3}


def drawn(number: int) -> settings:
    """The same every time; what a call finds is told at once."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=unhealthy)


def ready(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cuda":
        request.getfixturevalue("cuda_kernels")
    elif backend == "cpu":
        pytest.importorskip(library.MODULE, reason="waits for a build with the CPU kernels")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call(backend, request) -> None:
    """As plain PyTorch computes it."""
    ready(backend, request)
    drawn(CALLS[backend])(given(case=calls(backend))(check))()


@pytest.mark.parametrize("backend", MODELS)
def test_any_model(backend, request) -> None:
    """As it is without us."""
    ready(backend, request)
    drawn(MODELS[backend])(given(case=models(backend))(check_model))()


FOUND = (  # and what no draw may miss
    Call("mixer_block", "torch", 2, {"S": 5, "C": 6, "D": 4, "H": 7}, torch.float32, {"eps": (1e-5, 0.1)}),
    Call("gated_mixer_layer", "triton", 2, dict(zip("NPFQG", (2, 4, 8, 5, 6), strict=True)), torch.float32,
         {"eps": (1e-5, 0.1)}),
)  # fmt: skip


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case.operation} {case.backend}")
def test_what_was_found(case) -> None:
    check(case)
