"""``gated_mixing``, one kernel for a half of a PatchTSMixer layer, by the accuracy rule, forward and backward."""

from __future__ import annotations

from functools import partial

import evaluation
import pytest
import torch
from accuracy import assert_all_accurate, reference

import mixer_kernels.functional as F
from mixer_kernels import ops
from mixer_kernels.backends.arguments import Options

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

# Hugging Face's three mixers: (axis, gate_first).
MIXERS = {"channels": (-3, True), "patches": (-2, False), "features": (-1, False)}
each_mixer = pytest.mark.parametrize("mixer", MIXERS)

CASES = {  # batch, channels, patches, features
    "small, float32": ((2, 3, 4, 8), torch.float32),
    "small, float16": ((2, 3, 4, 8), torch.float16),
    "small, bfloat16": ((2, 3, 4, 8), torch.bfloat16),
    "odd, float32": ((2, 3, 13, 20), torch.float32),
    "odd, float16": ((2, 3, 13, 20), torch.float16),
    "tile + 1": ((1, 17, 3, 65), torch.float32),
    "tile + 1 patches": ((1, 2, 33, 20), torch.float32),
    "large patches": ((1, 1, 64, 24), torch.bfloat16),
    "large features": ((1, 2, 6, 192), torch.bfloat16),
}


def make(mixer, shape, dtype, device, factor=2):
    """x and the parameters of a mixer, the hidden width ``factor`` times the mixed axis."""
    axis, _ = MIXERS[mixer]
    extent, features, hidden = shape[axis], shape[-1], factor * shape[axis]

    def linear(rows, columns):
        return torch.randn(rows, columns) * columns**-0.5

    def vector(size, offset=0.0):
        return offset + 0.3 * torch.randn(size)

    parameters = {
        "gamma": vector(features, 1.0), "beta": vector(features), "w1": linear(hidden, extent), "b1": vector(hidden),
        "w2": linear(extent, hidden), "b2": vector(extent), "w_gate": linear(extent, extent), "b_gate": vector(extent),
    }  # fmt: skip
    return torch.randn(shape).to(device, dtype), {k: t.to(device, dtype) for k, t in parameters.items()}


def evaluate(mixer, x, parameters, backend, dy=None, **options):
    axis, gate_first = MIXERS[mixer]
    options |= {"axis": axis, "gate_first": gate_first, "backend": backend}
    return evaluation.evaluate(F.gated_mixing, x, parameters, dy, **options)


def assert_matches_eager(mixer, x, parameters, target="sm_80", **options):
    evaluation.assert_matches_eager(partial(evaluate, mixer), x, parameters, target=target, **options)


@pytest.mark.parametrize(("shape", "dtype"), CASES.values(), ids=CASES.keys())
@each_mixer
def test_matches_eager(mixer, shape, dtype, device):
    assert_matches_eager(mixer, *make(mixer, shape, dtype, device))


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 13, 20), torch.float32), ((2, 3, 4, 8), torch.bfloat16)], ids=str)
@each_mixer
def test_sigmoid_gate(mixer, shape, dtype, device):
    assert_matches_eager(mixer, *make(mixer, shape, dtype, device), gate="sigmoid")


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 13, 20), torch.float32), ((2, 3, 4, 8), torch.bfloat16)], ids=str)
@each_mixer
def test_affine_norm(mixer, shape, dtype, device):
    x, parameters = make(mixer, shape, dtype, device)
    assert_matches_eager(mixer, x, parameters, norm="affine")
    assert_matches_eager(mixer, x, parameters | {"gamma": None, "b1": None}, norm="affine", gate="sigmoid")


def test_sigmoid_logits_far_apart(device):
    x, parameters = make("features", (2, 3, 4, 20), torch.float32, device)
    parameters["b_gate"] = 300.0 * torch.randn_like(parameters["b_gate"])
    assert_matches_eager("features", x, parameters, gate="sigmoid")


@each_mixer
def test_tiles_of_sm_90(mixer, device):
    assert_matches_eager(mixer, *make(mixer, (2, 3, 12, 40), torch.bfloat16, device), target="sm_90")


LAYOUTS = {
    "as eager leaves it": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels inside": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "slice": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@each_mixer
def test_layouts_are_read_as_they_are(mixer, layout, device):
    x, parameters = make(mixer, (2, 3, 5, 20), torch.float32, device)
    x = layout(x)
    before = x.clone()
    assert_matches_eager(mixer, x, parameters)
    assert torch.equal(x, before)


@each_mixer
def test_vectors_of_any_stride(mixer, device):
    """Norms and biases that are columns of a matrix."""
    x, parameters = make(mixer, (2, 3, 5, 20), torch.float32, device)
    expected = evaluate(mixer, x, parameters, "triton", x)
    columns = {
        k: torch.stack((t, torch.full_like(t, torch.nan)), -1)[:, 0] if t.dim() == 1 else t
        for k, t in parameters.items()
    }
    for what, actual in evaluate(mixer, x, columns, "triton", x).items():
        assert torch.equal(actual, expected[what]), what


@pytest.mark.parametrize(
    "absent", (("w_gate", "b_gate"), ("b_gate",), ("b1", "b2"), ("gamma", "beta"), ("gamma",)), ids=str
)
@each_mixer
def test_without_what_may_be_none(mixer, absent, device):
    x, parameters = make(mixer, (2, 3, 5, 20), torch.float32, device)
    assert_matches_eager(mixer, x, {**parameters, **dict.fromkeys(absent)}, approximate="tanh")


@pytest.mark.parametrize("stream", (torch.float32, torch.bfloat16), ids=str)
@each_mixer
def test_autocast(mixer, stream, device):
    x, parameters = make(mixer, (2, 3, 12, 40), torch.float32, device)
    x = x.to(stream)
    dy = torch.randn_like(x)
    with torch.autocast(device, torch.bfloat16):
        actual, eager = (evaluate(mixer, x, parameters, backend, dy) for backend in ("triton", "torch"))
    wide = {k: t.double() for k, t in parameters.items()}
    exact = reference(lambda: evaluate(mixer, x.double(), wide, "torch", dy.double()), stream, torch.bfloat16)
    assert_all_accurate(actual, eager, exact)


@pytest.mark.parametrize("mean", (0.0, 30.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each_mixer
def test_rows_without_variance_and_far_from_zero(mixer, dtype, mean, device):
    x, parameters = make(mixer, (2, 3, 5, 40), dtype, device)
    x = (x + mean).to(dtype)
    x[0, 0] = 0.1
    assert_matches_eager(mixer, x, parameters)


def test_logits_far_apart(device):
    """A softmax that is one element, where exponentials would overflow."""
    x, parameters = make("features", (2, 3, 4, 20), torch.float32, device)
    parameters["b_gate"] = 300.0 * torch.randn_like(parameters["b_gate"])
    assert_matches_eager("features", x, parameters)


def test_any_number_of_leading_axes(device):
    x, parameters = make("features", (2, 3, 4, 20), torch.float32, device)
    y = evaluate("features", x, parameters, "triton")["output"]
    assert torch.equal(evaluate("features", x[0, 0], parameters, "triton")["output"], y[0, 0])
    assert torch.equal(evaluate("features", x[None], parameters, "triton")["output"], y[None])


@pytest.mark.parametrize("mixer", ("channels", "features"))
def test_opcheck(mixer, device):
    x, parameters = make(mixer, (2, 3, 5, 20), torch.float32, device)
    fixed = [x, *parameters.values()]
    seed = torch.tensor([5], device=device)
    options = (*Options(eps=1e-5, dropout_p=0.2, seed=seed).inputs, "triton", MIXERS[mixer][0] + 4, MIXERS[mixer][1])
    tensors = [t.detach().requires_grad_(i % 2 == 0) for i, t in enumerate(fixed)]
    torch.library.opcheck(ops.gated_mixing, (*tensors, *options))
    torch.library.opcheck(ops.gated_mixing_backward, (torch.randn_like(x), *fixed, *options, [True] * 9))


def test_compiled_training_equals_eager(device):
    x, parameters = make("patches", (2, 3, 5, 20), torch.float32, device)

    def f(x, *values):
        return F.gated_mixing(x * 2, *values, axis=-2, backend="triton").square().mean()

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        return torch.autograd.grad(f(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(gradients(f), gradients(compiled), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_empty_batch_and_second_derivative(device):
    x, parameters = make("patches", (2, 3, 5, 20), torch.float32, device)
    empty = evaluate("patches", x[:0], parameters, "triton", x[:0])
    assert empty["output"].shape == (0, 3, 5, 20) and not empty["gradient of w1"].any()
    y = F.gated_mixing(x.requires_grad_(), **parameters, axis=-2, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative.*backend='torch'"):
        dx.sum().backward()


def test_launches(device):
    """One forward; four backward, beside the products of the weights' gradients; one that packs in each."""
    if device == "cuda":
        pytest.skip("waits for a machine without a GPU: counts in the strict interpreter")
    import strict_interpreter

    for mixer in MIXERS:
        x, parameters = make(mixer, (2, 3, 5, 20), torch.float32, device)
        with strict_interpreter.record() as launches:
            evaluate(mixer, x, parameters, "triton", x)
        backward = ["_row_statistics_kernel", "_pack_kernel", "_gated_mixing_bwd_kernel", "_norm_bwd_kernel"]
        backward.append("_sum_parts_kernel")
        assert [one.kernel for one in launches] == ["_pack_kernel", "_gated_mixing_kernel", *backward]


@pytest.mark.parametrize("wanted", (("x",), ("gamma", "beta"), ("w1",), ("b2", "w_gate")), ids=" ".join)
@each_mixer
def test_only_what_is_wanted(mixer, wanted, device):
    """A frozen parameter changes no gradient of another, and has none."""
    x, parameters = make(mixer, (2, 3, 5, 20), torch.float32, device)
    everything = evaluate(mixer, x, parameters, "triton", x)
    leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in {"x": x, **parameters}.items()}
    axis, gate_first = MIXERS[mixer]
    y = F.gated_mixing(*leaves.values(), axis=axis, gate_first=gate_first, backend="triton")
    y.backward(x)
    for k, leaf in leaves.items():
        assert (leaf.grad is not None) == (k in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, everything[f"gradient of {k}"])


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    (
        ({"axis": 0}, {}, "axis must be -1, -2 or -3, got 0"),
        ({"axis": -1}, {}, "built for 5 along axis -1, x has 20"),
        ({"axis": -2}, {"w_gate": torch.zeros(5, 4)}, r"w_gate must have shape \(5, 5\), got \(5, 4\)"),
        ({"axis": -2}, {"w_gate": None}, "b_gate is given without w_gate"),
        ({"axis": -2}, {"x": torch.zeros(20)}, r"x must have 2 axes or more to mix axis -2, got shape \(20,\)"),
    ),
    ids=("axis", "other extent", "gate's shape", "bias of no gate", "too few axes"),
)
def test_bad_arguments(options, changed, message):
    x, parameters = make("patches", (2, 3, 5, 20), torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        F.gated_mixing(**{"x": x, **parameters, **changed}, **options, backend="torch")


def test_axes_too_long_for_the_kernel(device):
    x, parameters = make("features", (1, 1, 2, 257), torch.float32, device)
    with pytest.raises(
        RuntimeError,
        match="backend='triton' cannot run: it has no kernels for an axis of 257, only up to 256; use backend='torch'",
    ):
        evaluate("features", x, parameters, "triton")
    evaluate("features", x, parameters, "auto")
