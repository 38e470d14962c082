"""``backend="cuda:sm90"``: the kernels of csrc/sm90 over the shared matrix of inputs, and which inputs they leave.

On a machine without a GPU they run on the CPU's model of one, with asynchronous copies and products that land as late
as they may, at once, or at random. Their faults are caught by a driver of its own, driver_sm90.cpp.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_backward
import test_kernels
import test_noise
import torch
from accuracy import GRADIENT_FACTOR, assert_accurate
from blocks import LAYOUTS, Watched, make_block, make_x, run, run_exact
from cuda_on_host import build
from sm90_variants import PRODUCTS, SCHEDULES, ChannelProducts, TokenMixing
from test_backward import assert_gradients, gradients
from test_ops import NAMES, arguments

import mixer_kernels.functional as F
from mixer_kernels import backends, info, ops
from mixer_kernels.backends import measured, registry
from mixer_kernels.backends.cuda import library
from mixer_kernels.backends.noise import Noise
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
    exact = gradients(block.to(torch.float64), x.double(), dy.double(), "torch")
    for name in exact:
        assert_accurate(actual[name], eager[name], exact[name], GRADIENT_FACTOR, what=f"gradient of {name}")


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
@pytest.mark.parametrize("memory", F.MEMORY_MODES)
@pytest.mark.parametrize("name", test_noise.HALVES)
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
        for noise in (Noise(), Noise(0.2, 0.4, seed)):
            results = [mixing.run(variant, noise) for variant in mixing.variants]
            assert all(torch.equal(each, results[0]) for each in results)
            if not noise.on_branch:
                assert_accurate(results[0], mixing.expected(BF16), mixing.expected(torch.float64))


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
        eager, exact = (products.expected(product, each) for each in (dtype, torch.float64))
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
    results = [products.run(product, schedule, Noise(0.2, drop_path_p, seed)) for schedule in SCHEDULES]
    for name, other in results[0].items():
        assert other.isfinite().all()
        assert all(torch.equal(each[name], other) for each in results), name


# ------------------------------------------------------------------------------------ what runs, and on which kernels


@contextlib.contextmanager
def products_counted():
    """[products by mma, products by wgmma] of what runs inside."""
    counted = [0, 0]
    before = build.matrix_products(), build.warpgroup_products()
    yield counted
    wgmma = build.warpgroup_products() - before[1]
    counted[:] = build.matrix_products() - before[0] - wgmma, wgmma


@on_model
@kernels
@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_all_that_they_take_is_theirs(memory):
    """Forward and for the gradient of x: not one product by mma."""
    block, x = make_block(SHAPE, BF16, "cpu"), make_x(2, SHAPE, BF16, "cpu").requires_grad_()
    with products_counted() as counted:
        run(block, x, BACKEND)
        F.mixer_block(x, **block.parameters, backend=BACKEND, memory=memory).sum().backward()
    assert counted[0] == 0 < counted[1]
    with products_counted() as counted:
        run(block, x, "cuda")
    assert counted[1] == 0 < counted[0]


@on_model
@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_other_layouts_the_channel_half_alone_is_theirs(layout):
    """u, which lies between the halves, is contiguous whatever x is."""
    block, x = make_block(SHAPE, BF16, "cpu"), make_x(2, SHAPE, BF16, "cpu", layout)
    with products_counted() as counted:
        actual = run(block, x, BACKEND)
    assert (counted[0] > 0) == (layout != "contiguous") and counted[1] > 0
    assert_accurate(actual, run(block, x, "torch"), run_exact(block, x))
    assert_gradients(block, x, BACKEND)


VIEWS = {
    "some tokens": lambda t: t[:, :20],
    "each other token": lambda t: t[:, ::2],
    "each other image": lambda t: t[::2],
    "some channels": lambda t: t[..., 24:],
    "images innermost": lambda t: t.transpose(0, 1),
    "one image": lambda t: t[:1].expand(3, -1, -1),
    "one token": lambda t: t[:, :1],
    "the same token": lambda t: t[:, :1].expand(-1, 20, -1),
}


@kernels
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views(view, device):
    """Of a larger tensor: each half by itself, with the kernels that take the view."""
    x = view(torch.randn(6, 40, 48, device=device).to(BF16))
    shape = MixerShape(S=x.shape[1], C=x.shape[2], D_S=16, D_C=32)
    block = make_block(shape, BF16, device)
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        with torch.no_grad():
            actual, eager = (half(x, *parameters, backend=backend) for backend in (BACKEND, "torch"))
            exact = half(x.double(), *[p.double() for p in parameters], backend="torch")
        assert_accurate(actual, eager, exact, what=half.__name__)


@on_model
@kernels
@pytest.mark.parametrize("shape", (MixerShape(20, 25, 16, 32), MixerShape(257, 25, 16, 32)), ids=("fused", "long"))
def test_odd_channels_are_left_to_the_other_kernels(shape):
    block, x = make_block(shape, BF16, "cpu"), make_x(2, shape, BF16, "cpu")
    dy = torch.randn_like(x)
    with products_counted() as counted:
        actual, expected = (run(block, x, backend) for backend in (BACKEND, "cuda"))
        ours, theirs = (gradients(block, x, dy, backend) for backend in (BACKEND, "cuda"))
    assert torch.equal(actual, expected) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert counted[1] == 0 < counted[0]


@on_model
@kernels
def test_a_float32_stream_is_left_to_the_other_kernels():
    """But for GELU backward of the channel half, which reads the gradient of the branch, in the products' dtype."""
    block, x = make_block(SHAPE, torch.float32, "cpu"), make_x(2, SHAPE, torch.float32, "cpu")
    with torch.autocast("cpu", BF16), products_counted() as counted:
        actual, expected = (run(block, x, backend) for backend in (BACKEND, "cuda"))
    assert torch.equal(actual, expected) and counted[1] == 0 < counted[0]
    with products_counted() as counted:
        test_backward.test_autocast(BF16, torch.float32, BACKEND, "cpu")
    assert counted[0] > counted[1] > 0


@on_model
@kernels
@pytest.mark.parametrize(
    ("shape", "dy_offset", "by_mma"),
    [
        (MixerShape(20, 24, 16, 21), 0, False),  # rows of dz and a start between 16 bytes: stored by elements
        (MixerShape(20, 24, 16, 24), 0, False),
        (MixerShape(20, 24, 16, 24), 1, True),  # and so does the incoming gradient: read by the other kernels
    ],
)
def test_gradients_that_tma_cannot_read_or_write(shape, dy_offset, by_mma):
    block, x = make_block(shape, BF16, "cpu"), make_x(2, shape, BF16, "cpu")
    dy = torch.randn(x.numel() + dy_offset).to(BF16)[dy_offset:].view(x.shape)
    assert_gradients(block, x, BACKEND, dy=dy)
    x.requires_grad_()
    y = F.channel_mixing(x, *block.channel(), backend=BACKEND)
    with products_counted() as counted:
        y.backward(dy)
    assert (counted[0] > 0) == by_mma


@on_model
@kernels
@pytest.mark.parametrize(("shape", "launches"), ((SHAPE, 5), (LONG, 6)), ids=("fused", "long"))
def test_a_block_is_five_launches(shape, launches):
    """Row statistics, token mixing, the statistics that it left, fc1, fc2; for more than 256 tokens as on cuda."""
    block, x = make_block(shape, BF16, "cpu"), make_x(2, shape, BF16, "cpu")
    run(block, x, BACKEND)  # prepacks the weights
    before = build.launches()
    run(block, x, BACKEND)
    assert build.launches() - before == launches


@kernels
def test_a_block_is_one_call_and_packs_are_kept_apart(hopper_kernels, device):
    watched = Watched(hopper_kernels)
    library.install(watched)
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    for backend in (BACKEND, "cuda"):
        first = run(block, x, backend)
        watched.calls.clear()
        assert torch.equal(run(block, x, backend), first)
        assert watched.calls == ["mixer_block_forward"]


@on_model
@kernels
def test_a_launch_that_fails_raises_with_its_name():
    block, x = make_block(SHAPE, BF16, "cpu"), make_x(2, SHAPE, BF16, "cpu")
    run(block, x, BACKEND)  # prepacks the weights
    for half, parameters, name in (
        (F.token_mixing, block.token(), "mk_sm90_token_mixing_forward"),
        (F.channel_mixing, block.channel(), "mk_sm90_channel_fc1_forward"),
    ):
        with (
            build.machine(shared_limit=16 << 10),
            torch.no_grad(),
            pytest.raises(RuntimeError, match=f"{name}: .*error 9"),
        ):
            half(x, *parameters, backend=BACKEND)


@kernels
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    torch.library.opcheck(getattr(ops, name), arguments(block, x, name, backend=BACKEND))


@kernels
def test_compiled_training_equals_eager(device):
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    names = list(block.parameters)

    def f(x, *parameters):
        y = F.mixer_block(x * 2, **dict(zip(names, parameters, strict=True)), backend=BACKEND)
        return y.square().mean()

    def run_and_differentiate(function):
        leaves = [t.detach().requires_grad_() for t in (x, *block.parameters.values())]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(run_and_differentiate(f), run_and_differentiate(compiled), strict=True):
        assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------------------ who may run


def built(**attributes):
    """What a module built by CUDA 12.8 says of itself, on a machine with a driver for it."""
    from test_cuda_backend import built as built_for_all

    return built_for_all(**{"sm90_sources": "0123456789ab", **attributes})


@pytest.fixture
def installed(monkeypatch):
    """``installed(capability, measured, **attributes)``: a module on a GPU, and what measured.json says."""

    def install(capability, recorded=None, **attributes):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(measured, "_measured", lambda: recorded or {})
        monkeypatch.setattr(torch.version, "hip", None)
        library.install(built(**attributes))

    yield install
    library.install(None)


@pytest.mark.parametrize(
    ("capability", "attributes", "reason"),
    [
        ((9, 0), {}, None),
        ((8, 0), {}, "need compute capability 9.0, got 8.0; use backend='cuda'"),
        ((10, 0), {"architectures": ("90a", "100")}, "need compute capability 9.0, got 10.0; use backend='cuda'"),
        ((9, 0), {"architectures": ("80", "90")}, "built for 80, 90, the Hopper kernels need 90a: build with "
         "MIXER_KERNELS_CUDA_ARCHS=90a; use backend='cuda'"),
        ((9, 0), {"architectures": ("100",), "ptx": ()}, "built for 100, this GPU is 90"),
        ((9, 0), {"driver_version": lambda: 11080}, "the driver is for CUDA 11.8"),
    ],
)  # fmt: skip
def test_the_gpu_has_to_be_a_hopper_and_the_build_for_it(capability, attributes, reason, installed):
    installed(capability, **attributes)
    actual = backends.why_not(BACKEND, CUDA, BF16)
    assert actual is None if reason is None else reason in actual, actual
    assert "16-bit products" in (backends.why_not(BACKEND, CUDA, torch.float32) or "") or reason is not None
    if reason is not None:
        with pytest.raises(RuntimeError, match=f"backend='cuda:sm90' cannot run: .*{re.escape(reason)}"):
            registry.choose(BACKEND, "cuda", 0, BF16)


@pytest.mark.parametrize(
    ("capability", "recorded", "attributes", "expected"),
    [
        ((9, 0), {}, {}, False),
        ((9, 0), {"cuda:sm90": {"NVIDIA H200": "0123456789ab"}}, {}, True),  # any GPU of that kind will do
        ((9, 0), {"cuda:sm90": {"NVIDIA H200": "of other sources"}}, {}, False),
        ((9, 0), {"cuda": ["NVIDIA H200"], "triton": ["NVIDIA H200"]}, {}, False),
        ((9, 0), {"cuda:sm90": {"NVIDIA H200": "0123456789ab"}}, {"architectures": ("80", "90")}, False),
        ((8, 0), {"cuda:sm90": {"NVIDIA H200": "0123456789ab"}}, {}, False),
        ((9, 0), {"cuda:sm90": {"NVIDIA H200": "0123456789ab"}}, {"on_host": True}, False),
    ],
)
def test_cuda_uses_them_once_they_have_passed_on_a_gpu(capability, recorded, attributes, expected, installed):
    installed(capability, recorded, **attributes)
    assert library.sm90_by_default(CUDA) is expected


@kernels
@pytest.mark.parametrize("passed", (False, True))
def test_cuda_computes_with_them_where_that_is_the_default(passed, device, monkeypatch):
    monkeypatch.setattr(library, "sm90_by_default", lambda device: passed)
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    dy = torch.randn_like(x)
    theirs = gradients(block, x, dy, BACKEND)
    ours = gradients(block, x, dy, "cuda")
    equal = torch.equal(run(block, x, "cuda"), run(block, x, BACKEND))
    assert (equal and all(torch.equal(ours[name], theirs[name]) for name in ours)) or not passed
    if device == "cpu":
        with products_counted() as counted:
            run(block, x, "cuda")
        assert (counted[0] == 0) == passed


@pytest.mark.parametrize(
    ("recorded", "attributes", "line"),
    [
        ({}, {}, "opt-in, backend='cuda:sm90': no run of these sources on a GPU is recorded"),
        ({"cuda:sm90": {"NVIDIA H200": "0123456789ab", "NVIDIA H100 PCIe": "older"}}, {},
         "used by backend 'cuda' on compute capability 9.0: passed on NVIDIA H200"),
        ({}, {"sm90_sources": "", "architectures": ("80",)}, "not built: 90a is not among the architectures"),
        ({}, {"on_host": True}, "opt-in: backend='cuda:sm90'"),
    ],
)  # fmt: skip
def test_info_says_whether_they_are_opt_in(recorded, attributes, line, installed, capsys):
    installed((9, 0), recorded, __file__="/here/_C.so", **attributes)
    info.main([])
    assert f"Hopper kernels {line}" in capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------------------------------- sanitizers, planted bugs


@pytest.mark.parametrize(("sanitizer", "runs"), [(None, "6"), ("address,undefined", "2"), ("thread", "1")])
def test_launchers(sanitizer, runs) -> None:
    """Every launcher over small shapes, in so many orders: driver_sm90.cpp."""
    result = build.run(build.build_driver(sanitizer, name="driver_sm90"), runs)
    assert result.returncode == 0, result.stdout


WAIT = "            wgmma_wait<0>();\n            keep(o);\n"
RELEASE = "            release_item(item + 1);\n"
FENCED = "fence_async_shared();\n        named_barrier_sync"
PLANTED = {  # file of csrc/sm90, what is there, what is planted, what the driver says
    "descriptor's stride, of hidden units": (
        "token_unit.cuh", "(tile, 16, 8 * static_cast<int>(S))", "(tile, 16, 4 * static_cast<int>(S))", "u of sm90"),
    "descriptor's stride, of a stage": (
        "product.cuh", "(right + place.stage * L::kStage, 16, 8 * kStepBytes)",
        "(right + place.stage * L::kStage, 16, 4 * kStepBytes)", "a of sm90"),
    "descriptor's step": (
        "token_data_gradient.cu", "<G::kSwizzle>(w1, k)", "<G::kSwizzle>(w1, 2 * k)",
        "dn of sm90|pattern of an operand"),
    "parity of what has left": (
        "token_data_gradient.cu", "staged_empty(consumer_), staged_parity_ ^ 1",
        "staged_empty(consumer_), staged_parity_", "deadlock"),
    "parity after the other's tile": (
        "product_tile.cuh", "parity ^= to / stages & 1;", "", "of sm90|deadlock|has landed"),
    "bytes of the bias not expected": (
        "token_mixing_block.cuh", "next_slot(F::kW1Bytes + F::kB1Bytes);", "next_slot(F::kW1Bytes);",
        "u of sm90|deadlock|has landed"),
    "bytes of the rows not expected": (
        "product.cuh", "barrier_expect(full, L::kStage);", "barrier_expect(full, L::kStage - L::kLeft);",
        "of sm90|deadlock|has landed"),
    "fence before u leaves": (
        "token_mixing.cu", FENCED + "(barrier, kConsumerThreads);\n        store(out",
        "named_barrier_sync(barrier, kConsumerThreads);\n        store(out", "no fence_async_shared"),
    "fence before n is multiplied": (
        "token_data_gradient.cu", FENCED + "(1 + consumer_", "named_barrier_sync(1 + consumer_",
        "no fence_async_shared"),
    "fence before chunks leave": (
        "product_results.cuh", "        fence_async_shared();\n        if (thread_ == 0) store_wait",
        "        if (thread_ == 0) store_wait", "no fence_async_shared"),
    "weights released before they are multiplied": (
        "token_mixing.cu", WAIT + RELEASE, RELEASE + WAIT, "u of sm90 .* is -?nan"),
    "stage released before it is multiplied": (
        "product.cuh", "        wgmma_wait<1>();\n        if (step > 0) release(before);\n",
        "        if (step > 0) release(before);\n        wgmma_wait<1>();\n", "of sm90.* is -?nan"),
    "statistics read past S": (
        "token_unit.cuh", "if (unit.exists && s < size.S)", "if (unit.exists)", "u of sm90 .* is -?nan"),
    "statistics written past S": (
        "token_mixing.cu", "s < size.S; s += kConsumerThreads", "s <= size.S; s += kConsumerThreads",
        "partial: a write|of u, merged"),
    "sums past D_C": (
        "channel_gelu_backward.cu", "chunk.n + column < p.N &&", "chunk.n + column <= p.N &&", "sums of dz|db3"),
    "elements past D_C": (
        "channel_gelu_backward.cu", "|| n + column >= N) continue", ") continue", "dz of sm90|a again"),
    "weights of dropped images not skipped": (
        "token_data_gradient.cu", "if (turn.works(noise_)) skip(chunks);", "", "deadlock|has landed"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the driver says of each bug; two at a time, for most change one file."""
    faulty = tmp_path_factory.mktemp("faulty")  # not by the threads: pytest's folders are made by one at a time

    def output(bug: str) -> str:
        name, old, new, _ = PLANTED[bug]
        csrc = faulty / bug.replace(" ", "_") / "csrc"
        shutil.copytree(build.CSRC, csrc)
        text = (csrc / "sm90" / name).read_text()
        assert text.count(old) == 1, f"{bug}: {name} has changed, bring the test up to date"
        (csrc / "sm90" / name).write_text(text.replace(old, new))
        result = build.run(build.build_driver(csrc=csrc, name="driver_sm90"))
        return result.stdout if result.returncode != 0 else "nothing"

    with ThreadPoolExecutor(2) as workers:
        return dict(zip(PLANTED, workers.map(output, PLANTED), strict=True))


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_noticed(planted, bug) -> None:
    assert re.search(PLANTED[bug][3], planted[bug]), planted[bug]
