"""Serving and training for a while, as hard as a service has it: ``python tools/soak.py --minutes 10``.

Threads begin at the same moment, each with its first call, and go on with requests of any batch; beside them, every
few seconds, the model is copied, pickled, trained, frozen, forked and, now and then, spawned. Every result must be what
one thread got alone, to the last bit, and the process may not grow. Exit status 1, and what was wrong, otherwise.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import pickle
import random
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from operations import make

from mixer_kernels import FusedMixer, freeze_, functional, unfreeze_, use_backend

BATCH = 6
SIZES = {"P": 12, "Q": 24, "F": 16, "G": 32, "N": 3}
MOST_GROWTH = 1 << 23  # bytes, between the second quarter and the last: of a leak in each call it would be far more
CHILD_LIMIT = 120  # seconds


class Series(nn.Module):
    """Two PatchTSMixer layers."""

    def __init__(self) -> None:
        super().__init__()
        drawn = [make("gated_mixer_layer", SIZES, 1, torch.float32, "cpu").parameters for _ in range(2)]
        self.layers = nn.ModuleList(nn.ParameterList(each.values()) for each in drawn)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.gated_mixer_layer(x, *layer)
        return x


def models(device: str) -> list[tuple[nn.Module, Tensor]]:
    """Each with requests, one below the other."""
    torch.manual_seed(0)
    mixer = FusedMixer(num_classes=5, img_size=32, patch_size=4, num_blocks=2, embed_dim=96)
    return [
        (Series().to(device).eval(), torch.randn(BATCH, SIZES["N"], SIZES["P"], SIZES["F"], device=device)),
        (mixer.to(device).eval(), torch.randn(BATCH, 3, 32, 32, device=device)),
    ]


class Soak:
    def __init__(self, backend: str, device: str, threads: int) -> None:
        self.backend, self.device, self.threads = backend, device, threads
        self.served, self.done, self.wrong = [0] * threads, 0, []
        self.stop = threading.Event()
        self.started = threading.Barrier(threads)
        self.models = models(device)
        self.expected: list[Tensor] = []
        self.first: list[list[Tensor]] = [[] for _ in range(threads)]

    def run(self, seconds: float) -> list[str]:
        """What was wrong."""
        self.until = time.monotonic() + seconds
        workers = [threading.Thread(target=self._guarded, args=(self._serve, i)) for i in range(self.threads)]
        for worker in workers:
            worker.start()
        resident = []
        chores = [self._copy, self._train, self._freeze, self._fork, self._spawn]
        while time.monotonic() < self.until and not self.wrong:
            self._guarded(chores[self.done % len(chores)])
            self.done += 1
            gc.collect()
            resident.append(_resident())
            self.stop.wait(min(1.0, seconds / 50))
        self.stop.set()
        for worker in workers:
            worker.join()
        quarter = len(resident) // 4
        if quarter and seconds >= 60:
            growth = statistics.median(resident[-quarter:]) - statistics.median(resident[quarter : 2 * quarter])
            print(f"{resident[-1] >> 20} MiB, {growth / 1024:+.0f} KiB between the second and the last quarter")
            if growth > MOST_GROWTH:
                self.wrong.append(f"the process grew by {growth / (1 << 20):.1f} MiB")
        return self.wrong

    def _guarded(self, work: Callable, *arguments: int) -> None:
        try:
            with use_backend(self.backend):
                work(*arguments)
        except BaseException:
            self.wrong.append(traceback.format_exc())
            self.stop.set()
            self.started.abort()  # nobody waits for this one

    def _serve(self, number: int) -> None:
        draw = random.Random(number)
        self.started.wait()
        with torch.inference_mode():
            self.first[number] = [model(x) for model, x in self.models]  # cold, all at once
        self.started.wait()
        if number == 0:
            self.expected = self._alone()
        self.started.wait()
        self._compare(self.first[number])
        while not self.stop.is_set():
            which = draw.randrange(len(self.models))
            (model, x), expected = self.models[which], self.expected[which]
            first = draw.randrange(BATCH)
            last = draw.randint(first + 1, BATCH)
            with torch.inference_mode() if draw.random() < 0.5 else torch.no_grad():
                y = model(x[first:last].clone())
            same = torch.equal(y, expected[first:last]) if which == 0 else _is_close(y, expected[first:last])
            assert same, f"a request of {last - first} got another result in thread {number}"
            self.served[number] += 1

    def _alone(self, models: Sequence[nn.Module] | None = None) -> list[Tensor]:
        own = [model for model, _ in self.models] if models is None else models
        with torch.no_grad():
            return [model(x) for model, (_, x) in zip(own, self.models, strict=True)]

    def _compare(self, results: Sequence[Tensor]) -> None:
        same = [torch.equal(a, b) for a, b in zip(results, self.expected, strict=True)]
        assert all(same), "another result"

    def _ready(self) -> None:
        while not self.expected and not self.stop.is_set():
            time.sleep(0.01)

    def _copy(self) -> None:
        self._ready()
        self._compare(self._alone([copy.deepcopy(model) for model, _ in self.models]))
        self._compare(self._alone([pickle.loads(pickle.dumps(model)) for model, _ in self.models]))

    def _train(self) -> None:
        """A copy; copied and pickled between its steps, it goes on as it would have."""
        self._ready()
        for model, x in self.models:
            model = copy.deepcopy(model).train()
            x = x.clone()
            ways = [model]
            for _ in range(3):
                ways = [ways[0], copy.deepcopy(ways[0]), pickle.loads(pickle.dumps(ways[0]))]
                for way in ways:
                    way.zero_grad()
                    way(x).square().mean().backward()
                    torch.optim.SGD(way.parameters(), lr=1e-2).step()
            states = [[*way.state_dict().values()] for way in ways]
            assert all(torch.equal(a, b) for state in states[1:] for a, b in zip(states[0], state, strict=True))
        self._compare(self._alone())

    def _freeze(self) -> None:
        self._ready()
        model = copy.deepcopy(self.models[1][0])
        freeze_(model)
        with torch.no_grad():
            frozen = [model(self.models[1][1]) for _ in range(2)]
        unfreeze_(model)
        assert all(torch.equal(y, self.expected[1]) for y in frozen), "frozen, another result"

    def _fork(self) -> None:
        self._ready()
        if self.device == "cuda":
            return  # CUDA does not go along
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, that there are threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                self._compare(self._alone())
                status = 0
            finally:
                os._exit(status)
        deadline = time.monotonic() + CHILD_LIMIT
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, "a forked process got another result"
                return
            time.sleep(0.01)
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise AssertionError("a forked process hangs")

    def _spawn(self) -> None:
        self._ready()
        if self.device == "cuda" or self.until - time.monotonic() < 10:
            return
        process = multiprocessing.get_context("spawn").Process(
            target=_spawned, args=(self.backend, [(model, x) for model, x in self.models], self.expected)
        )
        process.start()
        process.join(CHILD_LIMIT)
        assert process.exitcode == 0, f"a spawned process ended with {process.exitcode}"


def _spawned(backend: str, given: list[tuple[nn.Module, Tensor]], expected: list[Tensor]) -> None:
    with use_backend(backend), torch.no_grad():
        assert all(torch.equal(model(x), y) for (model, x), y in zip(given, expected, strict=True))


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """PyTorch's products promise nothing across batches."""
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def _resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python tools/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=4, help="that serve (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="default: %(default)s")
    given = parser.parse_args(arguments)
    soak = Soak(given.backend, "cuda" if on_gpu else "cpu", given.threads)
    wrong = soak.run(60 * given.minutes)
    print(f"{sum(soak.served)} requests by {given.threads} threads, {soak.done} rounds beside them")
    sys.stderr.writelines(wrong)
    return 1 if wrong or not all(soak.served) else 0


if __name__ == "__main__":
    sys.exit(main())
