"""What every test starts from: where kernels run, a timm that imports, no setting inherited from the shell."""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm_stub
import torch
from blocks import KERNEL_BACKENDS


def pytest_configure(config: pytest.Config) -> None:
    # First of all, since it has to be there before Triton is imported, and torch's compiler imports Triton.
    # Not for `pytest --benchmark`, which loads this file on its way to benchmarks/.
    if not torch.cuda.is_available() and not config.getoption("mk_benchmark"):
        import strict_interpreter

        strict_interpreter.install()
    # There is no CPU build of torchvision for every CPU build of torch, and timm imports torchvision.
    timm_stub.define_torchvision_operators()
    os.environ.pop("MIXER_KERNELS_BACKEND", None)
    # Inductor's cache gives code for the vectors of this CPU where fewer are forced, and then its results are garbage.
    forced = os.environ.get("ATEN_CPU_CAPABILITY")
    if forced:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}_{forced}"
    # The products of these tests are small: more threads wait for each other longer than they compute.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernel tests run: the GPU if there is one, or else the CPU under the strict interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels, ready to run on ``device``."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
    return request.param


@pytest.fixture
def cuda_kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The compiled module of the cuda backend: the installed one on a GPU, else one by g++ that takes CPU tensors."""
    from mixer_kernels.backends.cuda import library

    if torch.cuda.is_available():
        reason = library.why_not(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
        if reason is not None:
            pytest.skip(reason)
        yield library.loaded()
        return
    module = request.getfixturevalue("_cuda_kernels_on_host")
    library.install(module)
    yield module
    library.install(None)


@pytest.fixture
def hopper_kernels(cuda_kernels: ModuleType, device: str) -> ModuleType:
    """The same, where the kernels of csrc/sm90 run."""
    from mixer_kernels.backends.cuda import library

    reason = library.why_not_sm90(torch.empty(0, device=device).device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    return cuda_kernels


@pytest.fixture(params=["compiled", "python"])
def metadata_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls compare is read by the compiled module, and by what stands for it."""
    from mixer_kernels import metadata

    if request.param == "python":
        monkeypatch.setattr(metadata, "_describe", lambda: metadata.describe_in_python)
        monkeypatch.setattr(metadata, "_unchanged", lambda: metadata.unchanged_in_python)
    elif metadata._compiled() is None:
        pytest.skip("waits for a build with the CPU kernels")


@pytest.fixture(scope="session")
def _cuda_kernels_on_host() -> ModuleType:
    from cuda_on_host import build

    return build.load()


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


@pytest.fixture
def few_packing_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Weights are packed by few programs, each of many rows, and partial sums added by few: an interpreted one costs by
    the operation. For tests of what is between; those of packing have a GPU's tiles."""
    if device == "cpu":
        from mixer_kernels.backends.triton import pack, partial_sums

        monkeypatch.setattr(pack, "ROWS", 64)
        monkeypatch.setattr(partial_sums, "COLUMNS", 1024)


@pytest.fixture
def through_functional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks call the functional API where torch is chosen, too, rather than their own forward: what they would ask of
    kernels, computed by PyTorch's operators, is then the same to the last bit."""
    from mixer_kernels.backends import registry
    from mixer_kernels.functional import checks

    monkeypatch.setattr(registry, "FASTER_ON_CPU", {})
    monkeypatch.setattr(checks, "runs_on_torch", lambda *_: False)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class _Eagerly(logging.Handler):
    """What modules said about computing eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "eagerly" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The modules' warnings during this test, as if it were the first of the process."""
    from mixer_kernels import words

    words._warn.cache_clear()
    handler = _Eagerly()
    words.logger.addHandler(handler)
    yield handler.messages
    words.logger.removeHandler(handler)
