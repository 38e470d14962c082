"""``backend="cpu"``: mixers of time series by the accuracy rule, on every instruction set that this machine has."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import evaluation
import pytest
import test_relatives_patchtsmixer as of_mixer
import test_relatives_patchtsmixer_layer as of_layer
import torch
from accuracy import assert_all_accurate, reference
from test_relatives_patchtsmixer import LAYOUTS, MIXERS, each_mixer, make
from test_relatives_patchtsmixer_layer import make_layer

import mixer_kernels.functional as F
from mixer_kernels import backends, info, ops
from mixer_kernels.backends.arguments import Options
from mixer_kernels.backends.cpu import library

CPU = torch.device("cpu")
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def isa(request, monkeypatch):
    """Every test on every instruction set."""
    try:
        module = library.loaded()
    except ModuleNotFoundError as error:
        pytest.skip(f"waits for a build with the CPU kernels: {library.why_not_loaded(error)}")
    if request.param not in module.built or not module.runs_here(request.param):
        pytest.skip(f"waits for a CPU with {request.param}")
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    assert library.instruction_set() == request.param
    return request.param


def assert_mixer_matches_eager(mixer, x, parameters, **options):
    evaluation.assert_matches_eager(partial(of_mixer.evaluate, mixer), x, parameters, "cpu", **options)


def assert_layer_matches_eager(x, parameters, **options):
    evaluation.assert_matches_eager(of_layer.evaluate, x, parameters, "cpu", **options)


SHAPES = {  # batch, channels, patches, features
    "small": (2, 3, 4, 8),
    "odd": (3, 7, 13, 20),
    "one": (1, 1, 1, 1),
    "vectors + 1": (1, 17, 33, 65),
    "PatchTSMixer": (4, 7, 64, 16),
    "TinyTimeMixer": (3, 7, 8, 192),
    "many tiles": (40, 7, 33, 24),
    "long": (1, 2, 300, 12),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@each_shape
@each_mixer
def test_mixer_matches_eager(mixer, shape):
    assert_mixer_matches_eager(mixer, *make(mixer, shape, torch.float32, CPU))


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
@each_shape
def test_layer_matches_eager(shape, memory):
    """Each mixer has an eps of its own."""
    assert_layer_matches_eager(*make_layer(shape, torch.float32, CPU), memory=memory, eps=(1e-5, 0.1))


@pytest.mark.parametrize("bias", [1.0, 300.0])
@each_mixer
def test_sigmoid_gate(mixer, bias):
    x, parameters = make(mixer, (3, 7, 13, 20), torch.float32, "cpu")
    parameters["b_gate"] *= bias
    assert_mixer_matches_eager(mixer, x, parameters, gate="sigmoid")


@each_mixer
def test_affine_norm(mixer):
    x, parameters = make(mixer, (3, 7, 13, 20), torch.float32, "cpu")
    assert_mixer_matches_eager(mixer, x, parameters, norm="affine")
    assert_mixer_matches_eager(mixer, x, parameters | {"gamma": None, "b1": None}, norm="affine")


def test_layer_with_affine_norms():
    x, parameters = make_layer((3, 2, 13, 20), torch.float32, "cpu")
    assert_layer_matches_eager(x, parameters, norm="affine", memory="min")
    assert_layer_matches_eager(x, parameters, norm="affine", gate="sigmoid")


def test_layer_with_sigmoid_gates():
    x, parameters = make_layer((3, 2, 13, 20), torch.float32, "cpu")
    assert_layer_matches_eager(x, parameters, gate="sigmoid", memory="min")
    assert_layer_matches_eager(x, parameters, gate="sigmoid", dropout_p=0.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", ((3, 7, 13, 20), (12, 3, 33, 24)), ids=("one tile", "tiles"))
def test_16_bits(shape, dtype):
    for mixer in MIXERS:
        assert_mixer_matches_eager(mixer, *make(mixer, shape, dtype, CPU))
    for memory in F.MEMORY_MODES:
        assert_layer_matches_eager(*make_layer(shape, dtype, CPU), memory=memory)


@pytest.mark.parametrize("kept", (torch.float32, torch.bfloat16))
def test_autocast(kept):
    """x in the dtype in which a model has it between its layers, parameters in float32."""
    x, parameters = make_layer((3, 7, 13, 20), torch.float32, CPU)
    x = x.to(kept)
    dy, results = torch.randn(x.shape, dtype=kept), []
    with torch.autocast("cpu", torch.bfloat16):
        results = [of_layer.evaluate(x, parameters, backend, dy) for backend in ("cpu", "torch")]
    wide = {k: t.double() for k, t in parameters.items()}
    exact = reference(lambda: of_layer.evaluate(x.double(), wide, "torch", dy.double()), torch.bfloat16)
    assert_all_accurate(*results, exact)
    for name, expected in results[1].items():
        assert results[0][name].dtype == expected.dtype, name


def test_a_result_too_large_for_16_bits_is_infinite():
    x, parameters = make("patches", (1, 1, 6, 20), torch.float16, CPU)
    parameters = {k: 200 * t for k, t in parameters.items()}
    wide = {k: t.double() for k, t in parameters.items()}
    exact = of_mixer.evaluate("patches", x.double(), wide, "torch")["output"].half()
    assert exact.isinf().any() and exact.isfinite().any()
    assert torch.equal(of_mixer.evaluate("patches", x, parameters, "cpu")["output"].isinf(), exact.isinf())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@each_mixer
def test_layouts(mixer, layout, dtype):
    x, parameters = make(mixer, (2, 5, 6, 20), dtype, CPU)
    x = layout(x)
    before = x.clone()
    assert_mixer_matches_eager(mixer, x, parameters)
    assert torch.equal(x, before)


@pytest.mark.parametrize("absent", (("w_gate", "b_gate"), ("b_gate",), ("b1", "b2"), ("gamma", "beta"), ("gamma",)))
@each_mixer
def test_without_what_may_be_none(mixer, absent):
    x, parameters = make(mixer, (2, 5, 6, 20), torch.float32, CPU)
    assert_mixer_matches_eager(mixer, x, {**parameters, **dict.fromkeys(absent)}, approximate="tanh")


def test_parameters_of_any_strides():
    x, parameters = make("patches", (2, 5, 6, 20), torch.float32, CPU)
    parameters = {k: t.t().contiguous().t() if t.dim() == 2 else t for k, t in parameters.items()}
    assert_mixer_matches_eager("patches", x, parameters)


@pytest.mark.parametrize("mean", (0.0, 30.0))
@each_mixer
def test_rows_without_variance_and_far_from_zero(mixer, mean):
    x, parameters = make(mixer, (2, 5, 6, 40), torch.float32, CPU)
    x = x + mean
    x[0, 0] = 0.1
    assert_mixer_matches_eager(mixer, x, parameters)


def test_logits_far_apart():
    x, parameters = make("features", (2, 3, 4, 20), torch.float32, CPU)
    parameters["b_gate"] = 300.0 * torch.randn_like(parameters["b_gate"])
    assert_mixer_matches_eager("features", x, parameters)


def test_expanded_input():
    x, parameters = make("patches", (1, 1, 6, 20), torch.float32, CPU)
    expanded = x.expand(3, 5, 6, 20)
    y = of_mixer.evaluate("patches", expanded, parameters, "cpu")["output"]
    assert torch.equal(y, of_mixer.evaluate("patches", expanded.contiguous(), parameters, "cpu")["output"])


def test_threads_change_nothing():
    """Forward and backward, from one thread to more than there are tiles."""
    x, parameters = make_layer((40, 7, 33, 24), torch.float32, CPU)
    dy, results = torch.randn_like(x), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(of_layer.evaluate(x, parameters, "cpu", dy))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


def test_there_is_a_pool_of_threads():
    assert library.loaded().has_pool() == torch.backends.openmp.is_available()


def test_a_series_does_not_depend_on_its_batch():
    x, parameters = make_layer((40, 7, 33, 24), torch.float32, CPU)
    y = of_layer.evaluate(x, parameters, "cpu")["output"]
    assert torch.equal(of_layer.evaluate(x[17, 3], parameters, "cpu")["output"], y[17, 3])
    assert torch.equal(of_layer.evaluate(x[20:], parameters, "cpu")["output"], y[20:])


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf, 3e38, 1e-42, 0.0))
@pytest.mark.parametrize("approximate", F.APPROXIMATIONS)
@each_mixer
def test_what_is_not_finite_is_so_where_it_is_in_eager(mixer, approximate, value):
    x, parameters = make(mixer, (2, 5, 6, 20), torch.float32, CPU)
    x[1, 2, 3, 4] = value
    actual, eager = (
        of_mixer.evaluate(mixer, x, parameters, backend, approximate=approximate)["output"]
        for backend in ("cpu", "torch")
    )
    assert torch.equal(actual.isfinite(), eager.isfinite())
    torch.testing.assert_close(actual[eager.isfinite()], eager[eager.isfinite()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approximate", F.APPROXIMATIONS)
def test_gelu_over_all_magnitudes(approximate):
    """Through a mixer of one element whose weights are 1: y = GELU(b1)."""
    z = torch.cat([torch.linspace(-12, 12, 19968), torch.logspace(-44, 38, 2048), -torch.logspace(-44, 38, 2048)])
    z = z[z.isfinite()]
    parts = []
    for part in z.split(256):  # a hidden unit to each output
        x, zero, one = torch.zeros(1, 1, len(part), 1), torch.zeros(len(part), len(part)), torch.eye(len(part))
        options = {"axis": -2, "approximate": approximate, "backend": "cpu"}
        parts.append(F.gated_mixing(x, None, None, zero, part.clone(), one, None, None, None, **options).flatten())
    actual = torch.cat(parts)
    exact = torch.nn.functional.gelu(z.double(), approximate=approximate)
    eager = torch.nn.functional.gelu(z, approximate=approximate).double()
    within = z.abs() < 20  # where errors are of a size
    errors, of_eager = ((t.double() - exact)[within].abs() for t in (actual, eager))
    assert errors.max() <= 2 * of_eager.max() and errors.square().mean() <= 4 * of_eager.square().mean()
    torch.testing.assert_close(actual, exact.float(), rtol=3e-7, atol=1e-7)


@each_mixer
def test_dropout_has_the_masks_of_triton(mixer):
    """Forward and backward under the same seed: a mask that differed would change whole elements."""
    x, parameters = make(mixer, (2, 9, 10, 20), torch.float32, CPU)
    dy, results = torch.randn_like(x), []
    for backend in ("cpu", "triton"):
        torch.manual_seed(11)
        results.append(of_mixer.evaluate(mixer, x, parameters, backend, dy, dropout_p=0.3))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(12)
    other = of_mixer.evaluate(mixer, x, parameters, "cpu", dy, dropout_p=0.3)["output"]
    assert (other - results[1]["output"]).abs().max() > 0.1


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_dropout_of_a_layer_has_the_masks_of_triton(memory):
    x, parameters = make_layer((2, 3, 10, 20), torch.float32, CPU)
    dy, results = torch.randn_like(x), []
    for backend in ("cpu", "triton"):
        torch.manual_seed(11)
        results.append(of_layer.evaluate(x, parameters, backend, dy, dropout_p=0.3, memory=memory))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-4)


def test_dropout_of_everything_is_the_input():
    x, parameters = make_layer((2, 3, 10, 20), torch.float32, CPU)
    assert torch.equal(of_layer.evaluate(x, parameters, "cpu", dropout_p=1.0)["output"], x)


@pytest.mark.parametrize("wanted", (("x",), ("gamma", "beta"), ("w1",), ("b2", "w_gate")), ids=" ".join)
@each_mixer
def test_only_what_is_wanted(mixer, wanted):
    x, parameters = make(mixer, (2, 5, 6, 20), torch.float32, CPU)
    everything = of_mixer.evaluate(mixer, x, parameters, "cpu", x)
    leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in {"x": x, **parameters}.items()}
    axis, gate_first = MIXERS[mixer]
    F.gated_mixing(*leaves.values(), axis=axis, gate_first=gate_first, backend="cpu").backward(x)
    for k, leaf in leaves.items():
        assert (leaf.grad is not None) == (k in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, everything[f"gradient of {k}"])


def test_empty_batch():
    x, parameters = make_layer((2, 5, 6, 20), torch.float32, CPU)
    empty = of_layer.evaluate(x[:0], parameters, "cpu", x[:0])
    assert empty["output"].shape == (0, 5, 6, 20) and not empty["gradient of w1"].any()


def test_opcheck():
    x, parameters = make_layer((1, 2, 4, 8), torch.float32, CPU)
    tensors = [t.detach().requires_grad_(i % 2 == 0) for i, t in enumerate((x, *parameters.values()))]
    options = (*Options(eps=1e-5, dropout_p=0.2, seed=torch.tensor([5, 6])).inputs, "cpu", 1e-6)
    torch.library.opcheck(ops.gated_mixer_layer, (*tensors, *options, True))
    fixed = [t.detach() for t in tensors]
    torch.library.opcheck(
        ops.gated_mixer_layer_backward, (torch.randn_like(x), torch.randn_like(x), *fixed, *options, True, [True] * 17)
    )


def test_compiled_training_equals_eager():
    x, parameters = make_layer((2, 5, 6, 20), torch.float32, CPU)

    def f(x, *values):
        return F.gated_mixer_layer(x * 2, *values, backend="cpu").square().mean()

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        return torch.autograd.grad(f(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(gradients(f), gradients(compiled), strict=True):
        assert torch.equal(actual, expected)


def test_what_it_cannot_run_is_said():
    x, parameters = make("patches", (2, 5, 6, 20), torch.float32, CPU)
    wide = {k: t.double() for k, t in parameters.items()}
    with pytest.raises(
        RuntimeError, match="backend='cpu' cannot run: the CPU kernels take torch.float32, .*float16, got .*float64"
    ):
        of_mixer.evaluate("patches", x.double(), wide, "cpu")
    w = torch.zeros(20, 20)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: it has no kernels for channel_mixing; use"):
        F.channel_mixing(x[0], None, None, w, None, w, None, backend="cpu")
    w = torch.zeros(6, 6)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: it has no kernels for token_linear"):
        F.token_linear(x[0], None, None, w, None, None, backend="cpu")


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "sse9")
    message = "MIXER_KERNELS_CPU_ISA: got 'sse9', expected one of .*baseline"
    with pytest.raises(RuntimeError, match=message):
        library.instruction_set()
    assert "got 'sse9'" in backends.why_not("cpu", CPU, torch.float32)


def test_the_best_instruction_set_that_runs_here(monkeypatch):
    other = SimpleNamespace(built=("avx512", "avx2", "baseline"), runs_here=lambda name: name != "avx512")
    with library.replaced_by(other):
        monkeypatch.delenv(library.ISA_VARIABLE)
        assert library.instruction_set() == "avx2"
        monkeypatch.setenv(library.ISA_VARIABLE, "avx512")
        with pytest.raises(RuntimeError, match="MIXER_KERNELS_CPU_ISA=avx512: this CPU lacks it"):
            library.instruction_set()


def test_info_says_what_runs(isa):
    built = info.cpu_kernels()
    assert built["instruction_set"] == isa and isa in built["built"]
    assert f"runs {isa}" in info.render(info.collect())
