"""``backend="cpu"`` in MLP-Mixer's blocks: the token half by the accuracy rule, and when ``auto`` takes it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from accuracy import assert_accurate
from blocks import LAYOUTS, make_block, make_x, run, run_exact
from test_cpu_backend import HALVES, isa  # noqa: F401  every test on every instruction set
from test_kernels import SHAPES, exact_half

import mixer_kernels.functional as F
from mixer_kernels import FusedMixerBlock, backends, freeze_
from mixer_kernels.shapes import MixerShape

CPU, DTYPE = "cpu", torch.float32
SMALL = MixerShape(S=20, C=40, D_S=16, D_C=48)
LARGE = MixerShape(S=49, C=72, D_S=24, D_C=96)  # at batch 12 x has more than 32,768 elements


def token_half(block, x, backend, **options):
    with torch.no_grad():
        return F.token_mixing(x, *block.token(), backend=backend, **options)


def assert_token_half_matches_eager(block, x, **options):
    actual, eager = (token_half(block, x, backend, **options) for backend in ("cpu", "torch"))
    assert_accurate(actual, eager, exact_half(F.token_mixing, x, block.token(), **options))
    assert actual.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_eager(shape):
    block, x = make_block(shape, DTYPE, CPU), make_x(2, shape, DTYPE, CPU)
    assert_token_half_matches_eager(block, x)
    assert_accurate(run(block, x, "cpu"), run(block, x, "torch"), run_exact(block, x))


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bits(dtype, monkeypatch):
    """Also where PyTorch's 16-bit products are emulated, and the channel half's are float32's."""
    block, x = make_block(LARGE, dtype, CPU), make_x(3, LARGE, dtype, CPU)
    assert_token_half_matches_eager(block, x)
    expected, exact = run(block, x, "torch"), run_exact(block, x)
    for emulated in (False, True):
        monkeypatch.setattr(backends.cpu, "emulates", lambda dtype, emulated=emulated: emulated)
        y = run(block, x, "cpu")
        assert y.dtype == dtype
        assert_accurate(y, expected, exact)


@pytest.mark.parametrize("emulated", (False, True))
@pytest.mark.parametrize("dtype", HALVES)
def test_auto_takes_it_in_16_bits_where_products_are_emulated(dtype, emulated, monkeypatch, isa):  # noqa: F811
    monkeypatch.setattr(backends.cpu, "emulates", lambda dtype: emulated)
    fused, x = FusedMixerBlock(72, 49, (1 / 3, 4 / 3), dtype=dtype).eval(), make_x(2, LARGE, dtype, CPU)
    results = {}
    with torch.no_grad():
        for name in ("auto", "cpu", "torch"):
            with backends.use_backend(name):
                results[name] = fused(x)
    assert not torch.equal(results["cpu"], results["torch"]), "the results cannot tell who made them"
    assert torch.equal(results["auto"], results["cpu" if emulated and isa != "baseline" else "torch"])
    x.requires_grad_()
    assert torch.equal(fused(x), results["torch"]), "in training"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("approximate", F.APPROXIMATIONS)
def test_layouts_are_read_as_they_are(approximate, layout):
    block, x = make_block(LARGE, DTYPE, CPU), make_x(3, LARGE, DTYPE, CPU, layout)
    before = x.clone()
    assert_token_half_matches_eager(block, x, approximate=approximate)
    assert torch.equal(x, before)


@pytest.mark.parametrize("affine", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_without_what_may_be_none(affine, bias):
    block, x = make_block(SMALL, DTYPE, CPU, affine, bias), make_x(2, SMALL, DTYPE, CPU)
    assert_token_half_matches_eager(block, x)


def test_parameters_of_any_strides():
    block, x = make_block(SMALL, DTYPE, CPU), make_x(2, SMALL, DTYPE, CPU)
    expected = run(block, x, "cpu")
    apart = {name: torch.stack((p, torch.full_like(p, torch.nan)), -1)[..., 0] for name, p in block.parameters.items()}
    assert torch.equal(token_half(dataclasses.replace(block, parameters=apart), x, "cpu"), token_half(block, x, "cpu"))
    assert_accurate(run(dataclasses.replace(block, parameters=apart), x, "cpu"), expected, run_exact(block, x))


def test_two_eps():
    block, x = make_block(SMALL, DTYPE, CPU), 1e-2 * make_x(2, SMALL, DTYPE, CPU)
    options = {"eps": (1e-5, 0.5)}
    assert_accurate(run(block, x, "cpu", **options), run(block, x, "torch", **options), run_exact(block, x, **options))


@pytest.mark.parametrize("mean", (3.0, 30.0))
def test_mean_far_from_zero(mean):
    shape = MixerShape(S=17, C=256, D_S=16, D_C=64)
    block, x = make_block(shape, DTYPE, CPU), make_x(2, shape, DTYPE, CPU, mean=mean)
    block.parameters["w2"] *= 64  # so that the branch is not lost in the rounding of x
    assert_token_half_matches_eager(block, x)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf_come_out_where_eager_has_them(value):
    block, x = make_block(SMALL, DTYPE, CPU), make_x(3, SMALL, DTYPE, CPU)
    x[1, 4, 7] = value
    actual, eager = (token_half(block, x, backend) for backend in ("cpu", "torch"))
    assert torch.equal(actual.isnan(), eager.isnan()) and eager.isnan().any() and eager[0].isfinite().all()


def test_empty_batch():
    block, x = make_block(SMALL, DTYPE, CPU), make_x(0, SMALL, DTYPE, CPU)
    assert run(block, x, "cpu").shape == token_half(block, x, "cpu").shape == (0, 20, 40)


@pytest.mark.parametrize(("batch_size", "channels"), [(1, 768), (3, 768), (1, 333), (2, 200), (1, 95)])
def test_results_do_not_depend_on_threads_or_the_batch(batch_size, channels):
    """Of few images a thread has some channels, beside the statistics of whole rows."""
    shape = MixerShape(S=9, C=channels, D_S=5, D_C=8)
    block, x = make_block(shape, DTYPE, CPU), make_x(batch_size, shape, DTYPE, CPU, "channel slice")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 64):
            torch.set_num_threads(threads)
            found += [token_half(block, x, "cpu"), torch.cat([token_half(block, one, "cpu") for one in x.split(1)])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
    assert_token_half_matches_eager(block, x)


def test_the_operators_statistics():
    block, x = make_block(SMALL, DTYPE, CPU), make_x(2, SMALL, DTYPE, CPU, mean=3.0)
    with torch.no_grad():
        u, mean, rstd = backends.load("cpu").token_mixing_forward(x, F.mixer.Half(*block.token()), F.mixer.Options())
    wide = x.double().flatten(0, 1)
    torch.testing.assert_close(mean, wide.mean(-1).float())
    torch.testing.assert_close(rstd, (wide.var(-1, correction=0) + 1e-6).rsqrt().float())
    assert torch.equal(u, token_half(block, x, "cpu"))


@pytest.mark.parametrize("what", ["gradients", "dropout", "stochastic depth", "swiglu"])
def test_what_it_does_not_do_is_said_or_runs_on_torch(what):
    block, x = make_block(LARGE, DTYPE, CPU), make_x(12, LARGE, DTYPE, CPU)
    options = {"dropout": {"dropout_p": 0.5}, "stochastic depth": {"drop_path_p": 0.5}}.get(what, {})
    token, both = block.token(), block.parameters
    if what == "gradients":
        x.requires_grad_()
    if what == "swiglu":
        token[4], both = token[4][:, ::2], both | {"w2": both["w2"][:, ::2], "w4": both["w4"][:, ::2]}
        options = {"activation": "swiglu"}
    for call in (
        lambda backend: F.token_mixing(x, *token, backend=backend, **options),
        lambda backend: F.mixer_block(x, **both, backend=backend, **options),
    ):
        with pytest.raises(RuntimeError, match="backend='cpu' cannot run: it has no kernels for .*'torch'") as raised:
            call("cpu")
        assert "'cuda'" not in str(raised.value), "what does not run here is no advice"
        results = []
        for backend in ("auto", "torch"):
            torch.manual_seed(0)
            results.append(call(backend))
        assert torch.equal(*results)


@pytest.fixture
def fused():
    torch.manual_seed(0)
    return FusedMixerBlock(72, 49, (1 / 3, 4 / 3)).eval().requires_grad_(False)


@pytest.mark.parametrize("batch_size", [2, 12])
def test_auto_takes_it_in_inference_of_large_inputs(batch_size, fused, isa):  # noqa: F811
    """With the vectors that were measured."""
    x = make_x(batch_size, LARGE, DTYPE, CPU)
    assert (x.numel() >= backends.LEAST_OF_A_MIXER) == (batch_size == 12)
    with backends.use_backend("torch"):
        eager = fused(x)
    with backends.use_backend("cpu"):
        kernels = fused(x)
    assert not torch.equal(kernels, eager), "the results cannot tell who made them"
    assert torch.equal(fused(x), kernels if batch_size == 12 and isa != "baseline" else eager)
    frozen = copy.deepcopy(fused)
    with backends.use_backend("cpu"):
        assert "cpu: 1 packs" in str(freeze_(frozen))
        assert torch.equal(frozen(x), kernels)


def test_auto_leaves_training_and_compilers_to_torch(fused):
    x = make_x(12, LARGE, DTYPE, CPU)
    with backends.use_backend("torch"):
        eager = fused(x)
    assert torch.equal(fused(x.clone().requires_grad_()), eager)
    program = torch.export.export(fused, (x,))
    assert not any("mixer_kernels" in str(node.target) for node in program.graph.nodes)
    with torch.autocast("cpu", torch.bfloat16):
        halves = fused(x)
        with backends.use_backend("torch"):
            assert torch.equal(halves, fused(x))


def test_a_write_is_seen(fused):
    x = make_x(12, LARGE, DTYPE, CPU)
    with backends.use_backend("cpu"):
        fused(x)
    fused.mlp_tokens.fc1.weight.data.mul_(2.0)
    fused.mlp_channels.fc2.weight.data.mul_(0.5)
    with backends.use_backend("torch"):
        eager = fused(x)
    with backends.use_backend("cpu"):
        torch.testing.assert_close(fused(x), eager, rtol=1e-5, atol=1e-5)
