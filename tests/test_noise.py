"""Dropout and stochastic depth in the kernels: right numbers, right distribution, the same masks backward."""

from __future__ import annotations

import pytest
import torch
from accuracy import GRADIENT_FACTOR, assert_accurate, reference
from blocks import finest, make_block, make_x
from test_kernels import on_target

import mixer_kernels.functional as F
from mixer_kernels.shapes import MixerShape

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)
LONG = MixerShape(S=257, C=24, D_S=16, D_C=32)
HALVES = ("token_mixing", "channel_mixing")
# How many tokens there are decides which kernel mixes tokens; a kernel that mixes channels sees rows.
KERNELS = {
    "fused": ("token_mixing", SHAPE),
    "long": ("token_mixing", LONG),
    "channels": ("channel_mixing", SHAPE),
}
WAYS_OF_TRAINING = {
    "fused": (*KERNELS["fused"], {}),
    "long": (*KERNELS["long"], {}),
    "channels, fast": (*KERNELS["channels"], {"memory": "fast"}),
    "channels, min": (*KERNELS["channels"], {"memory": "min"}),
}
each_way_of_training = pytest.mark.parametrize(
    ("name", "shape", "memory"), WAYS_OF_TRAINING.values(), ids=WAYS_OF_TRAINING.keys()
)
each_kernel = pytest.mark.parametrize(("name", "shape"), KERNELS.values(), ids=KERNELS.keys())


def half_of(block, name):
    return getattr(F, name), block.token() if name == "token_mixing" else block.channel()


def with_seed(seed, function, *arguments, **options):
    torch.manual_seed(seed)
    return function(*arguments, **options)


def identity_block(shape, device, name, dtype):
    """A half whose branch is its dropout mask alone: the hidden units are 1, the second weight picks one of them."""
    block = make_block(shape, dtype, device)
    first, second = ("w1", "w2") if name == "token_mixing" else ("w3", "w4")
    for parameter in block.parameters.values():
        parameter.zero_()
    bias = block.parameters["b" + first[1]]
    bias.fill_(1.0)  # z = 1 everywhere
    gelu_of_one = torch.nn.functional.gelu(torch.tensor(1.0)).item()
    weight = block.parameters[second]
    weight[torch.arange(weight.shape[0]), torch.arange(weight.shape[0]) % weight.shape[1]] = 1 / gelu_of_one
    return block


@each_kernel
def test_what_is_kept_is_scaled_and_as_often_as_it_should(name, shape, backend, device):
    """Each element of the branch is 0 or 1 / (1-p)^2, the latter with probability (1-p)^2: both dropouts."""
    p = 0.25
    dtype = finest(backend)
    half, parameters = half_of(identity_block(shape, device, name, dtype), name)
    x = torch.zeros(40 if shape is SHAPE else 4, shape.S, shape.C, dtype=dtype, device=device)
    with torch.no_grad():
        branch = with_seed(1, half, x, *parameters, dropout_p=p, backend=backend)
    kept = branch != 0
    rtol = max(1e-5, 2 * torch.finfo(dtype).eps)  # roundings of weight, hidden unit and output
    torch.testing.assert_close(branch[kept], torch.full_like(branch[kept], 1 / (1 - p) ** 2), rtol=rtol, atol=0)
    expected = (1 - p) ** 2
    # a hidden unit is shared by the outputs that pick it: count its units, not elements, for the spread
    spread = 5 * (expected * (1 - expected) / (kept.numel() / 4)) ** 0.5
    assert abs(kept.float().mean().item() - expected) < spread
    assert 0.3 < kept.float().mean((1, 2)).min()  # no image and
    assert not torch.equal(kept[0], kept[1])  # no two images alike


@each_kernel
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_stochastic_depth_drops_whole_images(name, shape, target, backend, device):
    """An image is x, or x + branch / (1-p) with the branch that it has without."""
    p = 0.4
    block, x = make_block(shape, torch.bfloat16, device), make_x(8, shape, torch.bfloat16, device)
    half, parameters = half_of(block, name)
    with torch.no_grad(), on_target(target, device):
        y = with_seed(3, half, x, *parameters, drop_path_p=p, backend=backend)
        whole = half(x, *parameters, backend=backend)
    dropped = (y == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 8
    expected = x.float() + (whole.float() - x.float()) / (1 - p)
    torch.testing.assert_close(y[~dropped].float(), expected[~dropped], rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("name", HALVES)
def test_probability_zero_is_exact_and_one_is_the_input(name, backend, device):
    block, x = make_block(SHAPE, finest(backend), device), make_x(3, SHAPE, finest(backend), device)
    half, parameters = half_of(block, name)
    with torch.no_grad():
        plain = half(x, *parameters, backend=backend)
        assert torch.equal(half(x, *parameters, dropout_p=0.0, drop_path_p=0.0, backend=backend), plain)
        for options in ({"dropout_p": 1.0}, {"drop_path_p": 1.0}):
            assert torch.equal(half(x, *parameters, **options, backend=backend), x)
            assert torch.equal(half(x, *parameters, **options, backend="torch"), x)


@pytest.mark.parametrize("name", HALVES)
def test_the_generator_decides(name, backend, device):
    """The same seed gives the same masks, the next call others; nothing is drawn where nothing is dropped."""
    block, x = make_block(SHAPE, finest(backend), device), make_x(3, SHAPE, finest(backend), device)
    half, parameters = half_of(block, name)
    options = {"dropout_p": 0.3, "drop_path_p": 0.3, "backend": backend}
    with torch.no_grad():
        first = with_seed(5, half, x, *parameters, **options)
        second = half(x, *parameters, **options)
        assert torch.equal(with_seed(5, half, x, *parameters, **options), first)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        half(x, *parameters, backend=backend)
        assert torch.equal(half(x, *parameters, **options), first)


@each_way_of_training
def test_gradients_see_the_masks_of_the_forward_pass(name, shape, memory, device):
    """Directional derivatives by finite differences of the forward pass under one seed, in float32."""
    block, x = make_block(shape, torch.float32, device), make_x(2, shape, torch.float32, device)
    half, parameters = half_of(block, name)
    options = {"dropout_p": 0.2, "drop_path_p": 0.3, "backend": "triton", **memory}
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    dy = torch.randn_like(x)
    y = with_seed(7, half, *leaves, **options)
    gradients = torch.autograd.grad(y, leaves, dy)
    step = 2e-2
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        direction *= gradient.norm() / (direction.norm() + 1e-12)
        direction = direction + gradient  # so that the derivative is not small
        direction = direction / direction.norm()

        def moved(sign, i=i, direction=direction):
            inputs = [t.detach().clone() for t in (x, *parameters)]
            inputs[i] += sign * step * direction
            with torch.no_grad():
                return with_seed(7, half, *inputs, **options).double()

        numeric = ((moved(1) - moved(-1)) * dy.double()).sum() / (2 * step)
        analytic = (gradient.double() * direction.double()).sum()
        assert abs(numeric - analytic) < 2e-2 * abs(analytic) + 1e-3, f"input {i}: {numeric} {analytic}"


def test_checkpointing_replays_the_masks(backend, device):
    from torch.utils.checkpoint import checkpoint

    block, x = make_block(SHAPE, finest(backend), device), make_x(3, SHAPE, finest(backend), device)
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in block.parameters.values())]

    def run(x):
        return F.mixer_block(x, **block.parameters, dropout_p=0.2, drop_path_p=0.2, backend=backend)

    dy = torch.randn_like(x)
    expected = torch.autograd.grad(with_seed(9, run, x), leaves, dy)
    for use_reentrant in (False, True):
        torch.manual_seed(9)
        y = checkpoint(run, x, use_reentrant=use_reentrant)
        actual = torch.autograd.grad(y, leaves, dy) if not use_reentrant else None
        if use_reentrant:
            for leaf in leaves:
                leaf.grad = None
            y.backward(dy)
            actual = [leaf.grad for leaf in leaves]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_accuracy_with_every_image_kept(backend, device):
    """Stochastic depth that happens to drop none is the plain block times 1 / (1-p) in its branch."""
    p = 1e-6
    block, x = make_block(SHAPE, torch.bfloat16, device), make_x(2, SHAPE, torch.bfloat16, device)
    dy = torch.randn_like(x)

    def gradient(block, x, dy, backend, **options):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.mixer_block(leaf, **block.parameters, backend=backend, **options), leaf, dy)[0]

    actual = gradient(block, x, dy, backend, drop_path_p=p)
    wide = block.to(torch.float64)
    exact = reference(lambda: gradient(wide, x.double(), dy.double(), "torch"), x.dtype)
    assert_accurate(actual, gradient(block, x, dy, "torch"), exact, GRADIENT_FACTOR)


def mask_of(name, shape, device, backend, **options):
    """Where the branch of ``identity_block`` is kept, in the dtype that both backends with kernels have."""
    half, parameters = half_of(identity_block(shape, device, name, torch.float16), name)
    x = torch.zeros(6, shape.S, shape.C, dtype=torch.float16, device=device)
    with torch.no_grad():
        return with_seed(11, half, x, *parameters, backend=backend, **options) != 0


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("options", ({"dropout_p": 0.4}, {"drop_path_p": 0.4}, {"dropout_p": 0.1, "drop_path_p": 0.2}))
@each_kernel
def test_all_kernels_draw_the_same_masks(name, shape, options, device):
    """Under one seed the cuda backend drops what the triton backend drops, element by element."""
    triton, cuda = (mask_of(name, shape, device, backend, **options) for backend in ("triton", "cuda"))
    assert torch.equal(triton, cuda)
    assert triton.any() and not triton.all()


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("backend", ("cuda",))
@each_way_of_training
def test_gradients_under_the_masks_of_the_triton_backend(name, shape, memory, backend, device):
    """16-bit gradients with dropout and stochastic depth against triton's in float32: the same masks in all."""
    block, x = make_block(shape, torch.float16, device), make_x(2, shape, torch.float16, device)
    dy = torch.randn_like(x)
    half, parameters = half_of(block, name)
    options = {"dropout_p": 0.2, "drop_path_p": 0.3, **memory}

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
        y = with_seed(7, half, *leaves, backend=backend, **options)
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    exact = gradients("triton", torch.float32)
    for i, (ours, theirs) in enumerate(zip(gradients(backend, x.dtype), gradients("triton", x.dtype), strict=True)):
        rounded_once = reference(lambda i=i: exact[i].double() * 1, x.dtype)  # the masks are the kernels' own
        assert_accurate(ours, theirs, rounded_once, GRADIENT_FACTOR, what=f"gradient of input {i}")
