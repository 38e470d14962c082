"""``backend="cpu"`` where products are bfloat16's: by the accuracy rule, on vectors and on the tiles of AMX, those also
where plain C++ (tests/cpu_kernels/bf16.h) stands in for their instructions."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import test_cpu_backend as of_series
import test_relatives_patchtsmixer as of_mixer
import test_relatives_patchtsmixer_layer as of_layer
import torch
from accuracy import assert_accurate, reference
from blocks import LAYOUTS, make_block, make_x
from cuda_on_host import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import COMPILER, SIZES, TILES, has_avx2, on_host
from test_cpu_mixer import LARGE, token_half
from test_kernels import SHAPES, exact_half
from test_relatives_patchtsmixer import MIXERS, each_mixer, make
from test_relatives_patchtsmixer_layer import make_layer

import mixer_kernels.functional as F
from mixer_kernels import FusedMixerBlock, backends, freeze_
from mixer_kernels.backends.cpu import library

BF16, CPU = torch.bfloat16, torch.device("cpu")
IN_CPP = "tiles in C++"


@functools.cache
def module_in_cpp(folder: Path):
    """``mixer_kernels._cpu`` whose one instruction set has tiles."""
    import pybind11

    csrc = on_host(folder)
    sources = [csrc / name for name in ("bind.cpp", "run.cpp", "kernels.cpp", "tsmixer.cpp")]
    flags = [
        "-O1", "-w", "-DMIXER_KERNELS_ISA=baseline", "-DMIXER_KERNELS_LANES=16", *TILES,
        *(SIZES[16] if has_avx2() else []), f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
    ]  # fmt: skip
    path = build.build(sources, flags, ["-shared"], "_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))
    loader = importlib.machinery.ExtensionFileLoader("mixer_kernels_on_host._cpu", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture(params=(*library.WITH_BF16, IN_CPP), autouse=True)
def isa(request, monkeypatch, tmp_path_factory):
    """Every test on every instruction set that multiplies bfloat16."""
    if request.param == IN_CPP:
        if COMPILER is None or shutil.which(build.compiler()) is None:
            pytest.skip("waits for a machine with a C++ compiler")
        monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
        with library.replaced_by(module_in_cpp(tmp_path_factory.getbasetemp())):
            yield request.param
        return
    try:
        module = library.loaded()
    except ModuleNotFoundError as error:
        pytest.skip(f"waits for a build with the CPU kernels: {library.why_not_loaded(error)}")
    if request.param not in module.built or not module.runs_here(request.param):
        pytest.skip(f"waits for a CPU with {request.param}")
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    yield request.param


def assert_matches_eager(evaluate, x, parameters, **options):
    """``evaluate(x, parameters, backend)["output"]``, of a model in bfloat16 and of one under autocast."""
    for autocast in (False, True):
        dtype = torch.float32 if autocast else BF16
        own_x, own = x.to(dtype), {k: None if t is None else t.to(dtype) for k, t in parameters.items()}
        with torch.autocast("cpu", BF16, enabled=autocast):
            actual, eager = (evaluate(own_x, own, name, **options)["output"] for name in ("cpu", "torch"))
        wide = {k: None if t is None else t.double() for k, t in own.items()}

        def exact(own_x=own_x, wide=wide):
            return evaluate(own_x.double(), wide, "torch", **options)["output"]

        assert_accurate(actual, eager, reference(exact, dtype, BF16))
        assert autocast or torch.equal(actual.isnan(), eager.isnan())


@pytest.mark.parametrize("shape", [shape for name, shape in of_series.SHAPES.items() if name != "many tiles"], ids=str)
def test_series_match_eager(shape):
    for mixer in MIXERS:
        assert_matches_eager(functools.partial(of_mixer.evaluate, mixer), *make(mixer, shape, torch.float32, CPU))
    assert_matches_eager(of_layer.evaluate, *make_layer(shape, torch.float32, CPU))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_token_half_matches_eager(shape):
    block, x = make_block(shape, BF16, CPU), make_x(2, shape, BF16, CPU)
    for approximate in F.APPROXIMATIONS:
        actual, eager = (token_half(block, x, name, approximate=approximate) for name in ("cpu", "torch"))
        assert_accurate(actual, eager, exact_half(F.token_mixing, x, block.token(), approximate=approximate))


@pytest.mark.parametrize("options", [{"gate": "sigmoid"}, {"norm": "affine"}, {"dropout_p": 0.0}], ids=str)
@each_mixer
def test_forms_of_a_mixer(mixer, options):
    x, parameters = make(mixer, (3, 7, 13, 20), torch.float32, CPU)
    for absent in ((), ("w_gate", "b_gate"), ("b1", "b2", "b_gate"), ("gamma", "beta")):
        given = parameters | dict.fromkeys(absent)
        assert_matches_eager(functools.partial(of_mixer.evaluate, mixer), x, given, **options)


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_gradients_match_eager(memory):
    """A backward pass is float32, of what a forward pass has rounded."""
    of_series.assert_layer_matches_eager(*make_layer((3, 7, 13, 20), BF16, CPU), memory=memory)


def test_dropout_has_the_masks_of_float32():
    x, parameters = make_layer((2, 3, 10, 20), torch.float32, CPU)
    results = []
    for products in (BF16, torch.float32):
        torch.manual_seed(11)
        with torch.autocast("cpu", BF16, enabled=products is BF16):
            results.append(of_layer.evaluate(x, parameters, "cpu", dropout_p=0.3)["output"])
    difference = (results[0] - results[1]).abs().max()
    assert 0 < difference < 0.05, "another mask would change whole elements"


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70)),
    factor=st.integers(1, 3),
    mixer=st.sampled_from(sorted(MIXERS)),
    seed=st.integers(0, 2**16),
)
def test_any_size(shape, factor, mixer, seed, isa):
    torch.manual_seed(seed)
    x, parameters = make(mixer, shape, torch.float32, CPU, factor)
    assert_matches_eager(functools.partial(of_mixer.evaluate, mixer), x, parameters)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    block, x = make_block(LARGE, BF16, CPU), make_x(3, LARGE, BF16, CPU, layout)
    contiguous = x.clone(memory_format=torch.contiguous_format)
    assert torch.equal(token_half(block, x, "cpu"), token_half(block, contiguous, "cpu"))


def test_products_are_rounded():
    """Else another instruction set ran, and the rest of this file shows nothing."""
    block, x = make_block(LARGE, torch.float32, CPU), make_x(1, LARGE, torch.float32, CPU)
    near, one = (
        {**block.parameters, "gamma1": torch.zeros(72), "beta1": torch.full((72,), value)} for value in (1 + 2**-9, 1.0)
    )
    with torch.autocast("cpu", BF16):
        rounded = [token_half(dataclasses.replace(block, parameters=p), x, "cpu") for p in (near, one)]
    assert torch.equal(*rounded), "1 + 2^-9 is 1 in bfloat16"
    exact = [token_half(dataclasses.replace(block, parameters=p), x, "cpu") for p in (near, one)]
    assert not torch.equal(*exact), "float32 stays float32"


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 3e38, 1e-42))
@each_mixer
def test_what_is_not_finite_is_so_where_it_is_in_eager(mixer, value):
    x, parameters = make(mixer, (2, 5, 6, 20), BF16, CPU)
    x[1, 2, 3, 4] = value
    actual, eager = (of_mixer.evaluate(mixer, x, parameters, backend)["output"] for backend in ("cpu", "torch"))
    assert torch.equal(actual.isfinite(), eager.isfinite())


def test_gelu_of_all_magnitudes():
    """Through a mixer of one element whose weights are 1, from float32 to float32: y = GELU(b1), rounded."""
    z = torch.cat([torch.linspace(-12, 12, 1984), torch.logspace(-30, 38, 64), -torch.logspace(-30, 38, 64)]).to(BF16)
    parts = []
    for part in z.float().split(64):
        x, zero, one = torch.zeros(1, 1, len(part), 1), torch.zeros(len(part), len(part)), torch.eye(len(part))
        with torch.autocast("cpu", BF16):
            y = F.gated_mixing(x, None, None, zero, part.clone(), one, None, None, None, axis=-2, backend="cpu")
        parts.append(y.flatten())
    exact = torch.nn.functional.gelu(z.double())
    # Half a unit in the last place, and a tenth more.
    torch.testing.assert_close(torch.cat(parts).double(), exact, rtol=0.55 * 2**-7, atol=1e-8)


def test_results_depend_on_neither_threads_nor_batch_nor_packs():
    x, parameters = make_layer((40, 7, 33, 24), BF16, CPU)
    y = of_layer.evaluate(x, parameters, "cpu")["output"]
    try:
        for threads in (2, 8):
            torch.set_num_threads(threads)
            assert torch.equal(of_layer.evaluate(x, parameters, "cpu")["output"], y)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(of_layer.evaluate(x[17, 3], parameters, "cpu")["output"], y[17, 3])
    block, x = FusedMixerBlock(72, 49, (1 / 3, 4 / 3)).eval().requires_grad_(False), make_x(3, LARGE, BF16, CPU)
    for dtype in (BF16, torch.float32):
        block, x = block.to(dtype), x.to(dtype)
        with backends.use_backend("cpu"), torch.no_grad(), torch.autocast("cpu", BF16, enabled=dtype is not BF16):
            expected = block(x)
            assert "cpu: " in str(freeze_(block))
            assert torch.equal(block(x), expected)
            block.unfreeze()


def test_auto_takes_it_in_inference(isa):
    block, x = FusedMixerBlock(72, 49, (1 / 3, 4 / 3), dtype=BF16).eval(), make_x(2, LARGE, BF16, CPU)
    results = {}
    for name in ("auto", "cpu", "torch"):
        with backends.use_backend(name), torch.no_grad():
            results[name] = block(x)
    assert not torch.equal(results["cpu"], results["torch"]), "the results cannot tell who made them"
    taken = "torch" if isa == IN_CPP else "cpu"  # which says that it is "baseline"
    assert torch.equal(results["auto"], results[taken])
    assert torch.equal(block(x.requires_grad_()), results["torch"]), "in training"
