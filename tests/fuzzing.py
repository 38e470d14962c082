"""What hypothesis draws for ``make fuzz`` and test_properties: calls of the functional API and models for ``fuse_``,
over all that they take; and what each has to meet: plain PyTorch, by the accuracy rule.

What is drawn is a value whose repr makes it again: a failure is kept as it was printed.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import plain
import torch
from accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, assert_accurate, assert_all_accurate, reference
from evaluation import Results, evaluate, wide
from hypothesis import strategies as st
from operations import OPERATIONS, make
from parity import run
from torch import Tensor, nn

import mixer_kernels.functional as F
from mixer_kernels import FusedMixerBlock, freeze_, fuse_, unfreeze_, use_backend
from mixer_kernels.backends.cpu import library
from mixer_kernels.functional.checks import GATES, NORMS
from mixer_kernels.tuning.target import KNOWN_TARGETS, assume_target

OF_SERIES = tuple(name for name in OPERATIONS if name.startswith("gated_mix"))
OF_MIXER = ("token_mixing", "channel_mixing", "mixer_block")
BACKENDS = {  # and what each has kernels for
    "torch": tuple(OPERATIONS),
    "triton": tuple(OPERATIONS),
    "cuda": OF_MIXER,
    "cpu": (*OF_SERIES, "token_mixing", "mixer_block"),
}
LAYOUTS = ("contiguous", "transposed", "reversed", "slice", "steps", "offset", "expanded")
FLOAT32, HALVES = torch.float32, (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One call of a function, forward and backward."""

    operation: str  # of OPERATIONS
    backend: str
    batch: int
    sizes: dict[str, int]  # of OPERATIONS' letters
    dtype: torch.dtype  # of x
    options: dict[str, Any] = {}
    autocast: torch.dtype | None = None  # with parameters in float32
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # of x, of its result's gradient, of the parameters
    absent: tuple[str, ...] = ()  # parameters that are None
    frozen: tuple[str, ...] = ()  # parameters, or x, that want no gradient
    mean: float = 0.0  # of the rows of x, in standard deviations
    target: str = "sm_80"  # whose tiles triton and cuda run
    isa: str = ""  # the instruction set of cpu
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------- strategies

EXTENTS = st.one_of(st.integers(1, 20), st.integers(1, 70), st.sampled_from((15, 16, 17, 31, 32, 33, 63, 64, 65, 96)))
LARGE = st.sampled_from((127, 128, 129, 196, 208, 209, 256, 257, 300))


@st.composite
def calls(draw: Callable, backend: str) -> Call:
    operation = draw(st.sampled_from(BACKENDS[backend]))
    function, x_shape, parameters, fixed = OPERATIONS[operation]
    sizes = _sizes(draw, operation)
    dtypes = HALVES if backend == "cuda" else (FLOAT32, *HALVES, *[torch.float64] * (backend == "torch"))
    autocast = draw(st.sampled_from((None, None, None, *HALVES))) if backend != "torch" else None
    dtype = draw(st.sampled_from(dtypes if autocast is None else (FLOAT32, autocast)))
    trains = not (backend == "cpu" and operation in OF_MIXER) and draw(st.booleans())
    names = [each.partition(":")[0] for each in parameters.split()]
    optional = [name for name in names if name[0] != "w" or "gate" in name and operation != "gated_channel_mixing"]
    absent = draw(st.sets(st.sampled_from(optional)) if draw(st.booleans()) else st.just(set()))
    absent |= {name.replace("w_", "b_") for name in absent if name.startswith("w_gate")}
    frozen = {"x", *names}
    if trains:
        frozen = draw(st.sets(st.sampled_from(("x", *names)))) if draw(st.booleans()) else set()
    return Call(
        operation, backend, draw(st.integers(1, 3)), sizes, dtype, _options(draw, operation, backend), autocast,
        tuple(draw(st.sampled_from(LAYOUTS)) if draw(st.booleans()) else "contiguous" for _ in range(3)),
        tuple(sorted(absent)), tuple(sorted(frozen)), draw(st.sampled_from((0.0, 0.0, 1.0, 10.0))),
        draw(st.sampled_from([n for n, t in KNOWN_TARGETS.items() if backend == "triton" or t.is_nvidia])),
        draw(st.sampled_from(_instruction_sets())) if backend == "cpu" else "", draw(st.integers(0, 2**16)),
    )  # fmt: skip


def _instruction_sets() -> list[str]:
    return [isa for isa in library.loaded().built if library.loaded().runs_here(isa)]


def _sizes(draw: Callable, operation: str) -> dict[str, int]:
    if operation in OF_SERIES:
        sizes = {letter: draw(EXTENTS) for letter in "PFQG"}
        return sizes | {"N": draw(st.integers(1, 9)), "O": draw(st.integers(1, 20))}
    sizes = {letter: draw(EXTENTS) for letter in "SCDM"}
    if draw(st.integers(0, 9)) == 0:
        sizes["S"] = draw(LARGE)
    odd = operation not in ("mixer_block swiglu", "spatial_gating", "gated_channel_mixing") and draw(st.booleans())
    return sizes | {"2D": 2 * sizes["D"], "H": 2 * sizes["M"] - odd}


def _options(draw: Callable, operation: str, backend: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if operation in ("token_linear",):
        return options
    eps = st.sampled_from((1e-6, 1e-5, 1e-2))
    pairs = operation.startswith("mixer_block") or operation == "gated_mixer_layer"
    options["eps"] = draw(st.tuples(eps, eps)) if pairs and draw(st.booleans()) else draw(eps)
    if operation == "gated_channel_mixing":
        options["gate_eps"] = draw(eps)
    if operation in OF_MIXER and backend in ("torch", "triton"):
        options["activation"] = draw(st.sampled_from(("gelu", "gelu", "relu", "silu")))
    if options.get("activation", "gelu") == "gelu" and operation not in ("spatial_gating", "mixer_block swiglu"):
        options["approximate"] = draw(st.sampled_from(F.APPROXIMATIONS))
    if operation in OF_SERIES:
        options |= {"gate": draw(st.sampled_from(GATES)), "norm": draw(st.sampled_from(NORMS))}
    if not (operation.startswith("gated_mixing ") or operation in ("token_mixing", "spatial_gating")):
        options["memory"] = draw(st.sampled_from(F.MEMORY_MODES))
    return options


# -------------------------------------------------------------------------------------------------------------- checks


def check(case: Call) -> None:
    """Output and gradients by the accuracy rule; nothing that was given is written to."""
    torch.manual_seed(case.seed)
    function, _, _, fixed = OPERATIONS[case.operation]
    drawn = make(case.operation, case.sizes, case.batch, FLOAT32 if case.autocast else case.dtype, "cpu")
    parameters = {
        name: None if name in case.absent else laid_out(t, case.layouts[2]) for name, t in drawn.parameters.items()
    }
    dtype = torch.promote_types(case.dtype, case.autocast or case.dtype)
    x = laid_out((drawn.x + case.mean).to(case.dtype), case.layouts[0])
    dy = laid_out(drawn.dy.to(dtype), case.layouts[1])
    given = {name: t for name, t in {"x": x, **parameters, "dy": dy}.items() if t is not None}
    before = {name: t.clone() for name, t in given.items()}
    options = fixed | case.options
    of_plain = {name: value for name, value in options.items() if name != "memory"}

    def results(run: Callable, x: Tensor, parameters: dict[str, Tensor | None], dy: Tensor, **options: Any) -> Results:
        products = case.autocast if x.dtype is not torch.float64 else None
        with torch.autocast("cpu", products or torch.bfloat16, enabled=products is not None):
            return evaluate(run, x, parameters, dy, case.frozen, **options)

    reference_run = getattr(plain, function.__name__)
    with _as_for(case):
        actual = results(function, x, parameters, dy, **options, backend=case.backend)
    if case.autocast:  # which PyTorch's own functions follow each in its way
        eager = results(function, x, parameters, dy, **of_plain, backend="torch")
    else:
        eager = results(reference_run, x, parameters, dy, **of_plain)
    if dtype is torch.float64:
        torch.testing.assert_close(actual, eager, rtol=1e-11, atol=1e-11)
    else:
        exact = reference(
            lambda: results(reference_run, x.double(), wide(parameters), dy.double(), **of_plain), dtype, case.autocast
        )
        assert_all_accurate(actual, eager, exact)
    assert actual["output"].is_contiguous() or case.backend == "torch"
    for name, t in given.items():
        assert torch.equal(t, before[name]), f"{name} was written to"


@contextlib.contextmanager
def _as_for(case: Call) -> Iterator[None]:
    """The tiles and the instruction set of the call; fresh memory is NaN."""
    with contextlib.ExitStack() as stack:
        if case.backend in ("triton", "cuda"):
            import strict_interpreter

            stack.enter_context(strict_interpreter.poisoned_memory())
            stack.enter_context(assume_target(KNOWN_TARGETS[case.target]))
        if case.isa:
            before = os.environ.get("MIXER_KERNELS_CPU_ISA")
            os.environ["MIXER_KERNELS_CPU_ISA"] = case.isa
            stack.callback(_set_environment, "MIXER_KERNELS_CPU_ISA", before)
        yield


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` in memory as ``layout`` says; what lies between its elements is NaN."""
    if layout == "contiguous" or (layout in ("transposed", "reversed") and t.dim() < 2):
        return t
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "reversed":  # axes
        order = [*range(t.dim())][::-1]
        return t.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.dim() > 2 else t
    if layout == "offset":
        flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    step, gap = (2, 0) if layout == "steps" else (1, 3)
    memory = torch.full((*t.shape[:-1], t.shape[-1] * step + 2 * gap), torch.nan, dtype=t.dtype)
    view = memory[..., gap : gap + t.shape[-1] * step : step]
    return view.copy_(t)


# -------------------------------------------------------------------------------------------------------------- models


class Model(NamedTuple):
    """A small model, eager and fused, in evaluation mode, forward and backward."""

    kind: str  # of MODELS
    backend: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    width: int = 24
    memory: str = "fast"
    frozen: bool = False  # by freeze_, in inference
    trained: int = 1  # of so many parameters the first one wants a gradient
    seed: int = 0


@st.composite
def models(draw: Callable, backend: str) -> Model:
    kind = draw(st.sampled_from([kind for kind, (_, backends) in MODELS.items() if backend in backends]))
    is_wide = backend != "cuda" or draw(st.booleans())  # cuda has no products in float32
    dtype = FLOAT32 if kind in SERIES or is_wide and draw(st.booleans()) else draw(st.sampled_from(HALVES))
    autocast = draw(st.sampled_from((None, *HALVES))) if dtype is FLOAT32 else None
    if backend == "cuda" and dtype is FLOAT32:
        autocast = autocast or torch.bfloat16
    return Model(
        kind, backend, dtype, autocast, draw(st.sampled_from((8, 20, 24, 40))), draw(st.sampled_from(F.MEMORY_MODES)),
        draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(0, 2**16)),
    )  # fmt: skip


def check_model(case: Model) -> None:
    """Output, gradients and inference by the accuracy rule; frozen, inference to the last bit."""
    torch.manual_seed(case.seed)
    model, x = MODELS[case.kind][0](case.width)
    model.to(case.dtype).eval()
    x = x.to(case.dtype)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % case.trained == 0)

    def on(backend: str, model: nn.Module, x: Tensor, run: Callable) -> Any:
        products = case.autocast if x.dtype is not torch.float64 else None
        with torch.autocast("cpu", products or torch.bfloat16, enabled=products is not None), use_backend(backend):
            return run(model, x, _output)

    eager, twin = on("torch", model, x, run), copy.deepcopy(model).double()
    exact = reference(lambda: on("torch", twin, x.double(), run), case.dtype, case.autocast)
    if not isinstance(model, FusedMixerBlock):
        assert not fuse_(model, backend=case.backend, memory=case.memory).left
    fused = on(case.backend, model, x, run)
    assert_accurate(fused[0], eager[0], exact[0], FORWARD_FACTOR)
    for i, gradients in enumerate(zip(fused[1:], eager[1:], exact[1:], strict=True)):
        assert_accurate(*gradients, GRADIENT_FACTOR, f"gradient {i}")
    inferred = on(case.backend, model, x, _infer)
    assert_accurate(inferred, eager[0], exact[0], FORWARD_FACTOR, "inference")
    if case.frozen:
        on(case.backend, model, x, lambda model, *_: freeze_(model))
        assert torch.equal(on(case.backend, model, x, _infer), inferred)
        assert torch.equal(on(case.backend, model, x, _infer), inferred), "repeated"
        unfreeze_(model)


def _infer(model: nn.Module, x: Tensor, output: Callable) -> Tensor:
    with torch.no_grad():
        return output(model(x))


def _output(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y.prediction_outputs


# The modules that import libraries are imported where one of their models is drawn.


def _of_images(make: Callable[[int], nn.Module]) -> Callable[[int], tuple[nn.Module, Tensor]]:
    return lambda width: (make(width), torch.randn(2, 3, 16, 16))


def _timm(kind: str) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        from small_mixer import make_model
        from test_freeze import KINDS

        return make_model(embed_dim=width, **KINDS[kind])

    return build


def _lucidrains(width: int) -> nn.Module:
    from mlp_mixer_pytorch import MLPMixer

    return MLPMixer(image_size=16, channels=3, patch_size=8, dim=width, depth=1, num_classes=5)


def _of_series(make: str, **options: Any) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def build(width: int) -> tuple[nn.Module, Tensor]:
        import test_patch_time_series as series

        model = getattr(series, make)(**{"d_model": width, "num_layers": 1, "dropout": 0.0} | options)
        return model, series.series()

    return build


def _ours(width: int) -> tuple[nn.Module, Tensor]:
    block = FusedMixerBlock(width, 9)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(2, 9, width)


_GRIDS, _ALL = ("torch", "triton", "auto"), ("torch", "triton", "cuda", "auto")
SERIES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    f"{make} {options}": (_of_series(make, **options), ("torch", "triton", "cpu", "auto"))
    for make, options in (
        ("patchtsmixer", {}),
        ("patchtsmixer", {"mode": "mix_channel"}),
        ("patchtsmixer", {"gated_attn": False}),
        ("patchtsmixer", {"norm_mlp": "BatchNorm"}),
        ("tinytimemixer", {"gate_mode": "sigmoid"}),
        ("tinytimemixer", {"gate_mode": "group_sigmoid", "gate_groups": 3}),
    )
}
MODELS = {  # what builds one of a width, and its input; the backends that compute it
    "ours": (_ours, _ALL),
    "mixer": (_of_images(_timm("mixer")), _ALL),
    "gmixer": (_of_images(_timm("gmixer")), _GRIDS),
    "resmlp": (_of_images(_timm("resmlp")), _GRIDS),
    "gmlp": (_of_images(_timm("gmlp")), _GRIDS),
    "lucidrains": (_of_images(_lucidrains), _ALL),
    **SERIES,
}
