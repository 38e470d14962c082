"""torch.func, forward-mode differentiation and batched gradients: right, or an error that names backend="torch".

Where "auto" chooses, PyTorch's operators run, and a block that is fused or built to be hands over to its own modules. A
backend with kernels that was asked for by name raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import operations
import pytest
import torch
from small_mixer import assert_same, count_calls, images, make_model
from test_patch_models import KINDS, small
from torch import Tensor, nn
from torch.autograd import forward_ad

import mixer_kernels.functional as F
from mixer_kernels import FusedMixerBlock, backends, fuse_, words
from mixer_kernels.tracing import constant_while_tracing

# Of PyTorch's own linearize, and of its loops over a batch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

SIZES = {"S": 5, "C": 8, "D": 6, "2D": 12, "H": 12, "M": 6, "N": 2, "P": 5, "Q": 6, "F": 8, "G": 6}
FUNCTIONS = (
    "token_mixing", "channel_mixing", "mixer_block", "token_linear", "spatial_gating", "gated_channel_mixing",
    "gated_mixing patches", "gated_mixer_layer",
)  # fmt: skip


def call(name: str, device: str) -> tuple[Callable, list[Tensor]]:
    """A function of the API and random arguments for it."""
    case = operations.make(name, SIZES, 2, torch.float32, device)
    return partial(case.function, **case.options), [case.x, *case.parameters.values()]


def dual(f: Callable, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def summed(f: Callable) -> Callable:
    return lambda x: f(x).square().sum()


# (function of x, x, a tangent) to a tensor.
TRANSFORMS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jvp without grad mode": torch.no_grad()(lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1]),
    "linearize": lambda f, x, t: torch.func.linearize(f, x)[1](t),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "dual numbers": dual,
    "grad": lambda f, x, t: torch.func.grad(summed(f))(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](t)[0],
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
    "hessian": lambda f, x, t: torch.func.hessian(summed(f))(x)[0, 0, 0],
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(lambda x: summed(f)(x[None])))(x),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, "auto" means triton; what has been logged is forgotten."""
    original = backends.choose

    @constant_while_tracing
    def choose(backend, *args):
        asked = backends.requested_backend() if backend is None else backend
        return original("triton" if asked == "auto" else asked, *args)

    monkeypatch.setattr(backends, "choose", choose)
    words._warn.cache_clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_or_name_the_torch_backend(name, transform, device, caplog) -> None:
    caplog.set_level(logging.WARNING, "mixer_kernels")
    function, (x, *parameters) = call(name, device)
    y = function(x, *parameters, backend="torch")
    direction = torch.randn_like(y if transform is TRANSFORMS["vjp"] else x)
    expected = transform(lambda x: function(x, *parameters, backend="torch"), x, direction)
    got = transform(lambda x: function(x, *parameters), x, direction)
    assert expected.abs().max() > 0.01 and torch.equal(got, expected)
    assert sum("running on 'torch', because" in message for message in caplog.messages) == 1
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: .* use backend='torch'"):
        transform(lambda x: function(x, *parameters, backend="triton"), x, direction)
    torch.testing.assert_close(function(x, *parameters), y)  # by the kernels again


@pytest.mark.parametrize("function", ["token_mixing", "channel_mixing", "mixer_block"])
def test_each_backend_with_kernels_raises(function, backend, device) -> None:
    function, tensors = call(function, device)
    x, *parameters = (t.bfloat16() for t in tensors)
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run: .* use backend='torch'"):
        torch.func.jvp(lambda x: function(x, *parameters, backend=backend), (x,), (x,))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_hand_over(kind, transform, device, monkeypatch, said) -> None:
    name, options = KINDS[kind]
    block = small(name, monkeypatch, **options).blocks[0].to(device).eval()
    x = torch.randn(2, 4, 24, device=device)
    t = torch.randn_like(x)
    expected = transform(block, x, t)
    assert len(fuse_(block, backend="triton")) == 1
    assert torch.equal(transform(block, x, t), expected)
    assert len(said) == 1


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_block_that_was_built_fused_hands_over(transform) -> None:
    block = FusedMixerBlock(8, 5).eval()
    plain = nn.Module()
    plain.forward = lambda x: F.mixer_block(
        x, *(p for p in block.parameters()), eps=1e-6, backend="torch"
    )  # in the order of the signature
    x, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(transform(block, x, t), transform(plain, x, t))


def test_per_sample_gradients_of_a_fused_model(monkeypatch) -> None:
    model = make_model(num_blocks=1).eval()
    x = images(3)

    def gradients() -> list[Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda p, image: torch.func.functional_call(model, p, (image[None],)).square().sum()  # noqa: E731
        return list(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x).values())

    expected = gradients()
    fuse_(model, backend="triton")
    assert_same(expected, gradients())
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        model(x)
    assert len(calls) == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients_are_those_one_by_one(name, device) -> None:
    """is_grads_batched reaches the operators of the backward pass alone."""
    function, tensors = call(name, device)
    for t in tensors:
        t.requires_grad_()
    y = function(*tensors, backend="triton")
    upstream = torch.randn(3, *y.shape, device=device)
    one_by_one = [torch.autograd.grad(y, tensors, g, retain_graph=True) for g in upstream]
    expected = [torch.stack(gradients) for gradients in zip(*one_by_one, strict=True)]
    batched = torch.autograd.grad(y, tensors, upstream, retain_graph=True, is_grads_batched=True)
    assert_same(expected, batched)
    assert_same(expected[:1], torch.autograd.grad(y, tensors[:1], upstream, retain_graph=True, is_grads_batched=True))
    of_vmap = torch.func.vmap(lambda g: torch.autograd.grad(y, tensors, g, retain_graph=True))(upstream)
    assert_same(expected, of_vmap)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_transforms_inside_torch_compile(transform, device) -> None:
    """The choice is a constant of the graph, made where the transform is active."""
    function, (x, *parameters) = call("mixer_block", device)
    t, transform = torch.randn_like(x), TRANSFORMS[transform]

    def compiled(backend: str | None) -> Tensor:
        torch._dynamo.reset()
        f = lambda x, t: transform(lambda x: function(x, *parameters, backend=backend), x, t)  # noqa: E731
        return torch.compile(f, backend="eager", fullgraph=True)(x, t)

    torch.testing.assert_close(compiled(None), compiled("torch"))
    with pytest.raises(Exception, match="use backend='torch'"):
        compiled("triton")
