"""On a GPU: a hundred calls with the same bits, CUDA graphs, side streams. Without one these tests have nothing to say.

The same kernels on the same numbers give the same bits; whether they are right, other tests say.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blocks import Block, make_block, make_x
from torch import Tensor

import mixer_kernels.functional as F
from mixer_kernels import backends
from mixer_kernels.shapes import SPECS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a machine with a GPU")

CALLS = 100
SLEEP_CYCLES = 100_000_000  # some 50 ms: longer than the host needs to queue what follows
BATCH_SIZE = 64


@pytest.fixture(params=("triton", "cuda", "cuda:sm90"))
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.why_not(request.param, torch.empty(0, device="cuda").device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def block() -> Block:
    return make_block(SPECS["B/16"].block_shape(), torch.bfloat16, "cuda")


@pytest.fixture
def x(block: Block) -> Tensor:
    return make_x(BATCH_SIZE, block.shape, torch.bfloat16, "cuda")


def forward(block: Block, x: Tensor, backend: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return F.mixer_block(x, **block.parameters, backend=backend)

    return run


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    wrong = int((actual != expected).sum())  # NaN counts as wrong
    assert wrong == 0, f"{what}: {wrong} of {actual.numel()} elements differ from a plain call's"


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_a_hundred_calls_give_the_same_bits(memory, backend, block, x):
    """Forward and backward: sums of partial results keep their order."""
    leaves = {name: t.requires_grad_() for name, t in {"x": x, **block.parameters}.items()}
    dy = torch.randn_like(x)

    def call() -> list[Tensor]:
        y = F.mixer_block(x, **block.parameters, memory=memory, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]

    first = call()
    for number in range(1, CALLS):
        for name, expected, actual in zip(("y", *leaves), first, call(), strict=True):
            assert_same(actual, expected, f"call {number + 1}, {name}")


def test_a_graph_sees_new_inputs_and_weights(backend, block, x):
    run = forward(block, x, backend)
    side = torch.cuda.Stream()  # PyTorch's notes on CUDA graphs: warm up on another stream than the default one
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for number in range(4):
        x.copy_(torch.randn_like(x) + number)
        for parameter in block.parameters.values() if number > 1 else ():
            parameter.mul_(1 + 0.25 * torch.rand_like(parameter))
        y.fill_(torch.nan)
        graph.replay()
        assert_same(y, run(), f"replay {number + 1}")


def test_kernels_wait_for_what_their_stream_waits_for(backend, block, x):
    expected, late = forward(block, x, backend)(), torch.full_like(x, torch.nan)
    run, side = forward(block, late, backend), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        late.copy_(x)
        actual = run()
    side.synchronize()
    assert_same(actual, expected, "on the side stream")


def test_packs_are_not_overwritten_while_their_stream_reads_them(backend, block, x):
    run = forward(block, x, backend)
    expected = run()
    torch.cuda.synchronize()
    reader = torch.cuda.Stream()
    with torch.cuda.stream(reader):
        torch.cuda._sleep(SLEEP_CYCLES)
        actual = run()
    clobber = [torch.full((2**n // 4,), torch.nan, device="cuda") for n in range(26, 8, -1) for _ in range(8)]
    torch.cuda.synchronize()
    del clobber
    assert_same(actual, expected, "after the packs' memory was free for others")
