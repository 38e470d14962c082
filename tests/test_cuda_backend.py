"""The cuda backend around its kernels: calls and launches of a block, who may run it, which backend "auto" prefers."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accuracy import GRADIENT_FACTOR, assert_accurate
from blocks import LAYOUTS, Watched, make_block, make_x, run
from test_backward import exact_gradients, gradients
from test_ops import NAMES, arguments

import mixer_kernels.functional as F
from mixer_kernels import ops
from mixer_kernels.backends import registry
from mixer_kernels.backends.cuda import library
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)
LONG = MixerShape(S=257, C=24, D_S=16, D_C=32)
BF16 = torch.bfloat16


@pytest.fixture
def watched(cuda_kernels):
    """The module, with its calls noted."""
    module = Watched(cuda_kernels)
    library.install(module)
    yield module
    library.install(cuda_kernels)


# ------------------------------------------------------------------------------------------------- calls and launches


@pytest.mark.parametrize("shape", (SHAPE, LONG), ids=("fused", "long"))
def test_a_block_is_a_pack_and_a_call(shape, watched, device):
    block, x = make_block(shape, BF16, device), make_x(2, shape, BF16, device)
    run(block, x, "cuda")
    assert watched.calls == ["pack_weights", "mixer_block_forward"]
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        watched.calls.clear()
        with torch.no_grad():
            half(x, *parameters, backend="cuda")
        assert watched.calls == ["pack_weights", f"{half.__name__}_forward"]


def test_the_block_is_its_two_halves_bit_for_bit(cuda_kernels, device):
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device, "transposed")
    with torch.no_grad():
        u = F.token_mixing(x, *block.token(), backend="cuda")
        y = F.channel_mixing(u, *block.channel(), backend="cuda")
    assert torch.equal(run(block, x, "cuda"), y)


def test_an_empty_batch_is_no_call(watched, device):
    block, x = make_block(SHAPE, BF16, device), make_x(0, SHAPE, BF16, device)
    run(block, x, "cuda")
    gradients(block, x, torch.empty_like(x), "cuda")
    assert watched.calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU: counts on the model")
@pytest.mark.parametrize(("shape", "launches"), ((SHAPE, 6), (LONG, 7)), ids=("fused", "long"))
def test_a_block_is_six_launches(shape, launches, cuda_kernels):
    """The pack, row statistics twice, token mixing (two products for more than 256 tokens), fc1, fc2."""
    from cuda_on_host import build

    block, x = make_block(shape, BF16, "cpu"), make_x(2, shape, BF16, "cpu")
    before = build.launches()
    run(block, x, "cuda")
    assert build.launches() - before == launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU: counts on the model")
def test_padding_at_196_tokens_is_below_7_percent(cuda_kernels):
    """Executed over useful products of the fused token kernels, forward and backward (z, da and dn), and of the weight
    gradients."""
    from cuda_on_host import build

    shape = MixerShape(S=196, C=64, D_S=128, D_C=8)
    block, x = make_block(shape, BF16, "cpu"), make_x(1, shape, BF16, "cpu")
    parameters = block.token()
    weights = [block.parameters[name] for name in ("w1", "w2")]
    useful = shape.S * shape.C * shape.D_S / (16 * 8 * 16)

    def executed(run):
        before = build.matrix_products()
        run()
        return (build.matrix_products() - before) / useful

    with torch.no_grad():
        assert 2 <= executed(lambda: F.token_mixing(x, *parameters, backend="cuda")) <= 2 * 1.07

    def backward(*leaves):
        for leaf in leaves:
            leaf.requires_grad_()
        u = F.token_mixing(x, *parameters, backend="cuda")
        return executed(lambda: torch.autograd.grad(u.sum(), leaves))

    of_x = backward(x)
    assert 3 <= of_x <= 3 * 1.07
    of_all = backward(x, *weights)
    assert 2 <= of_all - of_x <= 2 * 1.07


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU: limits the model")
def test_a_launch_that_fails_raises_with_its_name(cuda_kernels):
    from cuda_on_host import build

    block, x = make_block(SHAPE, BF16, "cpu"), make_x(2, SHAPE, BF16, "cpu")
    with build.machine(shared_limit=512), pytest.raises(RuntimeError, match="mk_token_mixing_forward: .*CUDA error 9"):
        run(block, x, "cuda")
    assert run(block, x, "cuda").isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
def test_cuda_graph_and_side_stream(cuda_kernels, device):
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    expected = run(block, x, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(run(block, x, "cuda"), expected)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(block, x, "cuda")
    for factor in (1.0, 0.5):
        x.mul_(factor)
        block.parameters["w1"].mul_(factor)  # packing is part of the graph
        graph.replay()
        assert torch.equal(y, run(block, x, "cuda"))


@pytest.mark.parametrize("shape", (SHAPE, LONG), ids=("fused", "long"))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, shape, cuda_kernels, device):
    """Schema, fake tensors, autograd registration."""
    block, x = make_block(shape, BF16, device), make_x(2, shape, BF16, device)
    torch.library.opcheck(getattr(ops, name), arguments(block, x, name, backend="cuda"))


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_compiled_training_equals_eager(memory, cuda_kernels, device):
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    names = list(block.parameters)

    def f(x, *parameters):
        y = F.mixer_block(x * 2, **dict(zip(names, parameters, strict=True)), backend="cuda", memory=memory)
        return y.square().mean()

    def run_and_differentiate(function):
        leaves = [t.detach().requires_grad_() for t in (x, *block.parameters.values())]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(run_and_differentiate(f), run_and_differentiate(compiled), strict=True):
        assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------------------ small kernels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", (1, 7, 96, 1000, 1024, 1033, 3001))
def test_row_statistics(channels, layout, cuda_kernels, device):
    """Against float64, in rows of any length and layout, with means far from zero and rows without variance."""
    shape = MixerShape(S=37, C=channels, D_S=2, D_C=2)
    x = make_x(2, shape, torch.float32, device, layout, mean=30.0)
    x[1, 3] = 0.1
    with torch.autocast(device, BF16), torch.no_grad():
        parameters = [None, None, torch.zeros(2, 37, device=device), None, torch.zeros(37, 2, device=device), None]
        _, mean, rstd = torch.ops.mixer_kernels.token_mixing(
            x, *parameters, BF16, 1e-6, "gelu", "none", "layer", "softmax", 0.0, 0.0, None, "cuda"
        )
    exact = x.double().flatten(0, 1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=2e-7, atol=0)
    expected = (exact.var(1, correction=0) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("channels", (1, 200, 500, 1000, 4100))
@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
def test_layer_norm_gradients_of_rows_of_any_length(channels, layout, cuda_kernels, device):
    """Threads share rows out by the row's length, and sums that outgrow shared memory are kept in global memory."""
    shape = MixerShape(S=21, C=channels, D_S=4, D_C=4)
    block, x = make_block(shape, torch.float16, device), make_x(2, shape, torch.float16, device, layout)
    dy = torch.randn(x.shape, device=device).to(x.dtype)
    actual, eager = (gradients(block, x, dy, backend) for backend in ("cuda", "torch"))
    exact = exact_gradients(block, x, dy)
    for name in ("x", "gamma1", "beta1", "gamma2", "beta2", "b4"):
        assert_accurate(actual[name], eager[name], exact[name], GRADIENT_FACTOR, what=f"gradient of {name}")


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="waits for a machine without a GPU: untouched memory is free there",
)
@pytest.mark.parametrize("tokens", (3, 257))
@pytest.mark.parametrize("far", ("image", "token", "channel"))
def test_offsets_beyond_2_to_the_31(far, tokens, cuda_kernels):
    """x spread over more than 2^31 elements, of which few are ever touched; forward and backward."""
    shape = MixerShape(S=tokens, C=8, D_S=16, D_C=16)
    strides = {
        "image": (2**30 + 64, 8, 1),
        "token": (8, 2**31 // (tokens - 1) + 8, 1),
        "channel": (1, 3, 2**31 // 7 + 16),
    }[far]
    block, values = make_block(shape, BF16, "cpu"), make_x(3, shape, BF16, "cpu")
    extent = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
    assert extent > 2**31
    x = torch.empty(extent, dtype=BF16).as_strided(values.shape, strides)
    x.copy_(values)
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        with torch.no_grad():
            near = half(values, *parameters, backend="cuda")
            assert torch.equal(half(x, *parameters, backend="cuda"), near)
    dy = torch.randn(values.shape).to(BF16)
    expected, actual = gradients(block, values, dy, "cuda"), gradients(block, x, dy, "cuda")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# -------------------------------------------------------------------------------------------------------- who may run


def test_float32_products_are_other_backends(cuda_kernels, device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(1, SHAPE, torch.float32, device)
    with pytest.raises(RuntimeError, match="16-bit products; float32 products run on backend='triton' or .*'torch'"):
        run(block, x, "cuda")


def test_without_the_compiled_module_the_error_says_what_to_do():
    """In a process of its own, in which the module is not to be found; importing the backend still works."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "mixer_kernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, mixer_kernels.functional as F
import mixer_kernels.backends.cuda
p = torch.zeros(4, 4, dtype=torch.bfloat16)
try:
    F.token_mixing(p[None], None, None, p, None, p, None, backend="cuda")
except RuntimeError as error:
    print(error)
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "backend='cuda' cannot run: mixer_kernels was installed without its CUDA kernels" in result.stdout, result
    assert "pip install" in result.stdout and "MIXER_KERNELS_BUILD_CUDA=1" in result.stdout
    assert "use backend='torch'" in result.stdout


def built(**attributes):
    """What a module built by CUDA 12.8 says of itself, on a machine with a driver for it."""
    defaults = {
        "on_host": False, "runtime_version": 12080, "driver_version": lambda: 12080,
        "architectures": ("80", "90a", "120"), "ptx": ("120",),
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **attributes})


def test_tensors_have_to_be_where_the_kernels_are(cuda_kernels):
    library.install(built())
    assert "needs a CUDA tensor, got one on cpu; use backend='torch'" in library.why_not(torch.device("cpu"), BF16)
    library.install(built(on_host=True))
    assert library.why_not(torch.device("cpu"), BF16) is None
    assert "built for the CPU, got a tensor on cuda" in library.why_not(torch.device("cuda", 0), BF16)


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "attributes", "reason"),
    [
        ((8, 0), {}, None),
        ((8, 9), {}, None),  # sm_80 code runs within its major version
        ((9, 0), {}, None),
        ((12, 1), {}, None),
        ((13, 0), {}, None),  # from PTX
        ((7, 5), {}, "need compute capability 8.0, got 7.5"),
        ((10, 0), {}, "built for 80, 90a, 120, this GPU is 100: build with MIXER_KERNELS_CUDA_ARCHS"),
        ((9, 0), {"architectures": ("80",), "ptx": ("90a",)}, None),
        ((10, 0), {"architectures": ("80",), "ptx": ("90a",)}, "built for 80, this GPU is 100"),
        ((10, 3), {"architectures": ("100f",), "ptx": ()}, None),
        ((9, 0), {"architectures": ("100",), "ptx": ("100",)}, "built for 100, this GPU is 90"),
        ((8, 0), {"driver_version": lambda: 12020}, None),  # minor version compatibility
        ((8, 0), {"driver_version": lambda: 11080}, "the driver is for CUDA 11.8, .* built with 12.8"),
        ((13, 0), {"driver_version": lambda: 12020}, "the driver is for CUDA 12.2, .* built with 12.8"),
        ((8, 0), {"driver_version": lambda: 0}, "the driver is for CUDA 0.0"),
    ],
)
def test_the_gpu_and_the_driver_have_to_fit_what_was_compiled(
    capability, attributes, reason, cuda_kernels, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    library.install(built(**attributes))
    for _ in range(3):
        actual = library.why_not(CUDA, BF16)
    if reason is None:
        assert actual is None
    else:
        assert re.search(reason, actual), actual
        assert "use backend='triton' or backend='torch'" in actual
    warned = [message for message in caplog.messages if "backend 'cuda' cannot run: the driver" in message]
    assert len(warned) == (reason is not None and "driver" in reason)


@pytest.mark.parametrize(
    ("capability", "measured", "order"),
    [
        ((8, 0), {}, ("cuda", "triton")),
        ((8, 9), {}, ("cuda", "triton")),
        ((12, 0), {}, ("cuda", "triton")),
        ((9, 0), {}, ("triton", "cuda")),
        ((10, 0), {}, ("triton", "cuda")),
        ((9, 0), {"cuda": ["GPU"]}, ("cuda", "triton")),
        ((8, 0), {"triton": ["GPU"]}, ("triton", "cuda")),
        ((8, 0), {"triton": ["another"]}, ("cuda", "triton")),
        ((9, 0), {"triton": ["GPU"], "cuda": ["GPU"]}, ("triton", "cuda")),
    ],
)
def test_auto_prefers_what_was_measured_or_else_by_rule(capability, measured, order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    monkeypatch.setattr(registry, "measured_gpus", lambda backend: measured.get(backend, []))
    monkeypatch.setattr(torch.version, "hip", None)
    assert registry.preferred.__wrapped__(CUDA) == order
