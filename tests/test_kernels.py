"""The fused forward kernels against float64, by the one accuracy rule (accuracy.py)."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from accuracy import assert_accurate, reference
from blocks import KERNEL_BACKENDS, LAYOUTS, PRODUCTS, finest, kernels_in, make_block, make_x, run, run_exact

import mixer_kernels.functional as F
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS, assume_target

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SHAPES = {
    "one of everything": MixerShape(S=1, C=1, D_S=1, D_C=1),
    "one token": MixerShape(S=1, C=40, D_S=20, D_C=72),
    "below a tile": MixerShape(S=7, C=5, D_S=3, D_C=9),
    "S/32": MixerShape(S=49, C=64, D_S=32, D_C=256),
    "tile - 1": MixerShape(S=63, C=127, D_S=31, D_C=127),
    "tile": MixerShape(S=64, C=128, D_S=32, D_C=128),
    "tile + 1": MixerShape(S=65, C=129, D_S=33, D_C=129),
    "S/16": MixerShape(S=196, C=136, D_S=40, D_C=264),
    "S/16 + 1": MixerShape(S=197, C=33, D_S=50, D_C=70),
    "H/14": MixerShape(S=256, C=72, D_S=64, D_C=64),
    "beyond the fused kernel": MixerShape(S=257, C=40, D_S=24, D_C=48),
    "448 px": MixerShape(S=784, C=64, D_S=160, D_C=64),
}


@contextlib.contextmanager
def on_target(name: str, device: str):
    """Choose kernels as for ``name`` when interpreting; a GPU chooses for itself."""
    if device == "cuda":
        yield
    else:
        with assume_target(KNOWN_TARGETS[name]):
            yield


def exact_half(half, x, parameters, **options):
    """A half in float64."""
    wide = [None if p is None else p.double() for p in parameters]

    def compute():
        with torch.no_grad():
            return half(x.double(), *wide, backend="torch", **options)

    return reference(compute, x.dtype)


@kernels_in(*DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_eager(shape, backend, dtype, device):
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    assert_accurate(run(block, x, backend), run(block, x, "torch"), run_exact(block, x))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("S/32", "tile + 1", "S/16", "H/14"))
def test_tensor_descriptors_match_eager(name, dtype, device):
    """The kernels that sm_90 runs, with aligned rows (tensor descriptors) and odd ones (pointers)."""
    shape = SHAPES[name]
    block, x = make_block(shape, dtype, device), make_x(3, shape, dtype, device)
    with on_target("sm_90", device):
        actual = run(block, x, "triton")
    assert_accurate(actual, run(block, x, "torch"), run_exact(block, x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU, which runs its own tiles")
@pytest.mark.parametrize(
    ("target", "backend", "dtype"),
    [
        pytest.param(name, backend, dtype, id=f"{name} {backend} {dtype}")
        for name, target in KNOWN_TARGETS.items()
        for backend in KERNEL_BACKENDS
        for dtype in PRODUCTS[backend]
        if backend == "triton" or target.is_nvidia
    ],
    indirect=["backend"],
)
def test_tiles_of_every_target(target, backend, dtype, device):
    shape = MixerShape(S=80, C=72, D_S=24, D_C=136)
    block, x = make_block(shape, dtype, device), make_x(1, shape, dtype, device)
    with on_target(target, device):
        actual = run(block, x, backend)
    assert_accurate(actual, run(block, x, "torch"), run_exact(block, x))


@pytest.mark.parametrize("approximate", F.APPROXIMATIONS)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("affine", (True, False), ids=("affine", "no affine"))
@kernels_in(torch.float32, torch.bfloat16)
def test_options(backend, dtype, affine, bias, approximate, device):
    shape = MixerShape(S=49, C=72, D_S=24, D_C=96)
    block, x = make_block(shape, dtype, device, affine=affine, bias=bias), make_x(2, shape, dtype, device)
    with on_target("sm_90", device):
        actual = run(block, x, backend, approximate=approximate)
    eager, exact = (f(block, x, approximate=approximate) for f in (lambda *a, **k: run(*a, "torch", **k), run_exact))
    assert_accurate(actual, eager, exact)


@pytest.mark.parametrize("only", ("gamma", "beta"))
@kernels_in(*DTYPES)
def test_half_an_affine(backend, dtype, only, device):
    """LayerNorm(bias=False) has gamma alone."""
    shape = MixerShape(S=20, C=40, D_S=16, D_C=48)
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    for name in ("gamma1", "beta1", "gamma2", "beta2"):
        if not name.startswith(only):
            block.parameters[name] = None
    assert_accurate(run(block, x, backend), run(block, x, "torch"), run_exact(block, x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", (49, 257))
@kernels_in(torch.float32, torch.bfloat16)
def test_layouts_are_read_as_they_are(backend, dtype, tokens, layout, device):
    """Both halves take any strides; what lies between the elements (NaN here) is never read."""
    shape = MixerShape(S=tokens, C=40, D_S=24, D_C=48)
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device, layout)
    before = x.clone()
    options = {"eps": 1e-6, "approximate": "none"}
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        with torch.no_grad(), on_target("sm_90", device):
            actual = half(x, *parameters, backend=backend, **options)
            eager = half(x, *parameters, backend="torch", **options)
        assert_accurate(actual, eager, exact_half(half, x, parameters, **options), what=half.__name__)
        assert actual.is_contiguous()
        assert torch.equal(x, before)


@pytest.mark.parametrize("eps", (1e-12, 1e-5, 0.5))
def test_eps(eps, backend, device):
    shape = MixerShape(S=20, C=40, D_S=16, D_C=48)
    block, x = make_block(shape, finest(backend), device), 1e-2 * make_x(2, shape, finest(backend), device)
    assert_accurate(run(block, x, backend, eps=eps), run(block, x, "torch", eps=eps), run_exact(block, x, eps=eps))


def test_two_eps(backend, device):
    shape = MixerShape(S=20, C=40, D_S=16, D_C=48)
    block, x = make_block(shape, finest(backend), device), 1e-2 * make_x(2, shape, finest(backend), device)
    eps = (1e-5, 0.5)
    assert_accurate(run(block, x, backend, eps=eps), run(block, x, "torch", eps=eps), run_exact(block, x, eps=eps))


@pytest.mark.parametrize("mean", (3.0, 30.0))
@kernels_in(*DTYPES)
def test_mean_far_from_zero(backend, dtype, mean, device):
    """|mean|/std up to 30, where folding LayerNorm with the sum of unrounded weights is 19 times too far off."""
    shape = MixerShape(S=17, C=256, D_S=16, D_C=64)
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device, mean=mean)
    for name in ("w2", "w4"):
        block.parameters[name] *= 64  # so that the branch is not lost in the rounding of x
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        with torch.no_grad(), on_target("sm_90", device):
            actual = half(x, *parameters, backend=backend)
            eager = half(x, *parameters, backend="torch")
        assert_accurate(actual, eager, exact_half(half, x, parameters), what=half.__name__)


def test_small_gamma_in_half_precision(backend, device):
    """gamma of 1e-4 puts the folded weight among float16's subnormals unless its rows are scaled."""
    shape = MixerShape(S=4, C=128, D_S=8, D_C=64)
    block = make_block(shape, torch.float32, device, gain=1e-4)
    block.parameters["beta2"] = block.parameters["b3"] = None
    block.parameters["w4"] = 1e4 * block.parameters["w4"]
    block = block.to(torch.float16)
    u = make_x(2, shape, torch.float16, device)
    with torch.no_grad():
        actual = F.channel_mixing(u, *block.channel(), backend=backend)
        eager = F.channel_mixing(u, *block.channel(), backend="torch")
    assert_accurate(actual, eager, exact_half(F.channel_mixing, u, block.channel()))


def test_vectors_of_any_stride(backend, device):
    """Norms and biases that are columns of a matrix."""
    shape, dtype = MixerShape(S=49, C=40, D_S=24, D_C=48), finest(backend)
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    expected = run(block, x, backend)
    for name, p in block.parameters.items():
        if p.dim() == 1:
            column = torch.stack((p, torch.full_like(p, torch.nan)), -1)[:, 0]
            changed = dataclasses.replace(block, parameters={**block.parameters, name: column})
            # Not bit for bit: cuda sums what lies apart in another order.
            torch.testing.assert_close(run(changed, x, backend), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("stream", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("products", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mean", (0.0, 30.0))
def test_autocast(products, stream, mean, backend, device):
    """float32 parameters under autocast: the products in 16 bits, the residual stream as eager has it."""
    shape = MixerShape(S=49, C=72, D_S=24, D_C=96)
    block, x = make_block(shape, torch.float32, device), make_x(2, shape, stream, device, mean=mean)
    with torch.autocast(device, products), on_target("sm_90", device):
        actual, eager = run(block, x, backend), run(block, x, "torch")
    assert actual.dtype is eager.dtype is torch.promote_types(stream, products)
    assert_accurate(actual, eager, run_exact(block, x, actual.dtype, products))


@pytest.mark.parametrize("tokens", (196, 300))
def test_tf32_follows_the_matmul_precision(tokens, device):
    """ "high" allows TF32, and the result shows it; "highest", the default, does not."""
    shape = MixerShape(S=tokens, C=64, D_S=64, D_C=64)
    block, x = make_block(shape, torch.float32, device), make_x(1, shape, torch.float32, device)
    exact, ieee = run_exact(block, x), run(block, x, "triton")
    torch.set_float32_matmul_precision("high")
    try:
        actual = run(block, x, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_accurate(actual, _eager_tf32(block, x), exact)
    assert (actual - exact.value).abs().max() > 20 * (ieee - exact.value).abs().max(), "the product is not TF32"


def _eager_tf32(block, x):
    """The block with every operand of a product rounded to TF32, as tensor cores round them."""

    def tf32(t):
        bits = t.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    p = block.parameters
    n = torch.nn.functional.layer_norm(x, x.shape[-1:], p["gamma1"], p["beta1"], 1e-6)
    a = torch.nn.functional.gelu(tf32(n).transpose(1, 2) @ tf32(p["w1"]).T + p["b1"])
    u = x + (tf32(a) @ tf32(p["w2"]).T + p["b2"]).transpose(1, 2)
    n = torch.nn.functional.layer_norm(u, x.shape[-1:], p["gamma2"], p["beta2"], 1e-6)
    a = torch.nn.functional.gelu(tf32(n) @ tf32(p["w3"]).T + p["b3"])
    return u + tf32(a) @ tf32(p["w4"]).T + p["b4"]


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@kernels_in(*DTYPES)
def test_nan_and_inf_come_out_where_eager_has_them(backend, dtype, value, device):
    shape = MixerShape(S=20, C=40, D_S=16, D_C=48)
    block, x = make_block(shape, dtype, device), make_x(3, shape, dtype, device)
    x[1, 4, 7] = value
    with torch.no_grad():
        for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
            actual, eager = (half(x, *parameters, backend=name) for name in (backend, "torch"))
            assert torch.equal(actual.isnan(), eager.isnan()), half.__name__
            assert eager.isnan().any() and eager[0].isfinite().all()


@pytest.mark.parametrize("channels", (40, 72, 1000))
@kernels_in(*DTYPES)
def test_constant_rows(backend, dtype, channels, device):
    """A row without variance: rstd is 1/sqrt(eps), a thousand, and multiplies the rounding error of the mean."""
    shape = MixerShape(S=4, C=channels, D_S=16, D_C=48)
    block = make_block(shape, dtype, device)
    x = torch.tensor([0.1, 3.0, -7.3, 1e-3], device=device).to(dtype)[None, :, None].repeat(1, 1, channels)
    assert_accurate(run(block, x, backend), run(block, x, "torch"), run_exact(block, x))


@kernels_in(*DTYPES)
def test_large_values(backend, dtype, device):
    """x of 6e4 is near float16's largest number; GELU's argument overflows nothing on the way."""
    shape = MixerShape(S=20, C=40, D_S=16, D_C=48)
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device).sign() * 3e4
    for approximate in F.APPROXIMATIONS:
        options = {"approximate": approximate}
        assert_accurate(
            run(block, x, backend, **options), run(block, x, "torch", **options), run_exact(block, x, **options)
        )


@kernels_in(*DTYPES)
def test_empty_batch(backend, dtype, device):
    shape = MixerShape(S=49, C=72, D_S=24, D_C=96)
    y = run(make_block(shape, dtype, device), make_x(0, shape, dtype, device), backend)
    assert y.shape == (0, 49, 72) and y.dtype is dtype


def test_runs_agree_bit_for_bit(backend, device):
    shape = MixerShape(S=196, C=72, D_S=40, D_C=96)
    block, x = make_block(shape, torch.bfloat16, device), make_x(3, shape, torch.bfloat16, device)
    y = run(block, x, backend)
    assert all(torch.equal(run(block, x, backend), y) for _ in range(3 if device == "cpu" else 100))


def test_an_image_does_not_see_its_batch(backend, device):
    """The first image's result is the same, bit for bit, whatever follows it."""
    shape = MixerShape(S=49, C=72, D_S=24, D_C=96)
    block, x = make_block(shape, torch.bfloat16, device), make_x(5, shape, torch.bfloat16, device)
    assert torch.equal(run(block, x, backend)[:1], run(block, x[:1], backend))
