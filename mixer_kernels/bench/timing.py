"""How long a call takes: all candidates in one run, round by round.

- Candidates are interleaved, and each round starts with another one: a clock or temperature that drifts touches all of
  them alike, so that ratios within one run hold where absolute figures would not.
- Inputs are rotated over more bytes than twice the L2 cache: a benchmark that reads the same ``x`` again and again
  reads it from L2, where the layer before, in a model, left only a part of it.
- On a GPU the figure is device time, between two events on the stream. A launch takes the host microseconds, and a
  small batch less than that on the device: events alone would time the host. So a short wait is queued first; while
  the device waits, the host queues start event, call and end event, and they run back to back, as a replayed CUDA
  graph would.
- What a caller sees, launches included, is measured apart, by the host's clock with the device idle before and after:
  ``call_seconds``. On a CPU the two are the same thing.
- The median is reported: it does not move when a few rounds are disturbed.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

L2_MULTIPLE = 2
MIN_INPUTS = 2
WARMUP_ROUNDS = 3
WARMUP_SECONDS = 0.2  # at least, on a GPU, for the clocks to leave idle; at most, on a CPU, after the first round
CALL_ROUNDS = 20
MAX_WAIT_SECONDS = 0.05
WAIT_CLOCK_HZ = 2e9  # at a lower clock the wait is longer, never too short

Function = Callable[[Tensor], object]


@dataclass
class Samples:
    """One candidate's rounds, in seconds."""

    seconds: list[float] = field(default_factory=list)
    call_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def call_median(self) -> float | None:
        return statistics.median(self.call_seconds) if self.call_seconds else None


def rotated_inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Standard normal inputs of ``shape``, together more than ``L2_MULTIPLE`` times the L2 cache; at least two."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    count = MIN_INPUTS
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = max(count, L2_MULTIPLE * cache // size + 1)
    generator = torch.Generator(device).manual_seed(seed)
    return list(torch.randn(count, *shape, dtype=dtype, device=device, generator=generator).unbind())


def measure(
    candidates: dict[str, Function],
    inputs: Sequence[Tensor],
    *,
    seconds: float = 0.5,
    min_rounds: int = 3,
    max_rounds: int = 200,
    progress: Callable[[str], None] = lambda text: None,
    clock: HostClock | DeviceClock | None = None,
) -> dict[str, Samples]:
    """Time every candidate on ``inputs``, about ``seconds`` for each of them, by default by their device's clock.

    Returns one ``Samples`` a candidate, all with the same number of rounds, between ``min_rounds`` and ``max_rounds``.
    """
    device, current_device = inputs[0].device, contextlib.nullcontext()
    if device.type == "cuda":
        clock, current_device = clock or DeviceClock(device), torch.cuda.device(device)  # which events belong to
    clock = clock or HostClock()
    with current_device:
        for name, function in candidates.items():
            progress(f"warming up {name}")
            clock.warm_up(function, inputs)
        round_seconds = sum(clock.estimate(function, inputs[0]) for function in candidates.values())
        budget = seconds * len(candidates)
        rounds = max(min_rounds, min(max_rounds, int(budget / round_seconds) if round_seconds else max_rounds))
        samples = {name: Samples() for name in candidates}
        names = list(candidates)
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                clock.queue(name, candidates[name], inputs[index % len(inputs)])
            for name, elapsed in clock.read():
                samples[name].seconds.append(elapsed)
            if index % max(1, rounds // 20) == 0:
                progress(f"round {index + 1} of {rounds}")
        for name, function in candidates.items():
            samples[name].call_seconds = clock.call_seconds(function, inputs, min(rounds, CALL_ROUNDS))
    return samples


class HostClock:
    """Times calls that are over when they return; short ones again and again, for ``least_seconds`` of ``now``."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, least_seconds: float = 0.0) -> None:
        self._now, self._least_seconds = now, least_seconds
        self._repeats: dict[Function, int] = {}
        self._elapsed: list[tuple[str, float]] = []

    def warm_up(self, function: Function, inputs: Sequence[Tensor]) -> None:
        start, index = time.perf_counter(), 0
        while index == 0 or (index < WARMUP_ROUNDS and time.perf_counter() - start < WARMUP_SECONDS):
            once = self.estimate(function, inputs[index % len(inputs)])
            index += 1
        self._repeats[function] = max(1, math.ceil(self._least_seconds / max(once, 1e-6)))

    def estimate(self, function: Function, x: Tensor) -> float:
        start = self._now()
        for _ in range(self._repeats.get(function, 1)):
            function(x)
        return self._now() - start

    def queue(self, name: str, function: Function, x: Tensor) -> None:
        self._elapsed.append((name, self.estimate(function, x) / self._repeats[function]))

    def read(self) -> list[tuple[str, float]]:
        """The calls queued since the last read, as (name, seconds)."""
        elapsed, self._elapsed = self._elapsed, []
        return elapsed

    def call_seconds(self, function: Function, inputs: Sequence[Tensor], rounds: int) -> list[float]:
        return []


class DeviceClock:
    """Times calls on a CUDA stream by pairs of events, read once a round so that the device never runs dry."""

    def __init__(
        self,
        device: torch.device,
        new_event: Callable[[], torch.cuda.Event] = lambda: torch.cuda.Event(enable_timing=True),
        synchronize: Callable[[torch.device], None] = torch.cuda.synchronize,
        wait: Callable[[int], None] | None = None,
    ) -> None:
        self._device = device
        self._new_event = new_event
        self._synchronize = synchronize
        self._wait = wait or torch.cuda._sleep
        self._wait_cycles: dict[Function, int] = {}
        self._pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def warm_up(self, function: Function, inputs: Sequence[Tensor]) -> None:
        start, index = time.perf_counter(), 0
        while index < WARMUP_ROUNDS or time.perf_counter() - start < WARMUP_SECONDS:
            function(inputs[index % len(inputs)])
            self._synchronize(self._device)
            index += 1

    def estimate(self, function: Function, x: Tensor) -> float:
        """Seconds from call to end on the device; also learns how long the host needs to queue the call."""
        self._synchronize(self._device)
        start = time.perf_counter()
        function(x)
        queued = time.perf_counter() - start
        self._synchronize(self._device)
        wait = min(MAX_WAIT_SECONDS, 1.5 * queued + 20e-6)
        self._wait_cycles[function] = int(wait * WAIT_CLOCK_HZ)
        return time.perf_counter() - start + wait

    def queue(self, name: str, function: Function, x: Tensor) -> None:
        start, end = self._new_event(), self._new_event()
        self._wait(self._wait_cycles[function])
        start.record()
        function(x)
        end.record()
        self._pairs.append((name, start, end))

    def read(self) -> list[tuple[str, float]]:
        """The calls queued since the last read, as (name, seconds)."""
        self._synchronize(self._device)
        pairs, self._pairs = self._pairs, []
        return [(name, start.elapsed_time(end) * 1e-3) for name, start, end in pairs]

    def call_seconds(self, function: Function, inputs: Sequence[Tensor], rounds: int) -> list[float]:
        """Seconds of single calls by the host's clock, the device idle before and after."""
        elapsed = []
        for index in range(rounds):
            self._synchronize(self._device)
            start = time.perf_counter()
            function(inputs[index % len(inputs)])
            self._synchronize(self._device)
            elapsed.append(time.perf_counter() - start)
        return elapsed
