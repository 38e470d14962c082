"""One input of a block, our result on it, eager's, and float64's: the accuracy rule is that of tests/accuracy.py."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, Reference, assert_accurate, reference
from blocks import CHANNEL_NAMES, PRODUCTS, TOKEN_NAMES, Block, make_block, make_x
from torch import Tensor

import mixer_kernels.functional as F
from mixer_kernels.backends.arguments import Options, precision_of
from mixer_kernels.compile_check import TORCH_DTYPES
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS, Target, assume_target

from .memory import watched_memory
from .results import HOPPER
from .tasks import Settings, Task

LEVELS = {"token": F.token_mixing, "channel": F.channel_mixing, "block": F.mixer_block}
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Sample:
    """What to run: the fields of mixer_kernels.compile_check.Case, and what else an input may be."""

    shape: MixerShape
    dtype: str = "bf16"  # of the products: "bf16", "fp16", "fp32" (IEEE), "tf32"
    stream: str | None = None  # of x and the parameters, where it is not the products' (autocast)
    batch_size: int = 3
    layout: str = "contiguous"  # one of blocks.LAYOUTS
    approximate: str = "none"
    affine: bool = True
    bias: bool = True
    mean: float = 0.0  # of the rows, in standard deviations
    special: str = ""  # "NaN", "Inf": one such element; "constant rows": rows without variance
    backend: str = "triton"  # whose result is compared

    @property
    def stream_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.stream or self.dtype]

    @property
    def dtype_name(self) -> str:
        return f"{self.dtype} on {self.stream}" if self.stream_dtype is not TORCH_DTYPES[self.dtype] else self.dtype

    @property
    def shape_name(self) -> str:
        return f"{self.batch_size}x{self.shape.S}x{self.shape.C} ({self.shape.D_S}, {self.shape.D_C})"

    @property
    def taken_by_hopper(self) -> bool:
        """Whether the kernels of csrc/sm90 take it, those of token mixing aside for more than 256 tokens."""
        same = self.stream_dtype is TORCH_DTYPES[self.dtype]
        return same and self.shape.C % 8 == 0 and self.layout == "contiguous"

    def title(self) -> str:
        traits = [self.backend, self.layout if self.layout != "contiguous" else "", self.special]
        traits += [self.dtype_name, self.shape_name]
        traits += ["tanh" if self.approximate == "tanh" else "", "" if self.affine else "no affine"]
        traits += ["" if self.bias else "no bias", f"mean {self.mean:g}" if self.mean else ""]
        return " ".join(filter(None, traits))

    def task(self, level: str, run: Any, prefix: str = "", config: str = "") -> Task:
        return Task(f"{prefix}{level} {self.title()}", run, self.dtype_name, self.shape_name, config, self.backend)

    def make(self, device: str) -> tuple[Block, Tensor]:
        """The parameters, in the dtype of the stream, and ``x [B, S, C]``."""
        block = make_block(self.shape, self.stream_dtype, device, affine=self.affine, bias=self.bias)
        x = make_x(self.batch_size, self.shape, self.stream_dtype, device, self.layout, self.mean)
        if self.special == "constant rows":
            values = torch.tensor([0.1, 3.0, -7.3, 1e-3], device=device).to(x.dtype)
            x.copy_(values.repeat(-(-self.shape.S // 4))[None, : self.shape.S, None].expand(x.shape))
        elif self.special:
            x[-1, -1, -1] = float(self.special)
        return block, x


def samples_on(backend: str, samples: Iterable[Sample]) -> list[Sample]:
    """Those of ``samples`` whose products ``backend`` has, on that backend; of "cuda:sm90" those that do not leave it
    all to the kernels of "cuda"."""
    here = [sample for sample in samples if TORCH_DTYPES[sample.dtype] in PRODUCTS[backend]]
    if backend == HOPPER:
        here = [sample for sample in here if sample.taken_by_hopper]
    return [dataclasses.replace(sample, backend=backend) for sample in here]


def parameters_of(block: Block, level: str) -> list[Tensor | None]:
    return {"token": block.token, "channel": block.channel, "block": lambda: block.token() + block.channel()}[level]()


@contextlib.contextmanager
def float32_products(sample: Sample) -> Iterator[None]:
    """IEEE or TF32, as the sample wants them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if sample.dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def options_of(sample: Sample) -> Options:
    """As backends take them, under ``float32_products``."""
    dtype = TORCH_DTYPES[sample.dtype]
    return Options(dtype, EPS, approximate=sample.approximate, precision=precision_of(dtype))


@contextlib.contextmanager
def arithmetic(sample: Sample, device: str) -> Iterator[None]:
    """``float32_products``, no gradients, and autocast where the products are in another dtype than the stream."""
    mixed = TORCH_DTYPES[sample.dtype] is not sample.stream_dtype
    with float32_products(sample), torch.no_grad(), torch.autocast(device, TORCH_DTYPES[sample.dtype], enabled=mixed):
        yield


def ours(sample: Sample, level: str, block: Block, x: Tensor) -> Tensor:
    """The result of the sample's backend."""
    options = {"eps": EPS, "approximate": sample.approximate, "backend": sample.backend}
    with arithmetic(sample, x.device.type):
        return LEVELS[level](x, *parameters_of(block, level), **options)


def eager_and_exact(
    sample: Sample, level: str, block: Block, x: Tensor, minus: Tensor | float = 0.0
) -> tuple[Tensor, Reference]:
    """The torch backend's results, less ``minus``, in the sample's dtype and in float64."""
    options = {"eps": EPS, "approximate": sample.approximate, "backend": "torch"}
    with arithmetic(sample, x.device.type):
        eager = LEVELS[level](x, *parameters_of(block, level), **options)
    parameters = parameters_of(block.to(torch.float64), level)
    with torch.no_grad():
        exact = judged(sample, lambda: LEVELS[level](x.double(), *parameters, **options) - minus)
    return eager - minus, exact


def judged(sample: Sample, compute: Callable[[], Any]) -> Any:
    """``compute``, in float64, as what the sample's results are judged by."""
    return reference(compute, sample.stream_dtype, TORCH_DTYPES[sample.dtype])


def compare(
    values: dict[str, Any],
    actual: Tensor,
    eager: Tensor,
    exact: Reference,
    what: str = "output",
    factor: float = FORWARD_FACTOR,
) -> None:
    """Note the largest error and its ratio to eager's, the worst of the task so far; then the accuracy rule."""
    finite = exact.value.isfinite() & eager.isfinite() & actual.isfinite()
    if bool(finite.any()):
        error, theirs = ((t.double() - exact.value)[finite].abs().max().item() for t in (actual, eager))
        values["max_err"] = max(error, values.get("max_err", 0.0))
        if theirs:
            values["err_vs_eager"] = max(error / theirs, values.get("err_vs_eager", 0.0))
    assert_accurate(actual, eager, exact, factor, what=what)


def gradients_of(
    sample: Sample, level: str, block: Block, x: Tensor, dy: Tensor, backend: str | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output and the gradients of ``x`` and of every parameter, by name, through autograd."""
    backend = backend or sample.backend
    names = {"token": TOKEN_NAMES, "channel": CHANNEL_NAMES, "block": (*TOKEN_NAMES, *CHANNEL_NAMES)}[level]
    x = x.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in parameters_of(block, level)]
    exact = x.dtype is torch.float64
    context = torch.enable_grad() if exact else arithmetic(sample, x.device.type)
    with context, torch.enable_grad():
        y = LEVELS[level](x, *parameters, eps=EPS, approximate=sample.approximate, backend=backend, **options)
    leaves = {"x": x, **{name: p for name, p in zip(names, parameters, strict=True) if p is not None}}
    with float32_products(sample):
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def compare_gradients(
    values: dict[str, Any], sample: Sample, level: str, block: Block, x: Tensor, dy: Tensor, actual: dict[str, Tensor]
) -> None:
    """``actual`` against eager's and float64's gradients, at most three times eager's own error."""
    eager = gradients_of(sample, level, block, x, dy, "torch")
    wide = block.to(torch.float64)
    exact = judged(sample, lambda: gradients_of(sample, level, wide, x.double(), dy.double(), "torch"))
    for name in actual:
        what, factor = ("output", FORWARD_FACTOR) if name == "output" else (f"gradient of {name}", GRADIENT_FACTOR)
        compare(values, actual[name], eager[name], exact[name], what, factor)


def run_watched(
    settings: Settings, case: str, sample: Sample, level: str, block: Block, x: Tensor, target: Target | None = None
) -> Tensor:
    """Our result in watched memory, on the tiles of ``target`` (default: the device's), ``--plant`` applied."""
    with on_target(settings, target), watched_memory() as watch:
        actual = ours(sample, level, block, x)
        if settings.planted("redzone", case):
            torch.as_strided(actual, (1,), (1,), actual.storage_offset() + actual.numel()).zero_()
    watch.check(actual)
    return planted(settings, case, actual)


def planted(settings: Settings, case: str, result: Tensor) -> Tensor:
    """``result``, with one element off by a random amount if ``--plant error`` names the case."""
    if settings.planted("error", case):
        result[-1, -1, -1] += 1 + torch.rand((), device=result.device)
    return result


@contextlib.contextmanager
def on_target(settings: Settings, target: Target | None = None) -> Iterator[None]:
    """Choose tiles as on ``target``; where none is given, as the GPU does for itself, or without one as on sm_90."""
    if target is None and settings.rehearse:
        target = KNOWN_TARGETS["sm_90"]
    with contextlib.nullcontext() if target is None else assume_target(target):
        yield
