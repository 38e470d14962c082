"""Which inputs the kernels of csrc/sm90 take, what the others compute then, and who may run them."""

from __future__ import annotations

import contextlib
import re

import pytest
import test_backward
import torch
from accuracy import assert_accurate
from blocks import LAYOUTS, Watched, make_block, make_x, run, run_exact
from cuda_on_host import build
from test_backward import assert_gradients, gradients
from test_cuda_sm90 import BACKEND, BF16, SHAPE, kernels
from test_kernels import exact_half
from test_ops import NAMES, arguments

import mixer_kernels.functional as F
from mixer_kernels import backends, info, ops
from mixer_kernels.backends import measured, registry
from mixer_kernels.backends.cuda import library
from mixer_kernels.shapes import MixerShape

LONG = MixerShape(S=257, C=24, D_S=16, D_C=32)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MODEL_ONLY = "waits for a machine without a GPU: counts on the model"

on_model = pytest.mark.skipif(torch.cuda.is_available(), reason=MODEL_ONLY)


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
        assert_accurate(actual, eager, exact_half(half, x, parameters), what=half.__name__)


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
@pytest.mark.parametrize(("shape", "launches"), ((SHAPE, 6), (LONG, 7)), ids=("fused", "long"))
def test_a_block_is_six_launches(shape, launches):
    """The pack, row statistics, token mixing, the statistics that it left, fc1, fc2; over 256 tokens as on cuda."""
    block, x = make_block(shape, BF16, "cpu"), make_x(2, shape, BF16, "cpu")
    before = build.launches()
    run(block, x, BACKEND)
    assert build.launches() - before == launches


@kernels
def test_a_block_is_a_pack_and_a_call(hopper_kernels, device):
    watched = Watched(hopper_kernels)
    library.install(watched)
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    run(block, x, BACKEND)
    assert watched.calls == ["pack_weights", "mixer_block_forward"]


@on_model
@kernels
def test_a_launch_that_fails_raises_with_its_name():
    block, x = make_block(SHAPE, BF16, "cpu"), make_x(2, SHAPE, BF16, "cpu")
    for half, parameters, name in (
        (F.token_mixing, block.token(), "mk_sm90_token_mixing_forward"),
        (F.channel_mixing, block.channel(), "mk_sm90_channel_fc1_forward"),
    ):
        with (
            build.machine(shared_limit=20 << 10),
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
