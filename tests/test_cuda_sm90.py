"""``backend="cuda:sm90"``: the kernels of csrc/sm90 over the shared matrix of inputs, and which inputs they leave.

On a machine without a GPU they run on the CPU's model of one, with asynchronous copies and products that land as late
as they may, at once, or at random. Their faults are caught by a driver of its own, driver_sm90.cpp.
"""

from __future__ import annotations

import contextlib

import pytest
import test_backward
import test_kernels
import test_noise
import torch
from accuracy import GRADIENT_FACTOR, assert_accurate, assert_all_accurate, reference
from blocks import make_block, make_x, run, run_exact
from cuda_on_host import build
from sm90_variants import PRODUCTS, SCHEDULES, ChannelProducts, TokenMixing
from test_backward import exact_gradients, gradients

import mixer_kernels.functional as F
from mixer_kernels.backends.arguments import Options
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS, Target, assume_target

BACKEND = "cuda:sm90"
BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = (FP16, BF16)
SHAPES = {
    "one token": MixerShape(S=1, C=40, D_S=20, D_C=72),
    "below a tile": MixerShape(S=7, C=8, D_S=3, D_C=9),
    "S/32": MixerShape(S=49, C=64, D_S=32, D_C=256),
    "64 tokens": MixerShape(S=64, C=128, D_S=64, D_C=128),
    "64 tokens + 1": MixerShape(S=65, C=136, D_S=65, D_C=136),
    "S/16": MixerShape(S=196, C=136, D_S=96, D_C=264),
    "S/16 + 5": MixerShape(S=201, C=72, D_S=50, D_C=70),
    "H/14": MixerShape(S=256, C=72, D_S=64, D_C=64),
    "beyond the fused kernel": MixerShape(S=257, C=40, D_S=24, D_C=48),
}
SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)
LONG = MixerShape(S=257, C=24, D_S=16, D_C=32)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ONE = Target("one multiprocessor", 232_448, 1)  # a block goes over all there is
MODEL_ONLY = "waits for a machine without a GPU: counts on the model"

on_model = pytest.mark.skipif(torch.cuda.is_available(), reason=MODEL_ONLY)
kernels = pytest.mark.usefixtures("hopper_kernels", "poisoned_memory")


@contextlib.contextmanager
def order(landing: str, device: str):
    """How copies and products land in the model, and for how many multiprocessors; a GPU has its own ways."""
    if device == "cuda":
        yield
        return
    with build.machine(landing=landing), assume_target(KNOWN_TARGETS["sm_90"] if landing == "random" else ONE):
        yield


# ------------------------------------------------------------------------------------------------ the shared matrix


@kernels
@pytest.mark.parametrize("landing", build.LANDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_eager(shape, dtype, landing, device):
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    with order(landing, device):
        actual = run(block, x, BACKEND)
    assert_accurate(actual, run(block, x, "torch"), run_exact(block, x))


@kernels
@pytest.mark.parametrize("landing", build.LANDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_match_eager(shape, dtype, landing, device):
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    memory = "min" if landing == "late" else "fast"
    dy = torch.randn_like(x)
    with order(landing, device):
        actual = gradients(block, x, dy, BACKEND, memory=memory)
    eager = gradients(block, x, dy, "torch")
    assert_all_accurate(actual, eager, exact_gradients(block, x, dy))


@kernels
@pytest.mark.parametrize("approximate", F.APPROXIMATIONS)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("affine", (True, False), ids=("affine", "no affine"))
def test_options(affine, bias, approximate, device):
    test_kernels.test_options(BACKEND, BF16, affine, bias, approximate, device)
    test_backward.test_options(BACKEND, BF16, bias, affine, approximate, device)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "check",
    [
        lambda dtype, device: test_kernels.test_half_an_affine(BACKEND, dtype, "gamma", device),
        lambda dtype, device: test_kernels.test_half_an_affine(BACKEND, dtype, "beta", device),
        lambda dtype, device: test_kernels.test_mean_far_from_zero(BACKEND, dtype, 30.0, device),
        lambda dtype, device: test_kernels.test_constant_rows(BACKEND, dtype, 72, device),
        lambda dtype, device: test_kernels.test_large_values(BACKEND, dtype, device),
        lambda dtype, device: test_kernels.test_nan_and_inf_come_out_where_eager_has_them(
            BACKEND, dtype, float("nan"), device
        ),
        lambda dtype, device: test_kernels.test_nan_and_inf_come_out_where_eager_has_them(
            BACKEND, dtype, float("inf"), device
        ),
    ],
    ids=["gamma", "beta", "mean", "constant", "large", "nan", "inf"],
)
def test_values(check, dtype, device):
    check(dtype, device)


@kernels
@pytest.mark.parametrize(
    "check",
    [
        lambda device: test_kernels.test_eps(1e-12, BACKEND, device),
        lambda device: test_kernels.test_two_eps(BACKEND, device),
        lambda device: test_kernels.test_small_gamma_in_half_precision(BACKEND, device),
        lambda device: test_kernels.test_empty_batch(BACKEND, BF16, device),
        lambda device: test_kernels.test_runs_agree_bit_for_bit(BACKEND, device),
        lambda device: test_kernels.test_an_image_does_not_see_its_batch(BACKEND, device),
        lambda device: test_backward.test_empty_batch(BACKEND, device),
        lambda device: test_backward.test_backward_twice_is_bit_identical(BACKEND, device),
        lambda device: test_backward.test_gradient_pairs_do_not_depend_on_memory_mode(BACKEND, device),
        lambda device: test_backward.test_a_second_derivative_raises(BACKEND, device),
        lambda device: test_noise.test_checkpointing_replays_the_masks(BACKEND, device),
        lambda device: test_noise.test_accuracy_with_every_image_kept(BACKEND, device),
    ],
    ids=[
        "eps", "two eps", "small gamma", "empty", "repeats", "batch", "backward of empty", "backward twice",
        "memory modes", "second derivative", "checkpointing", "every image kept",
    ],
)  # fmt: skip
def test_the_same_as_of_every_backend(check, device):
    check(device)


@kernels
@pytest.mark.parametrize("name", test_backward.NAMES)
def test_only_what_is_asked_for(name, device):
    test_backward.test_only_what_is_asked_for(name, False, BACKEND, device)


@kernels
@pytest.mark.parametrize("make", test_backward.GRADIENT_LAYOUTS.values(), ids=test_backward.GRADIENT_LAYOUTS.keys())
def test_incoming_gradients_of_any_layout(make, device):
    test_backward.test_incoming_gradients_of_any_layout(make, BACKEND, device)


@kernels
def test_statistics_of_the_block_are_merged_from_pieces(device):
    """LayerNorm behind token mixing, in one call: of u with a mean far from zero, in pieces of 64 channels."""
    shape = MixerShape(S=17, C=200, D_S=16, D_C=64)
    block, x = make_block(shape, BF16, device), make_x(2, shape, BF16, device, mean=30.0)
    block.parameters["w4"] *= 64  # so that the branch is not lost in the rounding of x
    assert_accurate(run(block, x, BACKEND), run(block, x, "torch"), run_exact(block, x))


# ------------------------------------------------------------------------------------------------------------- noise


@kernels
@pytest.mark.parametrize("options", ({"dropout_p": 0.4}, {"drop_path_p": 0.4}, {"dropout_p": 0.1, "drop_path_p": 0.2}))
@pytest.mark.parametrize("name", test_noise.HALVES)
def test_masks_are_those_of_all_kernels(name, options, device):
    ours, others = (test_noise.mask_of(name, SHAPE, device, backend, **options) for backend in (BACKEND, "cuda"))
    assert torch.equal(ours, others)
    assert ours.any() and not ours.all()


@kernels
@pytest.mark.parametrize(
    ("name", "memory"),
    (("token_mixing", {}), ("channel_mixing", {"memory": "fast"}), ("channel_mixing", {"memory": "min"})),
)
def test_gradients_under_the_masks(name, memory, device):
    test_noise.test_gradients_under_the_masks_of_the_triton_backend(name, SHAPE, memory, BACKEND, device)


@kernels
@pytest.mark.parametrize("name", test_noise.HALVES)
def test_stochastic_depth_drops_whole_images(name, device):
    test_noise.test_stochastic_depth_drops_whole_images(name, MixerShape(196, 72, 40, 96), "sm_90", BACKEND, device)


@kernels
@pytest.mark.parametrize("name", test_noise.HALVES)
def test_probability_zero_is_exact_and_one_is_the_input(name, device):
    test_noise.test_probability_zero_is_exact_and_one_is_the_input(name, BACKEND, device)


# --------------------------------------------------------------------------------------------- each of the variants


@kernels
@pytest.mark.parametrize("multiprocessors", (1, 3, 132))
@pytest.mark.parametrize("tokens", (49, 196, 204, 256))
def test_token_mixing_in_every_variant(tokens, multiprocessors, device):
    """Whichever cluster and number of consumers: as accurate, and all the same, bit for bit; with noise as well."""
    shape = MixerShape(S=tokens, C=136, D_S=130, D_C=8)
    block, x = make_block(shape, BF16, device), make_x(4, shape, BF16, device)
    seed = torch.tensor([12345], device=device)
    with assume_target(Target("sm_90", 232_448, multiprocessors)):
        mixing = TokenMixing(block, x)
        for noise in (Options(), Options(dropout_p=0.2, drop_path_p=0.4, seed=seed)):
            results = [mixing.run(variant, noise) for variant in mixing.variants]
            assert all(torch.equal(each, results[0]) for each in results)
            if not noise.noise:
                exact = reference(lambda mixing=mixing: mixing.expected(torch.float64), BF16)
                assert_accurate(results[0], mixing.expected(BF16), exact)


def test_a_variant_that_there_is_not_is_refused(hopper_kernels, device):
    shape = MixerShape(S=196, C=24, D_S=16, D_C=8)
    mixing = TokenMixing(make_block(shape, BF16, device), make_x(1, shape, BF16, device))
    for variant in ((3, 2, 1), (1, 3, 1), (1, 2, 3)):
        mixing.variants["wrong"] = variant
        with pytest.raises(RuntimeError, match="mk_sm90_token_mixing_forward: invalid argument"):
            mixing.run("wrong")


@kernels
@pytest.mark.parametrize("multiprocessors", (1, 7, 132))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_channel_products_on_every_schedule(product, dtype, multiprocessors, device):
    """Whichever tile and cluster: as accurate, and all with the same sums, bit for bit."""
    shape = MixerShape(S=61, C=136, D_S=8, D_C=392)
    block, u = make_block(shape, dtype, device), make_x(3, shape, dtype, device)
    with assume_target(Target("sm_90", 232_448, multiprocessors)):
        products = ChannelProducts(block, u)
        eager = products.expected(product, dtype)
        exact = reference(lambda: products.expected(product, torch.float64), dtype)
        results = {schedule: products.run(product, schedule) for schedule in SCHEDULES}
    first = next(iter(results.values()))
    for name in first:
        assert_accurate(first[name], eager[name], exact[name], GRADIENT_FACTOR, what=name)
        assert all(torch.equal(each[name], first[name]) for each in results.values()), name


@kernels
@pytest.mark.parametrize(("product", "drop_path_p"), [("fc1", 0.0), ("fc2", 0.3), ("gelu_backward", 0.0)])
def test_noise_on_every_schedule(product, drop_path_p, device):
    """Hidden units of images that are dropped are nobody's, and differ."""
    shape = MixerShape(S=49, C=72, D_S=8, D_C=200)
    block, u = make_block(shape, BF16, device), make_x(4, shape, BF16, device)
    seed = torch.tensor([12345], device=device)
    products = ChannelProducts(block, u, "tanh")
    results = [
        products.run(product, schedule, Options(dropout_p=0.2, drop_path_p=drop_path_p, seed=seed))
        for schedule in SCHEDULES
    ]
    for name, other in results[0].items():
        assert other.isfinite().all()
        assert all(torch.equal(each[name], other) for each in results), name
