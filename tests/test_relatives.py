"""The kernels of MLP-Mixer's relatives against float64, by the accuracy rule, forward and backward.

gMixer's SwiGLU and ResMLP's affine map are kinds of the Mixer's functions; ResMLP's token_linear and gMLP's gate have
their own. Each function is taken as what it is equivalent to says, and its torch backend against timm's modules.
"""

from __future__ import annotations

from functools import partial

import evaluation
import pytest
import torch
from accuracy import assert_all_accurate, reference
from blocks import LAYOUTS, make_x
from test_kernels import on_target

import mixer_kernels.functional as F
from mixer_kernels import ops
from mixer_kernels.backends.arguments import Options
from mixer_kernels.shapes import MixerShape

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(rows, columns):
    return torch.randn(rows, columns) * columns**-0.5


def vector(size, offset=0.0):
    return offset + 0.3 * torch.randn(size)


def gmixer(S, C):
    """A block of gMixer: hidden widths that are no multiples of a tile."""
    d_s, d_c = S // 2 + 3, C + 5
    return {
        "gamma1": vector(C, 1.0), "beta1": vector(C), "w1": linear(2 * d_s, S), "b1": vector(2 * d_s),
        "w2": linear(S, d_s), "b2": vector(S), "gamma2": vector(C, 1.0), "beta2": vector(C),
        "w3": linear(2 * d_c, C), "b3": vector(2 * d_c), "w4": linear(C, d_c), "b4": vector(C),
    }  # fmt: skip


def affine_channels(S, C):
    d_c = 2 * C + 3
    return {
        "gamma": vector(C, 1.0), "beta": vector(C), "w3": linear(d_c, C), "b3": vector(d_c),
        "w4": linear(C, d_c), "b4": vector(C),
    }  # fmt: skip


def resmlp_tokens(S, C):
    return {
        "alpha": vector(C, 1.0), "beta": vector(C), "w": linear(S, S), "b": vector(S), "scale": vector(C, 0.5),
    }  # fmt: skip


def gate(S, C):
    half = C // 2
    return {"gamma": vector(half, 1.0), "beta": vector(half), "w": linear(S, S), "b": vector(S, 1.0)}


def gmlp(S, C):
    half = C + 9
    return {
        "gamma": vector(C, 1.0), "beta": vector(C), "w1": linear(2 * half, C), "b1": vector(2 * half),
        "gate_gamma": vector(half, 1.0), "gate_beta": vector(half), "w_gate": linear(S, S), "b_gate": vector(S, 1.0),
        "w2": linear(C, half), "b2": vector(C),
    }  # fmt: skip


# name: (function, its parameters, options that make it the relative's)
RELATIVES = {
    "gmixer": (F.mixer_block, gmixer, {"activation": "swiglu"}),
    "resmlp channels": (F.channel_mixing, affine_channels, {"norm": "affine"}),
    "resmlp tokens": (F.token_linear, resmlp_tokens, {}),
    "spatial gating": (F.spatial_gating, gate, {}),
    "gmlp": (F.gated_channel_mixing, gmlp, {}),
}
each_relative = pytest.mark.parametrize("name", RELATIVES)

CASES = {  # tokens, channels, dtype
    "below a tile": (7, 14, torch.float32),
    "tile + 1, float32": (65, 34, torch.float32),
    "tile + 1, float16": (65, 34, torch.float16),
    "tile + 1, bfloat16": (65, 34, torch.bfloat16),
    "224 px": (196, 24, torch.bfloat16),
    "beyond the fused kernel": (257, 18, torch.bfloat16),
}


def evaluate(name, x, parameters, backend, dy=None, **options):
    function, _, own = RELATIVES[name]
    return evaluation.evaluate(function, x, parameters, dy, **own, **options, backend=backend)


def assert_matches_eager(name, x, parameters, target="sm_80", memory=None, **how):
    kept = {"memory": memory} if memory is not None and name not in ("resmlp tokens", "spatial gating") else {}
    evaluation.assert_matches_eager(partial(evaluate, name), x, parameters, target=target, besides=kept, **how)


def inputs(name, shape, dtype, device, batch_size=2, layout="contiguous"):
    tokens, channels = shape
    parameters = {k: t.to(device, dtype) for k, t in RELATIVES[name][1](tokens, channels).items()}
    return make_x(batch_size, MixerShape(tokens, channels, 1, 1), dtype, device, layout), parameters


@pytest.mark.parametrize(("tokens", "channels", "dtype"), CASES.values(), ids=CASES.keys())
@each_relative
def test_matches_eager(name, tokens, channels, dtype, device):
    assert_matches_eager(name, *inputs(name, (tokens, channels), dtype, device))


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
@each_relative
def test_tensor_descriptors_match_eager(name, memory, device):
    """The kernels that sm_90 runs; the hidden units' rows are padded to whole 16-byte vectors."""
    x, parameters = inputs(name, (49, 48), torch.bfloat16, device)
    assert_matches_eager(name, x, parameters, target="sm_90", memory=memory)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@each_relative
def test_layouts_are_read_as_they_are(name, layout, device):
    x, parameters = inputs(name, (20, 24), torch.float32, device, layout=layout)
    before = x.clone()
    assert_matches_eager(name, x, parameters)
    assert torch.equal(x, before)


def column(v):
    """The same numbers in a column of a matrix."""
    return torch.stack((v, torch.full_like(v, torch.nan)), -1)[:, 0]


@each_relative
def test_vectors_of_any_stride(name, device):
    x, parameters = inputs(name, (20, 24), torch.float32, device)
    dy = torch.randn_like(evaluate(name, x, parameters, "torch")["output"])
    expected = evaluate(name, x, parameters, "triton", dy)
    columns = {k: column(t) if t.dim() == 1 else t for k, t in parameters.items()}
    for what, actual in evaluate(name, x, columns, "triton", dy).items():
        assert torch.equal(actual, expected[what]), what


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each_relative
def test_without_what_may_be_none(name, dtype, device):
    x, parameters = inputs(name, (20, 24), dtype, device)
    bare = {k: t if t.dim() == 2 else None for k, t in parameters.items()}
    assert_matches_eager(name, x, bare)
    for only in ("scale", "alpha", "beta", "gamma"):  # a part of an affine map alone
        if only in parameters:
            assert_matches_eager(name, x, {**bare, only: parameters[only]})


@pytest.mark.parametrize("stream", (torch.float32, torch.bfloat16), ids=str)
@each_relative
def test_autocast(name, stream, device):
    """float32 parameters, bfloat16 products, a stream of either."""
    x, parameters = inputs(name, (49, 40), torch.float32, device)
    x = x.to(stream)
    dtype = torch.promote_types(stream, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        shape = evaluate(name, x, parameters, "torch")["output"].shape
    dy = torch.randn(shape, device=device).to(dtype)
    results = {}
    with torch.autocast(device, torch.bfloat16):
        for target in ("sm_80", "sm_90"):
            with on_target(target, device):
                results[target] = evaluate(name, x, parameters, "triton", dy)
        eager = evaluate(name, x, parameters, "torch", dy)
    wide = {k: t.double() for k, t in parameters.items()}
    exact = reference(lambda: evaluate(name, x.double(), wide, "torch", dy.double()), dtype, torch.bfloat16)
    for actual in results.values():
        assert actual["output"].dtype is dtype
        assert_all_accurate(actual, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_relative
def test_mean_far_from_zero(name, dtype, device):
    """|mean|/std of 30; the affine maps get a beta that takes the mean away again."""
    tokens, channels = 20, 64
    parameters = {k: t.to(device, dtype) for k, t in RELATIVES[name][1](tokens, channels).items()}
    x = make_x(2, MixerShape(tokens, channels, 1, 1), dtype, device, mean=30.0)
    if "resmlp" in name:
        parameters["beta"] = (-30 * parameters["alpha" if "alpha" in parameters else "gamma"].float()).to(dtype)
    assert_matches_eager(name, x, parameters, target="sm_90", backward=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_scale_as_it_starts(dtype, device):
    """1e-6, which float16 holds with three bits: the weight's gradient is not lost below float16's numbers."""
    x, parameters = inputs("resmlp tokens", (20, 24), dtype, device)
    parameters["scale"] = torch.full_like(parameters["scale"], 1e-6)
    for name in ("alpha", "beta"):
        parameters[name] = 1e-2 * parameters[name]
    assert_matches_eager("resmlp tokens", 1e2 * x, parameters)


def test_layer_scale_of_zero(device):
    x, parameters = inputs("resmlp tokens", (20, 24), torch.float32, device)
    parameters["scale"] = torch.zeros_like(parameters["scale"])
    assert_matches_eager("resmlp tokens", x, parameters)


DROP_PATH, BOTH = {"drop_path_p": 0.5}, {"dropout_p": 0.3, "drop_path_p": 0.4}
NOISE = {name: (DROP_PATH, BOTH) for name in RELATIVES} | {"resmlp tokens": (DROP_PATH,), "spatial gating": ()}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in RELATIVES for options in NOISE[name]], ids=str
)
def test_noise_is_the_same_in_forward_and_backward(name, options, device):
    """The gradient along a random direction is the slope of the output, with the seed held."""
    x, parameters = inputs(name, (20, 24), torch.float32, device, batch_size=6)
    function, _, own = RELATIVES[name]
    tensors = [t.requires_grad_() for t in (x, *parameters.values())]

    def run(tensors):
        torch.manual_seed(7)
        return function(tensors[0], *tensors[1:], **own, **options, backend="triton")

    y = run(tensors)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, tensors, dy)
    directions = [torch.randn_like(t) for t in tensors]
    step = 1e-3
    with torch.no_grad():
        high, low = (run([t + sign * step * d for t, d in zip(tensors, directions, strict=True)]) for sign in (1, -1))
        plain = function(x, *parameters.values(), **own, backend="triton")
    slope = ((high - low).double() / (2 * step) * dy.double()).sum()
    predicted = sum((g * d).double().sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(predicted, slope, rtol=2e-3, atol=0.05)
    assert not torch.allclose(y, plain), "nothing was dropped"


@each_relative
def test_each_gradient_alone(name, device):
    x, parameters = inputs(name, (20, 24), torch.float32, device)
    function, _, own = RELATIVES[name]
    dy = torch.randn_like(evaluate(name, x, parameters, "torch")["output"])
    whole = evaluate(name, x, parameters, "triton", dy)
    for wanted in ("x", *parameters):
        tensors = {k: t.detach().requires_grad_(k == wanted) for k, t in {"x": x, **parameters}.items()}
        leaf = tensors[wanted]
        y = function(tensors.pop("x"), **tensors, **own, backend="triton")
        (gradient,) = torch.autograd.grad(y, leaf, dy)
        torch.testing.assert_close(gradient, whole[f"gradient of {wanted}"], rtol=1e-5, atol=1e-6)


@each_relative
def test_empty_batch(name, device):
    x, parameters = inputs(name, (20, 24), torch.float32, device, batch_size=0)
    eager = evaluate(name, x, parameters, "torch")["output"]
    for what, tensor in evaluate(name, x, parameters, "triton", torch.empty_like(eager)).items():
        assert tensor.shape == eager.shape if what == "output" else torch.equal(tensor, torch.zeros_like(tensor))


@each_relative
def test_a_second_derivative_raises(name, device):
    x, parameters = inputs(name, (20, 24), torch.float32, device)
    function, _, own = RELATIVES[name]
    y = function(x.requires_grad_(), **parameters, **own, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative.*backend='torch'"):
        dx.sum().backward()


# ---------------------------------------------------------------------------------------------------------- operators


def operator_calls(name, dtype, device, noise=(0.0, 0.0), seed=None):
    """(operator, its arguments) for the forward, with some inputs frozen, and the backward of a relative."""
    x, parameters = inputs(name, (20, 24), dtype, device)
    if name == "gmlp":  # operators take the half, then the gate
        order = ("gamma", "beta", "w1", "b1", "w2", "b2", "gate_gamma", "gate_beta", "w_gate", "b_gate")
        parameters = {key: parameters[key] for key in order}
    fixed = [x, *parameters.values()]
    tensors = [t.detach().requires_grad_(i % 2 == 0) for i, t in enumerate(fixed)]
    activation, norm = "swiglu" if name == "gmixer" else "gelu", "affine" if name == "resmlp channels" else "layer"
    dropout_p, drop_path_p = noise
    options = Options(
        dtype, 1e-6, activation, norm=norm, dropout_p=dropout_p, drop_path_p=drop_path_p, seed=seed
    ).inputs
    options = (*options, "triton")
    if name == "resmlp tokens":
        return [
            (ops.token_linear, (*tensors, *options)),
            (ops.token_linear_backward, (torch.randn_like(x), *fixed, *options, [True] * 6)),
        ]
    if name == "spatial gating":
        ds = torch.randn(2, 20, 12, device=device).to(dtype)
        return [
            (ops.spatial_gating, (*tensors, *options)),
            (ops.spatial_gating_backward, (ds, *fixed, *options, [True] * 5)),
        ]
    (mean, rstd), dy = (torch.rand(40, device=device) for _ in range(2)), torch.randn_like(x)
    if name == "gmlp":
        z = torch.randn(40, parameters["w1"].shape[0], device=device).to(dtype)
        backward = (dy, mean, rstd, z, *fixed, *options, 1e-5, True, [True] * 11)
        return [
            (ops.gated_channel_mixing, (*tensors, *options, 1e-5, True)),
            (ops.gated_channel_mixing, (*tensors, *options, 1e-5, False)),
            (ops.gated_channel_mixing_backward, backward),
        ]
    if name == "resmlp channels":
        z = torch.randn(40, parameters["w3"].shape[0], device=device).to(dtype)
        kept = [x.new_empty(0), x.new_empty(0), z]
        return [
            (ops.channel_mixing, (*tensors, *options, True)),
            (ops.channel_mixing_backward, (dy, *kept, *fixed, *options, True, [True] * 7)),
        ]
    tokens, channels, fixed_tokens, fixed_channels = tensors[1:7], tensors[7:], fixed[1:7], fixed[7:]
    z = torch.randn(40, 2, parameters["w4"].shape[1], device=device).to(dtype)
    return [
        (ops.token_mixing, (tensors[0], *tokens, *options)),
        (ops.channel_mixing, (tensors[0], *channels, *options, True)),
        (ops.token_mixing_backward, (dy, mean, rstd, x, *fixed_tokens, *options, [True] * 7)),
        (ops.channel_mixing_backward, (dy, mean, rstd, z, x, *fixed_channels, *options, True, [True] * 7)),
    ]


@each_relative
def test_opcheck(name, device):
    """Schema, fakes, autograd, the same under AOT with fixed and dynamic shapes."""
    for operator, arguments in operator_calls(name, torch.float32, device):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", ("resmlp tokens", "gmlp"))
def test_compiled_training_equals_eager(name, device):
    x, parameters = inputs(name, (20, 24), torch.float32, device)
    function, _, own = RELATIVES[name]

    def f(x, *values):
        return function(x * 2, *values, **own, backend="triton").square().mean()

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        return torch.autograd.grad(f(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(gradients(f), gradients(compiled), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- errors


@each_relative
def test_the_cuda_backend_says_what_it_lacks(name, device, request):
    request.getfixturevalue("cuda_kernels")
    x, parameters = inputs(name, (20, 24), torch.bfloat16, device)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: it has no kernels for .*backend='triton'"):
        evaluate(name, x, parameters, "cuda")


BAD = {
    "activation": (
        "gmixer",
        {"activation": "tanh"},
        {},
        "activation must be one of 'gelu', 'relu', 'silu', 'swiglu', got 'tanh'",
    ),
    "tanh of swiglu": ("gmixer", {"approximate": "tanh"}, {}, "approximate='tanh' is a form of GELU, but activation"),
    "odd rows": ("gmixer", {}, {"w1": torch.zeros(7, 20)}, "w1 must have an even number of rows.*got 7"),
    "norm": ("resmlp channels", {"norm": "batch"}, {}, "norm must be one of 'layer', 'affine', got 'batch'"),
    "not square": (
        "resmlp tokens",
        {},
        {"w": torch.zeros(20, 19)},
        r"w must be \(tokens, tokens\), got shape \(20, 19",
    ),
    "other tokens": ("resmlp tokens", {}, {"w": torch.zeros(19, 19)}, "built for 19 tokens, x has 20"),
    "other channels": ("resmlp tokens", {}, {"scale": torch.zeros(23)}, r"scale must have shape \(24,\), got \(23,\)"),
    "gate's norm": ("gmlp", {}, {"gate_gamma": torch.zeros(3)}, r"gate_gamma must have shape \(33,\), got \(3,\)"),
    "gate's eps": ("gmlp", {"gate_eps": 0.0}, {}, "eps must be > 0 and finite, got 0.0"),
}


@pytest.mark.parametrize(("name", "options", "changed", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(name, options, changed, message):
    x, parameters = inputs(name, (20, 24), torch.float32, "cpu")
    function, _, own = RELATIVES[name]
    with pytest.raises(ValueError, match=message):
        function(x, **{**parameters, **changed}, **{**own, **options}, backend="torch")


def test_a_gate_needs_an_even_number_of_channels():
    x, parameters = inputs("spatial gating", (20, 24), torch.float32, "cpu")
    with pytest.raises(ValueError, match="h must have an even number of channels, factors and gates, got 23"):
        F.spatial_gating(x[..., 1:], **parameters, backend="torch")
