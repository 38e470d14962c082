"""TSMixer's ``time_mixing`` and ``feature_mixing`` by the accuracy rule, forward and backward, on the CPU's kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from accuracy import assert_all_accurate, reference
from test_cpu_backend import CPU, isa  # noqa: F401  every test on every instruction set

import mixer_kernels.functional as F
from mixer_kernels import ops
from mixer_kernels.backends.arguments import Options
from mixer_kernels.backends.remembered import forget
from mixer_kernels.functional import tsmixer

FUNCTIONS = {"time": F.time_mixing, "features": F.feature_mixing, "features, projected": F.feature_mixing}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
SHAPES = {  # batch, tokens, channels, hidden units, channels of the result where they are projected
    "darts": (5, 12, 64, 64, 64),
    "odd": (3, 13, 21, 37, 18),
    "one": (1, 1, 1, 1, 1),
    "wide": (2, 5, 307, 33, 65),
    "long": (2, 130, 7, 16, 48),
    "many images": (70, 3, 17, 5, 9),
}


def make(name, shape, dtype=torch.float32, norm_first=False):
    """x and the parameters, those of the norm where ``norm_first`` puts it."""
    batch, tokens, channels, hidden, projected = shape
    result = projected if "projected" in name else channels

    def weight(rows, columns):
        return torch.randn(rows, columns) * columns**-0.5

    of_norm = (tokens, channels if norm_first else result)
    parameters = {"gamma": 1 + 0.3 * torch.randn(of_norm), "beta": 0.3 * torch.randn(of_norm)}
    if name == "time":
        parameters |= {"w": weight(tokens, tokens), "b": 0.3 * torch.randn(tokens)}
    else:
        parameters |= {"w1": weight(hidden, channels), "b1": 0.3 * torch.randn(hidden)}
        parameters |= {"w2": weight(result, hidden), "b2": 0.3 * torch.randn(result), "w_skip": None, "b_skip": None}
    if "projected" in name:
        parameters |= {"w_skip": weight(result, channels), "b_skip": 0.3 * torch.randn(result)}
    x = torch.randn(batch, tokens, channels).to(dtype)
    return x, {k: None if t is None else t.to(dtype) for k, t in parameters.items()}


def evaluate(name, x, parameters, backend, dy=None, **options):
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in {"x": x, **parameters}.items()}
    with torch.set_grad_enabled(dy is not None):
        y = FUNCTIONS[name](*leaves.values(), backend=backend, **options)
    results = {"output": y.detach()}
    if dy is not None:
        present = {k: leaf for k, leaf in leaves.items() if leaf is not None}
        of_each = torch.autograd.grad(y, list(present.values()), dy)
        results |= {f"gradient of {k}": gradient for k, gradient in zip(present, of_each, strict=True)}
    return results


def assert_matches_eager(name, x, parameters, **options):
    dy = torch.randn_like(evaluate(name, x, parameters, "torch", **options)["output"])
    actual, eager = (evaluate(name, x, parameters, backend, dy, **options) for backend in ("cpu", "torch"))
    wide = {k: None if t is None else t.double() for k, t in parameters.items()}
    exact = reference(lambda: evaluate(name, x.double(), wide, "torch", dy.double(), **options), x.dtype)
    assert_all_accurate(actual, eager, exact)


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_function
def test_matches_eager(name, shape, norm_first):
    assert_matches_eager(name, *make(name, shape, norm_first=norm_first), norm_first=norm_first)


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@each_function
def test_affine_norm_and_16_bits(name, dtype, norm_first):
    x, parameters = make(name, SHAPES["odd"], norm_first=norm_first)
    assert_matches_eager(name, x, parameters, norm="affine", norm_first=norm_first)
    x, parameters = make(name, SHAPES["odd"], dtype, norm_first)
    assert_matches_eager(name, x, parameters, norm_first=norm_first, eps=1e-3)


@pytest.mark.parametrize("activation", tsmixer.ACTIVATIONS)
@each_function
def test_activations(name, activation):
    x, parameters = make(name, SHAPES["odd"])
    assert_matches_eager(name, x, parameters, activation=activation)
    if activation == "gelu":
        assert_matches_eager(name, x, parameters, activation=activation, approximate="tanh")


@pytest.mark.parametrize("norm_first", (False, True))
@each_function
def test_without_what_may_be_none_and_strides(name, norm_first):
    x, parameters = make(name, SHAPES["odd"], norm_first=norm_first)
    for absent in (("gamma",), ("beta", "b", "b1"), ("gamma", "beta", "b2", "b_skip")):
        given = {k: None if k in absent else t for k, t in parameters.items()}
        assert_matches_eager(name, x.mT.contiguous().mT, given, norm_first=norm_first)


@each_function
def test_series_without_variance_and_far_from_zero(name):
    x, parameters = make(name, SHAPES["odd"], norm_first=True)
    x = x + 30
    x[0] = 0.1
    assert_matches_eager(name, x, parameters, norm_first=True)


@pytest.mark.parametrize("norm_first", (False, True))
@each_function
def test_dropout(name, norm_first):
    """The masks, found where they are all that there is, in eager's place of them; the same masks backward."""
    batch, tokens, width = 3, 5, 24
    x, parameters = make(name, (batch, tokens, width, width, width), norm_first=norm_first)
    one, zero = torch.ones(1), torch.zeros(1)

    def drawn(**of_mixer):
        torch.manual_seed(7)
        given = {k: None if t is None else (of_mixer.get(k, zero)).expand(t.shape) for k, t in parameters.items()}
        given |= {"gamma": None, "beta": None}
        return evaluate(name, 0 * x, given, "cpu", norm="affine", dropout_p=0.2)["output"]

    if name == "time":
        masks = [drawn(b=one)]
    else:
        behind = drawn(b2=one)
        hidden = torch.zeros_like(x)  # through each of twelve outputs: one of them is kept
        for shift in range(12):
            through = drawn(b1=one, w2=torch.eye(width).roll(shift, 0)) * 0.8
            hidden = torch.maximum(hidden, through.roll(-shift, -1))
        masks = [hidden, behind]
    for mask in masks:
        assert 0.1 < (mask == 0).float().mean() < 0.3
        torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1.25))
    if name != "time":
        assert not torch.equal(*masks)

    def by_masks(x, gamma, beta, *mixer):
        norm = lambda t: nnf.layer_norm(t, t.shape[1:], gamma, beta)  # noqa: E731
        n = norm(x) if norm_first else x
        if name == "time":
            y = x + masks[0] * nnf.linear(n.mT, *mixer).relu().mT
        else:
            w1, b1, w2, b2, w_skip, b_skip = mixer
            y = masks[1] * nnf.linear(masks[0] * nnf.linear(n, w1, b1).relu(), w2, b2)
            y = y + (x if w_skip is None else nnf.linear(x, w_skip, b_skip))
        return y if norm_first else norm(y)

    def gradients(f):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *parameters.values())]
        y = f(*leaves)
        return y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], torch.ones_like(y).cumsum(1))

    torch.manual_seed(7)
    actual = gradients(lambda *t: FUNCTIONS[name](*t, norm_first=norm_first, dropout_p=0.2, backend="cpu"))
    for ours, expected in zip(actual, gradients(by_masks), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@each_function
def test_threads_change_nothing_and_a_series_does_not_depend_on_its_batch(name):
    x, parameters = make(name, (70, 12, 40, 16, 24))
    dy, results = torch.randn_like(evaluate(name, x, parameters, "torch")["output"]), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(evaluate(name, x, parameters, "cpu", dy))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(other[k], expected) for k, expected in results[0].items())
    assert torch.equal(evaluate(name, x[33:35], parameters, "cpu")["output"], results[0]["output"][33:35])


@each_function
def test_what_is_not_finite_is_so_where_it_is_in_eager(name):
    x, parameters = make(name, SHAPES["odd"])
    x[1, 2, 3] = torch.nan
    for activation in tsmixer.ACTIVATIONS:
        actual, eager = (
            evaluate(name, x, parameters, backend, activation=activation)["output"] for backend in ("cpu", "torch")
        )
        assert torch.equal(actual.isfinite(), eager.isfinite())


@pytest.mark.parametrize("name", ("time", "features, projected"))
def test_operators(name):
    """Only what is wanted; an empty batch; opcheck; compiled training."""
    x, parameters = make(name, SHAPES["odd"])
    dy = torch.randn_like(evaluate(name, x, parameters, "torch")["output"])
    everything = evaluate(name, x, parameters, "cpu", dy)
    weight = "w" if name == "time" else "w_skip"
    leaves = {k: t.clone().requires_grad_(k in (weight, "beta")) for k, t in {"x": x, **parameters}.items()}
    FUNCTIONS[name](*leaves.values(), backend="cpu").backward(dy)
    for k, leaf in leaves.items():
        assert (leaf.grad is not None) == (k in (weight, "beta"))
        assert leaf.grad is None or torch.equal(leaf.grad, everything[f"gradient of {k}"])
    assert evaluate(name, x[:0], parameters, "cpu", dy[:0])["output"].shape == (0, *dy.shape[1:])
    seed = torch.tensor([5])
    options = (*Options(eps=1e-5, activation="relu", dropout_p=0.2, seed=seed).inputs, "cpu", False, True)
    tensors = [t.detach().requires_grad_(i % 2 == 0) for i, t in enumerate((x, *parameters.values()))]
    operator = ops.time_mixing if name == "time" else ops.feature_mixing
    torch.library.opcheck(operator, (*tensors, *options))

    def f(x, *values):
        return FUNCTIONS[name](x * 2, *values, backend="cpu").square().mean()

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        return torch.autograd.grad(f(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(gradients(f), gradients(compiled), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_a_layer_is_its_two_mixers(backend, norm_first, monkeypatch):
    """Forward and backward, under the same two seeds."""
    shape = SHAPES["odd"]
    x, of_time = make("time", shape, norm_first=norm_first)
    _, of_features = make("features, projected", shape, norm_first=norm_first)
    seeds = torch.tensor([5, 6])
    forget()  # calls that draw seeds of their own

    def gradients(call, **options):
        leaves = [t.detach().requires_grad_() for t in (x, *of_time.values(), *of_features.values())]
        y = call(*leaves, norm_first=norm_first, backend=backend, activation="silu", **options)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(1))

    def mixers(x, *parameters, eps, **options):
        left = iter(seeds.split(1))
        monkeypatch.setattr(tsmixer, "seeded", lambda x, options: options._replace(seed=next(left)))
        u = F.time_mixing(x, *parameters[:4], eps=eps[0], **options)
        return F.feature_mixing(u, *parameters[4:], eps=eps[1], **options)

    options = {"eps": (1e-2, 1e-5), "dropout_p": 0.3 if backend == "cpu" else 0.0}
    expected = gradients(mixers, **options)
    monkeypatch.setattr(tsmixer, "seeded", lambda x, options, number: options._replace(seed=seeds))
    for memory in F.MEMORY_MODES:
        for ours, theirs in zip(gradients(F.tsmixer_layer, memory=memory, **options), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_operator_of_a_layer():
    x, of_time = make("time", SHAPES["odd"])
    _, of_features = make("features, projected", SHAPES["odd"])
    tensors = [t.requires_grad_(i % 2 == 0) for i, t in enumerate((x, *of_time.values(), *of_features.values()))]
    options = (*Options(eps=1e-5, activation="relu", dropout_p=0.2, seed=torch.tensor([5, 6])).inputs, "cpu", 1e-5)
    for keep_z in (True, False):
        torch.library.opcheck(ops.tsmixer_layer, (*tensors, *options, False, keep_z))


def test_torch_backend_is_what_it_says_it_is():
    x, (gamma, beta, w, b) = (t := make("time", SHAPES["odd"], torch.float64))[0], t[1].values()
    y = nnf.layer_norm(x + nnf.relu(nnf.linear(x.mT, w, b)).mT, x.shape[1:], gamma, beta)
    torch.testing.assert_close(F.time_mixing(x, gamma, beta, w, b, backend="torch"), y, rtol=1e-12, atol=1e-12)
    x, parameters = make("features, projected", SHAPES["odd"], torch.float64, norm_first=True)
    gamma, beta, w1, b1, w2, b2, w_skip, b_skip = parameters.values()
    y = nnf.linear(x, w_skip, b_skip)
    y = y + nnf.linear(nnf.relu(nnf.linear(nnf.layer_norm(x, x.shape[1:], gamma, beta), w1, b1)), w2, b2)
    ours = F.feature_mixing(x, **parameters, norm_first=True, backend="torch")
    torch.testing.assert_close(ours, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    (
        ("time", {"w": torch.zeros(13, 12)}, "w has shape .* built for 12 tokens, x has 13"),
        ("time", {"w": torch.zeros(12, 13)}, r"w must have shape \(13, 13\), got \(12, 13\)"),
        ("time", {"gamma": torch.zeros(21)}, r"gamma must have shape \(13, 21\), got \(21,\)"),
        ("features", {"w2": torch.zeros(18, 37)}, "w2 gives 18 channels, x has 21: the residual needs a w_skip"),
        ("features", {"b_skip": torch.zeros(21)}, "b_skip is given without w_skip"),
        ("features", {"w2": torch.zeros(21, 36)}, r"w2 must be \(O, 37\), got shape \(21, 36\)"),
        ("features, projected", {"beta": torch.zeros(13, 21)}, r"beta must have shape \(13, 18\), got \(13, 21\)"),
        ("time", {"activation": "swiglu"}, "activation must be one of 'gelu', 'relu', 'silu', got 'swiglu'"),
    ),
)
def test_bad_arguments(name, changed, message):
    x, parameters = make(name, SHAPES["odd"])
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](**{"x": x, **parameters, **changed}, backend="torch")


def test_a_backend_without_them_says_so():
    x, parameters = make("time", SHAPES["odd"])
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it has no kernels for time_mixing"):
        F.time_mixing(x, **parameters, backend="triton")
