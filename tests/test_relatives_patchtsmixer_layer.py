"""``gated_mixer_layer``, a PatchTSMixer layer in one kernel, by the accuracy rule, forward and backward."""

from __future__ import annotations

from functools import partial

import evaluation
import pytest
import torch
from accuracy import assert_all_accurate, reference
from test_relatives_patchtsmixer import LAYOUTS, make

import mixer_kernels.functional as F
from mixer_kernels import ops
from mixer_kernels.backends.arguments import Options
from mixer_kernels.functional import time_series

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

RENAMED = {"w1": "w3", "b1": "b3", "w2": "w4", "b2": "b4"}

CASES = {  # batch, channels, patches, features; and the kernels of a forward pass
    "small, float32": ((2, 3, 4, 8), torch.float32, 1),
    "small, bfloat16": ((2, 3, 4, 8), torch.bfloat16, 1),
    "odd, float16": ((2, 3, 13, 20), torch.float16, 1),
    "wide, bfloat16": ((2, 2, 12, 192), torch.bfloat16, 1),
    "full, float32": ((1, 2, 33, 30), torch.float32, 1),
    "full, bfloat16": ((1, 2, 64, 64), torch.bfloat16, 1),
    "large, bfloat16": ((1, 2, 64, 72), torch.bfloat16, 2),
}


def make_layer(shape, dtype, device):
    """x and the parameters of a layer: of what mixes patches, then of what mixes features."""
    x, of_patches = make("patches", shape, dtype, device)
    _, of_features = make("features", shape, dtype, device)
    first = {k if k in RENAMED else f"{k}1": t for k, t in of_patches.items()}
    return x, first | {RENAMED.get(k, f"{k}2"): t for k, t in of_features.items()}


def evaluate(x, parameters, backend, dy=None, **options):
    return evaluation.evaluate(F.gated_mixer_layer, x, parameters, dy, **options, backend=backend)


assert_matches_eager = partial(evaluation.assert_matches_eager, evaluate)


@pytest.mark.parametrize(("shape", "dtype", "_"), CASES.values(), ids=CASES.keys())
def test_matches_eager(shape, dtype, _, device):
    """Each mixer has an eps of its own."""
    assert_matches_eager(*make_layer(shape, dtype, device), eps=(1e-5, 0.1))


@pytest.mark.parametrize(("shape", "dtype", "_"), list(CASES.values())[1::4], ids=list(CASES)[1::4])
def test_sigmoid_gates(shape, dtype, _, device):
    assert_matches_eager(*make_layer(shape, dtype, device), gate="sigmoid")


@pytest.mark.parametrize(("shape", "dtype", "_"), list(CASES.values())[1::5], ids=list(CASES)[1::5])
def test_affine_norms(shape, dtype, _, device):
    assert_matches_eager(*make_layer(shape, dtype, device), norm="affine")


def test_tiles_of_sm_90(device):
    assert_matches_eager(*make_layer((2, 2, 12, 40), torch.bfloat16, device), target="sm_90")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_are_read_as_they_are(layout, device):
    x, parameters = make_layer((2, 2, 13, 20), torch.float32, device)
    x = layout(x)
    before = x.clone()
    assert_matches_eager(x, parameters)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "absent",
    (("w_gate1", "b_gate1"), ("w_gate2", "b_gate2"), ("b_gate1", "b3"), ("b1", "b2", "b4"), ("gamma1", "beta2")),
    ids=str,
)
def test_without_what_may_be_none(absent, device):
    x, parameters = make_layer((2, 2, 13, 20), torch.float32, device)
    assert_matches_eager(x, {**parameters, **dict.fromkeys(absent)}, approximate="tanh", eps=(1e-3, 1e-6))


@pytest.mark.parametrize("stream", (torch.float32, torch.bfloat16), ids=str)
def test_autocast(stream, device):
    x, parameters = make_layer((2, 2, 12, 40), torch.float32, device)
    x = x.to(stream)
    dy = torch.randn_like(x)
    with torch.autocast(device, torch.bfloat16):
        actual, eager = (evaluate(x, parameters, backend, dy) for backend in ("triton", "torch"))
    wide = {k: t.double() for k, t in parameters.items()}
    exact = reference(lambda: evaluate(x.double(), wide, "torch", dy.double()), stream, torch.bfloat16)
    assert_all_accurate(actual, eager, exact)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_without_variance_and_far_from_zero(dtype, device):
    x, parameters = make_layer((2, 2, 13, 40), dtype, device)
    x = (x + 30).to(dtype)
    x[0, 0] = 0.1
    assert_matches_eager(x, parameters)


def test_dropout_is_that_of_two_mixers(device, monkeypatch):
    """Forward and backward, under the same two seeds; a mixer's masks are tested for themselves."""
    seeds = torch.tensor([5, 6], device=device)
    x, parameters = make_layer((1, 4, 10, 20), torch.float32, device)
    dy = torch.randn_like(x)

    def draw(of_a_mixer):
        left = iter(seeds.split(1))
        monkeypatch.setattr(
            time_series,
            "seeded",
            lambda x, options, number=1: options._replace(seed=next(left) if of_a_mixer else seeds),
        )

    def layer(x, *parameters):
        draw(of_a_mixer=False)
        return F.gated_mixer_layer(x, *parameters, dropout_p=0.3, backend="triton")

    def mixers(x, *parameters):
        draw(of_a_mixer=True)
        u = F.gated_mixing(x, *parameters[:8], axis=-2, dropout_p=0.3, backend="triton")
        return F.gated_mixing(u, *parameters[8:], axis=-1, dropout_p=0.3, backend="triton")

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        y = f(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    for actual, expected in zip(gradients(layer), gradients(mixers), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_dropout_draws_two_seeds_a_call(device):
    x, parameters = make_layer((1, 4, 10, 20), torch.float32, device)

    def call(seed=None, p=0.3):
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            return F.gated_mixer_layer(x, **parameters, dropout_p=p, backend="triton")

    seeds = time_series.seeded(x, Options(dropout_p=0.3), 2).seed
    assert seeds[0] != seeds[1]
    first, following = call(3), call()
    assert torch.equal(call(3), first) and not torch.equal(following, first)
    assert torch.equal(call(p=1.0), x)


@pytest.mark.parametrize("wanted", (("x",), ("gamma1",), ("w3", "b_gate2"), ("beta2", "w2")), ids=" ".join)
def test_only_what_is_wanted(wanted, device):
    """A frozen parameter changes no gradient of another, and has none."""
    x, parameters = make_layer((2, 5, 6, 20), torch.float32, device)
    everything = evaluate(x, parameters, "triton", x)
    leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in {"x": x, **parameters}.items()}
    F.gated_mixer_layer(*leaves.values(), backend="triton").backward(x)
    for k, leaf in leaves.items():
        assert (leaf.grad is not None) == (k in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, everything[f"gradient of {k}"])


BACKWARD_OF_A_MIXER = ["_row_statistics_kernel", "_pack_kernel", "_gated_mixing_bwd_kernel", "_norm_bwd_kernel"]


@pytest.mark.parametrize("case", ("small, bfloat16", "large, bfloat16"))
def test_launches(case, device):
    """One forward for a small layer, two for a large; memory="min" computes u once more; one packs for each."""
    if device == "cuda":
        pytest.skip("waits for a machine without a GPU: counts in the strict interpreter")
    import strict_interpreter

    shape, dtype, forward = CASES[case]
    x, parameters = make_layer(shape, dtype, device)
    kernels = ["_gated_mixer_layer_kernel"] if forward == 1 else 2 * ["_gated_mixing_kernel"]
    for memory, again in (("fast", []), ("min", ["_pack_kernel", "_gated_mixing_kernel"])):
        with strict_interpreter.record() as launches:
            evaluate(x, parameters, "triton", x, memory=memory)
        backward = [*2 * BACKWARD_OF_A_MIXER, "_sum_parts_kernel"]
        assert [one.kernel for one in launches] == ["_pack_kernel", *kernels, *again, *backward]


def test_u_computed_again_is_the_u_that_was_kept(device):
    x, parameters = make_layer((1, 4, 10, 20), torch.float32, device)
    results = {}
    for memory in ("fast", "min"):
        torch.manual_seed(5)
        results[memory] = evaluate(x, parameters, "triton", x, memory=memory, dropout_p=0.3, eps=(0.1, 1e-6))
    for what, expected in results["fast"].items():
        torch.testing.assert_close(results["min"][what], expected, rtol=1e-5, atol=1e-5)


def test_memory_is_what_it_says(device):
    """What autograd keeps beside the parameters: x and u, or x."""
    x, parameters = make_layer((2, 2, 13, 20), torch.float32, device)
    for memory, expected in (("fast", 2), ("min", 1)):
        kept = []
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        known = {leaf.data_ptr() for leaf in leaves[1:]}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            F.gated_mixer_layer(*leaves, memory=memory, backend="triton")
        assert sum(t.shape == x.shape and t.data_ptr() not in known for t in kept) == expected


def test_any_number_of_leading_axes(device):
    x, parameters = make_layer((2, 3, 4, 20), torch.float32, device)
    y = evaluate(x, parameters, "triton")["output"]
    assert torch.equal(evaluate(x[0, 0], parameters, "triton")["output"], y[0, 0])
    assert torch.equal(evaluate(x[None], parameters, "triton")["output"], y[None])


def test_opcheck(device):
    x, parameters = make_layer((1, 2, 4, 8), torch.float32, device)
    fixed = [x, *parameters.values()]
    seed = torch.tensor([5, 6], device=device)
    options = (*Options(eps=1e-5, dropout_p=0.2, seed=seed).inputs, "triton", 1e-6)
    tensors = [t.detach().requires_grad_(i % 2 == 0) for i, t in enumerate(fixed)]
    for keep_u in (True, False):
        torch.library.opcheck(ops.gated_mixer_layer, (*tensors, *options, keep_u))
    torch.library.opcheck(
        ops.gated_mixer_layer_backward,
        (torch.randn_like(x), torch.randn_like(x), *fixed, *options, True, [True] * 17),
    )


def test_compiled_training_equals_eager(device):
    x, parameters = make_layer((2, 5, 6, 20), torch.float32, device)

    def f(x, *values):
        return F.gated_mixer_layer(x * 2, *values, backend="triton").square().mean()

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters.values())]
        return torch.autograd.grad(f(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(gradients(f), gradients(compiled), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_empty_batch_and_second_derivative(device):
    x, parameters = make_layer((2, 5, 6, 20), torch.float32, device)
    empty = evaluate(x[:0], parameters, "triton", x[:0])
    assert empty["output"].shape == (0, 5, 6, 20) and not empty["gradient of w1"].any()
    y = F.gated_mixer_layer(x.requires_grad_(), **parameters, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative.*backend='torch'"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"x": torch.zeros(20)}, r"x must have 2 axes or more, patches and features, got shape \(20,\)"),
        ({"x": torch.zeros(2, 5, 7, 20)}, "built for 6 along axis -2, x has 7"),
        ({"w3": torch.zeros(40, 19)}, r"w3 has shape \(40, 19\): built for 19 along axis -1, x has 20"),
        ({"gamma2": torch.zeros(19)}, r"gamma2 has shape \(19,\), expected \(20,\): x has 20 channels"),
        ({"w_gate1": torch.zeros(6, 5)}, r"w_gate1 must have shape \(6, 6\), got \(6, 5\)"),
        ({"w_gate2": None}, "b_gate2 is given without w_gate2"),
        ({"memory": "most"}, "memory must be one of 'fast', 'min', got 'most'"),
    ),
    ids=("too few axes", "patches", "features", "norm", "gate's shape", "bias of no gate", "memory"),
)
def test_bad_arguments(changed, message):
    x, parameters = make_layer((2, 5, 6, 20), torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        F.gated_mixer_layer(**{"x": x, **parameters, **changed}, backend="torch")


def test_axes_too_long_for_the_kernels(device):
    x, parameters = make_layer((1, 1, 2, 257), torch.float32, device)
    with pytest.raises(
        RuntimeError,
        match="backend='triton' cannot run: it has no kernels for an axis of 257, only up to 256; use backend='torch'",
    ):
        evaluate(x, parameters, "triton")
    evaluate(x, parameters, "auto")
