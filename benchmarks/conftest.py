"""``pytest benchmarks --benchmark``: the throughput report. Without the option each benchmark runs once.

pytest-benchmark times one function after the other. A GPU's clock moves in between, so all providers of a workload are
measured together, round by round (``mixer_kernels.bench.timing``, as on the command line), when the first of them is
due. Each benchmark then hands its provider's rounds to pytest-benchmark, whose statistics, comparison and JSON work on
them as on its own.

The suite takes under three minutes on a CPU, and on a GPU hours, nearly all of it torch.compile's search: choose with
``-k "B/16 and bf16-256"`` or ``-k "training and B/16"``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from mixer_kernels import info
from mixer_kernels.bench.progress import no_progress
from mixer_kernels.bench.providers import CannotRun, provider_names
from mixer_kernels.bench.report import CANNOT_RUN, Row, table
from mixer_kernels.bench.run import Group, is_defect, prepare_providers, release, run_group
from mixer_kernels.bench.workloads import Workload, prepare_workload, workloads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 0.5 if DEVICE.type == "cuda" else 0.3  # to time each provider of a workload

ROWS = pytest.StashKey[list[Row]]()
LATEST_GROUP = pytest.StashKey[tuple[Workload, Group]]()


class RecordedClock:
    """A timer for pytest-benchmark that moves by rounds that were measured before."""

    __name__ = "event_pairs" if DEVICE.type == "cuda" else "perf_counter"  # in pytest-benchmark's table
    __module__ = "mixer_kernels.bench.timing"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, rounds: Iterator[float]) -> None:
        self.now += next(rounds)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        level = metafunc.module.LEVELS[metafunc.function.__name__]
        mode = getattr(metafunc.module, "MODE", "infer")
        names = provider_names(level, mode, DEVICE)
        pairs = [(workload, provider) for workload in workloads(level, DEVICE, mode) for provider in names]
        metafunc.parametrize("workload, provider", pairs, ids=[f"{workload}-{name}" for workload, name in pairs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "throughput" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=RecordedClock()))
            # What torch.compile warns of is not ours to fix, and a provider that cannot run has nothing to time.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))


@pytest.fixture
def throughput(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Workload, str], None]:
    """``throughput(workload, provider)``: measure and report it; in a smoke run call it once and check its result."""

    def run(workload: Workload, provider: str) -> None:
        with _matmul_precision(workload):
            try:
                if benchmark.disabled:
                    _run_once(benchmark, workload, provider)
                else:
                    _measure(benchmark, request, workload, provider)
            except CannotRun as reason:  # a library that is not here
                pytest.skip(f"{CANNOT_RUN}: {reason}")

    return run


def _run_once(benchmark: Any, workload: Workload, provider: str) -> None:
    prepared = prepare_workload(workload, DEVICE, smoke=True)
    chosen = [each for each in prepared.providers if each.name in ("eager", provider)]
    functions, _, failures = prepare_providers(
        prepared.case, prepared.inputs, chosen, prepared.reference, progress=no_progress
    )
    _stop_if(failures.get(provider))
    with torch.no_grad():
        benchmark.pedantic(functions[provider], args=(prepared.inputs[0],))


def _measure(benchmark: Any, request: pytest.FixtureRequest, workload: Workload, provider: str) -> None:
    group = _group(request, workload)
    row = next(row for row in group.rows if row.provider == provider)
    request.config.stash[ROWS].append(row)
    _stop_if(row.reason)
    benchmark.group = f"{workload.level} {workload}"
    benchmark.extra_info.update(asdict(row))
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
    seconds = group.samples[provider].seconds
    benchmark.pedantic(clock.advance, args=(iter(seconds),), rounds=len(seconds), iterations=1)


def _group(request: pytest.FixtureRequest, workload: Workload) -> Group:
    """All selected providers of the workload, measured together; eager always, to check and to compare with."""
    latest = request.config.stash.get(LATEST_GROUP, None)
    if latest is None or latest[0] != workload:
        items = [item for item in request.session.items if hasattr(item, "callspec")]
        params = [item.callspec.params for item in items]
        wanted = {"eager"} | {each["provider"] for each in params if each.get("workload") == workload}
        prepared = prepare_workload(workload, DEVICE)
        group = run_group(
            prepared.case,
            prepared.inputs,
            [each for each in prepared.providers if each.name in wanted],
            prepared.reference,
            seconds=SECONDS,
            progress=no_progress,
            parameters=prepared.parameters,
        )
        del prepared
        release(DEVICE)
        request.config.stash[LATEST_GROUP] = latest = (workload, group)
    return latest[1]


def _stop_if(reason: str | None) -> None:
    if reason is not None:
        (pytest.fail if is_defect(reason) else pytest.skip)(reason)


@contextlib.contextmanager
def _matmul_precision(workload: Workload) -> Iterator[None]:
    """On a GPU float32 products are measured as TF32: that is what the baselines are run with in practice."""
    before = torch.get_float32_matmul_precision()
    if DEVICE.type == "cuda" and workload.dtype == "fp32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["device"] = info.device_info(DEVICE)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["versions"] = info.versions()
    output_json["throughput"] = [asdict(row) for row in config.stash[ROWS]]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section(f"throughput on {info.device_name(DEVICE)}")
        terminalreporter.write_line(table(rows))
