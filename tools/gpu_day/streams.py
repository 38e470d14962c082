"""Streams, CUDA graphs, threads: who orders a kernel behind what it reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixer_kernels.shapes import SPECS, MixerShape

from .kernels import on_each_backend
from .sample import (
    EPS,
    LEVELS,
    Sample,
    arithmetic,
    compare,
    eager_and_exact,
    on_target,
    ours,
    parameters_of,
    planted,
    samples_on,
)
from .tasks import Settings, Skip, Task

SLEEP_CYCLES = 100_000_000  # some 50 ms: longer than the host needs to queue what follows
THREADS = 4
CALLS_PER_THREAD = 25
SIDE_BY_SIDE = 8

Check = Callable[[Settings, str, Sample, dict[str, Any]], None]


def tasks(settings: Settings) -> list[Task]:
    return on_each_backend(settings, lambda backend: _tasks(settings, backend))


def _tasks(settings: Settings, backend: str) -> list[Task]:
    if settings.rehearse:
        samples = [Sample(MixerShape(S=20, C=24, D_S=16, D_C=32), "bf16")]
    else:
        b16 = SPECS["B/16"].block_shape()
        samples = [Sample(b16, dtype, batch_size=8) for dtype in ("bf16", "fp16", "fp32")]
        samples += [
            Sample(b16, "bf16", stream="fp32", batch_size=8),
            Sample(MixerShape(S=257, C=129, D_S=50, D_C=130), "bf16", batch_size=8),
        ]
    samples = samples_on(backend, samples)
    on_gpu: dict[str, Check] = {
        "side stream behind a sleep": _side_stream,
        "packs gone while their stream reads them": _gone_while_read,
        "graph, inputs change": _graph_inputs,
        "graph, weights change in place": _graph_weights,
        "graph, training step with dropout": _graph_training,
        "second GPU": _second_gpu,
    }
    found = [_task(settings, name, check, sample, True) for name, check in on_gpu.items() for sample in samples]
    return found + [_task(settings, "four threads", _threads, sample, False) for sample in samples]


def _task(settings: Settings, name: str, check: Check, sample: Sample, needs_gpu: bool) -> Task:
    prefix = f"{name}: "
    case = sample.task("block", None, prefix).case

    def run(values: dict[str, Any]) -> None:
        if needs_gpu and settings.device != "cuda":
            raise Skip("needs a GPU")
        check(settings, case, sample, values)

    return sample.task("block", run, prefix)


def _same(settings: Settings, case: str, actual: Tensor, expected: Tensor, what: str) -> None:
    """The same kernels on the same numbers: the same bits."""
    actual = planted(settings, case, actual.clone())
    wrong = int((actual != expected).sum())  # NaN counts as wrong
    assert wrong == 0, f"{what}: {wrong} of {actual.numel()} elements differ from a plain call's"


def _side_stream(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    block, x = sample.make("cuda")
    expected = ours(sample, "block", block, x)
    compare(values, expected, *eager_and_exact(sample, "block", block, x))
    late = torch.full_like(x, torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        late.copy_(x)
        actual = ours(sample, "block", block, late)
    side.synchronize()
    _same(settings, case, actual, expected, "on the side stream")


def _gone_while_read(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    block, x = sample.make("cuda")
    expected = ours(sample, "block", block, x)
    torch.cuda.synchronize()
    reader = torch.cuda.Stream()
    with torch.cuda.stream(reader):
        torch.cuda._sleep(SLEEP_CYCLES)
        actual = ours(sample, "block", block, x)
    sizes = [2**exponent for exponent in range(26, 8, -1)]
    clobber = [torch.full((size // 4,), torch.nan, device="cuda") for size in sizes for _ in range(SIDE_BY_SIDE)]
    torch.cuda.synchronize()
    del clobber
    _same(settings, case, actual, expected, "after the packs' memory was free for others")


def _captured(sample: Sample, block: Any, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()  # PyTorch's notes on CUDA graphs: warm up on another stream than the default one
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            ours(sample, "block", block, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(sample, "block", block, x)
    return graph, y


def _graph_inputs(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    block, x = sample.make("cuda")
    graph, y = _captured(sample, block, x)
    for number in range(3):
        x.copy_(torch.randn_like(x) + number)
        y.fill_(torch.nan)
        graph.replay()
        _same(settings, case, y, ours(sample, "block", block, x), f"replay {number + 1}")
    compare(values, y, *eager_and_exact(sample, "block", block, x))


def _graph_weights(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    block, x = sample.make("cuda")
    graph, y = _captured(sample, block, x)
    for number in range(3):
        for parameter in parameters_of(block, "block"):
            parameter.mul_(1 + 0.25 * torch.rand_like(parameter))
        y.fill_(torch.nan)
        graph.replay()
        _same(settings, case, y, ours(sample, "block", block, x), f"replay {number + 1} on new weights")
    compare(values, y, *eager_and_exact(sample, "block", block, x))


def _graph_training(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    """Forward, backward and a step of SGD: a new mask each replay, and the masks of a plain call on the same seed."""
    block, x = sample.make("cuda")
    parameters = [parameter.requires_grad_() for parameter in parameters_of(block, "block")]
    dy = torch.randn_like(x)

    def step() -> list[Tensor]:
        with arithmetic(sample, "cuda"), torch.enable_grad():
            noise = {"dropout_p": 0.1, "drop_path_p": 0.25}
            y = LEVELS["block"](x, *parameters, eps=EPS, backend=sample.backend, **noise)
        gradients = torch.autograd.grad(y, parameters, dy)
        with torch.no_grad():
            torch._foreach_add_(parameters, list(gradients), alpha=-1e-3)
        return [y.detach(), *gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    start = [parameter.detach().clone() for parameter in parameters]

    def rewind() -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, start)

    for number in range(3):
        rewind()
        torch.cuda.manual_seed(number)
        graph.replay()
        replayed = [t.detach().clone() for t in (*results, *parameters)]
        rewind()
        graph.replay()
        assert not torch.equal(results[0], replayed[0]), "two replays drop the same elements"
        rewind()
        torch.cuda.manual_seed(number)
        expected = [*step(), *parameters]
        for index, (actual, plain) in enumerate(zip(replayed, expected, strict=True)):
            _same(settings, case, actual, plain.detach(), f"replay {number + 1}, result {index}")


def _second_gpu(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    block, x = sample.make("cuda:1")
    with torch.cuda.device(0):
        actual = ours(sample, "block", block, x)
    torch.cuda.synchronize(1)
    compare(values, planted(settings, case, actual), *eager_and_exact(sample, "block", block, x))


def _threads(settings: Settings, case: str, sample: Sample, values: dict[str, Any]) -> None:
    """Four threads on one set of weights, each with its own stream and input."""
    block, _ = sample.make(settings.device)
    inputs = [sample.make(settings.device)[1] for _ in range(THREADS)]
    with on_target(settings):
        expected = [ours(sample, "block", block, x) for x in inputs]
    if settings.device == "cuda":
        torch.cuda.synchronize()
    results: list[Any] = [[] for _ in inputs]
    start = threading.Barrier(THREADS)
    calls = 2 if settings.rehearse else CALLS_PER_THREAD

    def work(index: int) -> None:
        try:
            start.wait()
            with on_target(settings), torch.cuda.stream(torch.cuda.Stream() if settings.device == "cuda" else None):
                results[index] = [ours(sample, "block", block, inputs[index]) for _ in range(calls)]
                if settings.device == "cuda":
                    torch.cuda.current_stream().synchronize()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, result in enumerate(results):
        if isinstance(result, Exception):
            raise result
        for actual in result:
            _same(settings, case, actual, expected[index], f"thread {index + 1}")
    values["repeats_equal"] = THREADS * calls
