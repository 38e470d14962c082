"""Host time of one call: what Python, PyTorch's dispatcher and the launchers cost, with kernels that do nothing.

Everything runs on the CPU with one thread. For ``cuda`` and ``cpu`` objects without kernels stand for the compiled
modules; for ``triton`` launches are dropped, which in Triton cost host time of their own. Channels and hidden units are
cut down: calls and launches stay those of B/16 and of a PatchTSMixer layer. PyTorch's own operators can't be dropped,
so eager's time is that of tensors so small that what they compute does not count. On a GPU a device guard and the
look-up of the stream come on top.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..backends.cpu import library as cpu_library
from ..backends.cuda import library
from ..backends.rounding import round_up
from ..freeze import freeze_
from ..modules import FusedMixerBlock
from ..patch import fuse_
from ..shapes import SPECS

BACKENDS = ("cuda", "triton")  # of a block
LAYER_BACKENDS = ("cpu", "triton")
LAYER = {
    "context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2, "d_model": 8, "num_layers": 1,
    "gated_attn": True,
}  # fmt: skip
MODES = ("inference", "inference, frozen", "training")
# "x": times eager's; "us": microseconds.
GOALS = {("B/16 block", "cuda", MODES[0]): (0.4, "x"), ("B/16 block", "cuda", MODES[1]): (0.25, "x")} | {
    ("PatchTSMixer layer", name, MODES[0]): (15.0, "us") for name in LAYER_BACKENDS
}
# What other processes take does not count, where the clock of a thread is fine enough to tell.
_clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter
WARMUP_CALLS = 5
MIN_CALLS = 10
IN_A_ROW = 12  # calls to a turn, as a model calls its blocks


@dataclass(frozen=True)
class HostRow:
    """One way to run one module; ``microseconds`` is None where ``reason`` says why not."""

    module: str
    provider: str
    mode: str
    microseconds: float | None = None
    of_eager: float | None = None
    of_linear: float | None = None
    reason: str | None = None

    @property
    def goal(self) -> str:
        goal, unit = GOALS.get((self.module, self.provider, self.mode), (None, ""))
        return "" if goal is None else f"<= {goal:g}{unit}"


class NoKernels:
    """In place of the compiled module: sizes as it gives them, and functions that do nothing."""

    on_host = True
    HIDDEN_MULTIPLE, K_MULTIPLE = 32, 64

    def padded_tokens(self, tokens: int) -> int:
        return round_up(tokens, 16) if tokens <= 256 else 0

    def weight_gradient_splits(self, *sizes: Any) -> int:
        return 1

    gelu_backward_tiles = norm_backward_parts = weight_gradient_splits

    def __getattr__(self, name: str) -> Callable:
        return _nothing


class NoCPUKernels:
    """The same of the CPU kernels."""

    built = ("none",)

    def runs_here(self, isa: str) -> bool:
        return True

    def pack_size(self, *call: Any) -> int:
        return 1

    def Forward(self, *call: Any) -> Callable:  # as the module names it
        return _nothing

    def __getattr__(self, name: str) -> Callable:
        return _nothing


class EagerBlock(nn.Module):
    """A ``FusedMixerBlock`` as timm computes it, without anything of this package in between."""

    def __init__(self, block: FusedMixerBlock) -> None:
        super().__init__()
        self.__dict__["_modules"] = block._modules

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


def host_rows(seconds: float) -> list[HostRow]:
    """All rows, measured in turns, about ``seconds`` for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _without_kernels() as reasons:
            return _block_rows(seconds, reasons) + _layer_rows(seconds, reasons)
    finally:
        torch.set_num_threads(threads)


def host_table(rows: Sequence[HostRow]) -> str:
    """A line a row, eager and one ``nn.Linear`` among them."""
    lines = [
        "host time of one call, kernels replaced by no-ops, one thread: medians of processor time",
        f"  {'module':19} {'provider':9}  {'mode':17} {'us':>8} {'/ eager':>8} {'/ Linear':>8}  goal",
    ]
    for row in rows:
        start = f"  {row.module:19} {row.provider:9}  {row.mode:17}"
        if row.reason is not None:
            lines.append(f"{start}  {row.reason}")
            continue
        eager = "" if row.of_eager is None else f"{row.of_eager:.2f}"
        lines.append(f"{start} {row.microseconds:8.1f} {eager:>8} {row.of_linear:8.1f}  {row.goal}".rstrip())
    return "\n".join(lines)


def _block_rows(seconds: float, reasons: dict[str, str]) -> list[HostRow]:
    tokens = SPECS["B/16"].block_shape().S
    eager, x = EagerBlock(FusedMixerBlock(8, 4)), torch.randn(1, 4, 8)
    fused = {name: FusedMixerBlock(16, tokens, dtype=torch.bfloat16) for name in BACKENDS}
    return _rows("B/16 block", eager, x, fused, torch.randn(1, tokens, 16, dtype=torch.bfloat16), seconds, reasons)


def _layer_rows(seconds: float, reasons: dict[str, str]) -> list[HostRow]:
    name = "PatchTSMixer layer"
    try:
        from transformers import PatchTSMixerConfig
        from transformers.models.patchtsmixer.modeling_patchtsmixer import PatchTSMixerLayer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build of torch
        reason = f"transformers does not import: {error}"
        return [HostRow(name, backend, mode, reason=reason) for mode in MODES for backend in LAYER_BACKENDS]
    config = PatchTSMixerConfig(**LAYER, dropout=0.0)
    config.num_patches = 4
    eager, x = PatchTSMixerLayer(config), torch.randn(1, 2, 4, 8)
    fused = {backend: copy.deepcopy(eager) for backend in LAYER_BACKENDS}  # a model keeps to one
    for layer in fused.values():
        fuse_(layer)
    return _rows(name, eager, x, fused, x, seconds, reasons)


def _rows(
    name: str,
    eager: nn.Module,
    eager_x: Tensor,
    fused: dict[str, nn.Module],
    x: Tensor,
    seconds: float,
    reasons: dict[str, str],
) -> list[HostRow]:
    rows: list[HostRow] = []
    linear = nn.Linear(8, 8)
    for mode in MODES:
        step = _train if mode == "training" else _infer
        calls = {
            "nn.Linear": partial(_time, step, linear, torch.randn(4, 8)),
            "eager": partial(_time, step, eager, eager_x),
        }
        failed = dict(reasons)
        for module in (linear, eager, *fused.values()):
            module.train(mode == "training")
        for provider, module in fused.items():
            if provider in failed:
                continue
            if mode == "inference, frozen":
                module = copy.deepcopy(module)
                with backends.use_backend(provider):
                    report = freeze_(module)
                if not report.frozen:
                    failed[provider] = report.left[0].detail
                    continue
            calls[provider] = partial(_on, provider, step, module, x)
        measured = _measure(calls, seconds)
        one, own = measured["nn.Linear"], measured["eager"]
        for provider in ("nn.Linear", "eager", *fused):
            if provider not in measured:
                rows.append(HostRow(name, provider, mode, reason=failed[provider]))
                continue
            us = measured[provider]
            of_eager = us / own if provider in fused else None
            rows.append(HostRow(name, provider, mode, us, of_eager, us / one))
    return rows


def _on(provider: str, step: Callable[[nn.Module, Tensor], None], module: nn.Module, x: Tensor) -> float:
    with backends.use_backend(provider):  # chosen once, for many calls
        return _time(step, module, x)


def _time(step: Callable[[nn.Module, Tensor], None], module: nn.Module, x: Tensor) -> float:
    start = _clock()
    for _ in range(IN_A_ROW):
        step(module, x)
    return (_clock() - start) / IN_A_ROW


def _infer(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def _train(module: nn.Module, x: Tensor) -> None:
    y = module(x)
    torch.autograd.grad(y, list(module.parameters()), y.detach())


def _measure(calls: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Median microseconds of each, which returns the seconds of one call, in turns."""
    for call in calls.values():
        for _ in range(WARMUP_CALLS):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while len(taken["eager"]) < MIN_CALLS or time.perf_counter() < end:
        for name, call in calls.items():
            taken[name].append(call())
    return {name: statistics.median(times) * 1e6 for name, times in taken.items()}


@contextlib.contextmanager
def _without_kernels() -> Iterator[dict[str, str]]:
    """Kernels do nothing inside; of each backend that cannot be asked even so, why not."""
    installed = library._installed
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as Triton's kernels are imported: they then take CPU tensors
    reasons = {}
    with contextlib.ExitStack() as stack:
        stack.callback(library.install, installed)
        library.install(NoKernels())
        stack.enter_context(cpu_library.replaced_by(NoCPUKernels()))
        for name in dict.fromkeys(BACKENDS + LAYER_BACKENDS):
            dtype = torch.float32 if name in LAYER_BACKENDS else torch.bfloat16
            reason = backends.why_not(name, torch.device("cpu"), dtype)
            if reason is not None:
                reasons[name] = reason
        if "triton" not in reasons:
            from ..backends.triton.launch import intercept_launches

            stack.enter_context(intercept_launches(_nothing))
        yield reasons


def _nothing(*_: Any, **__: Any) -> None:
    """What every kernel is replaced by."""
