"""What every test starts from: where kernels run, a timm that imports, no setting inherited from the shell."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import timm_stub
import torch


def pytest_configure(config: pytest.Config) -> None:
    # First of all, since it has to be there before Triton is imported, and torch's compiler imports Triton.
    # Not for `pytest --benchmark`, which loads this file on its way to benchmarks/.
    if not torch.cuda.is_available() and not config.getoption("mk_benchmark"):
        import strict_interpreter

        strict_interpreter.install()
    # There is no CPU build of torchvision for every CPU build of torch, and timm imports torchvision.
    timm_stub.define_torchvision_operators()
    os.environ.pop("MIXER_KERNELS_BACKEND", None)
    # The products of these tests are small: more threads wait for each other longer than they compute.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernel tests run: the GPU if there is one, or else the CPU under the strict interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN: a kernel that leaves part of a result or of a scratch buffer unwritten shows it."""
    if torch.cuda.is_available():
        yield
        return
    import strict_interpreter

    with strict_interpreter.poisoned_memory():
        yield
