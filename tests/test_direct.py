"""Plain calls go straight to their backend on what an earlier call found: never stale, and seen by who looks."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from blocks import make_block, make_x, run
from torch.utils._python_dispatch import TorchDispatchMode

import mixer_kernels.functional as F
from mixer_kernels import FusedMixerBlock, freeze_, ops, use_backend
from mixer_kernels.backends import remembered
from mixer_kernels.ops.operator import OPERATORS
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)
SQUARE = MixerShape(S=64, C=64, D_S=64, D_C=64)  # weights that may be transposed where they lie
BF16 = torch.bfloat16
BACKENDS = ("triton", "cuda", "cuda:sm90")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if request.param != "triton":
        request.getfixturevalue("cuda_kernels" if request.param == "cuda" else "hopper_kernels")
    remembered.forget()
    return request.param


class Operators(TorchDispatchMode):
    """Those of this package that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mixer_kernels":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def by_operator(block, x, backend):
    """The result by way of the dispatcher."""
    with Operators() as operators:
        y = run(block, x, backend)
    assert operators.names == ["mixer_block"]
    return y


def step(block, x, backend):
    """What training gives: y, and the gradients of x and the parameters, in one row."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = F.mixer_block(x, **block.parameters, backend=backend)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *block.parameters.values()])
    return torch.cat([t.detach().flatten() for t in (y, *gradients)])


def known() -> int:
    return len(remembered._known)


def a_block(shape=SHAPE, dtype=BF16, device="cpu"):
    """Of parameters."""
    block = make_block(shape, dtype, device)
    block.parameters.update({name: torch.nn.Parameter(p) for name, p in block.parameters.items()})
    return block


# ------------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "channel slice", "offset"))
def test_it_gives_what_the_operator_gives(layout, backend, device):
    block, x = a_block(device=device), make_x(2, SHAPE, BF16, device, layout)
    expected = by_operator(block, x, backend)
    assert known() == 0
    for _ in range(2):
        y = run(block, x, backend)
        assert known() == 1 and torch.equal(y, expected) and y.is_contiguous()
    other = make_x(2, SHAPE, BF16, device, layout)
    assert torch.equal(run(block, other, backend), by_operator(block, other, backend)) and known() == 1
    more = make_x(3, SHAPE, BF16, device, layout)
    assert torch.equal(run(block, more, backend), by_operator(block, more, backend)) and known() == 2


def test_under_autocast_and_inference_mode(backend, device):
    block, x = a_block(dtype=torch.float32, device=device), make_x(2, SHAPE, BF16, device)
    for number, (dtype, stream) in enumerate(itertools.product((BF16, torch.float16), (None, torch.float32)), start=1):
        with torch.autocast(device, dtype):
            given = x.to(stream or dtype)
            expected = by_operator(block, given, backend)
            assert torch.equal(run(block, given, backend), expected)
            with torch.inference_mode():
                y = F.mixer_block(given, **block.parameters, backend=backend)
                assert torch.equal(y, expected) and y.is_inference()
        assert known() == number


def test_the_backend_that_is_asked_for_counts(device):
    remembered.forget()
    block, x = a_block(dtype=torch.float32, device=device), make_x(1, SHAPE, torch.float32, device)
    results = {}
    for name in ("triton", "torch", "triton"):
        with torch.no_grad(), use_backend(name):
            results[name] = F.mixer_block(x, **block.parameters)
    assert known() == 2
    assert torch.equal(results["torch"], run(block, x, "torch"))
    assert torch.equal(results["triton"], by_operator(block, x, "triton"))


# ---------------------------------------------------------------------------------------------------- never stale


def transposed_in_place(p):
    """The address stays, the strides do not."""
    p.data = p.data.t() if p.dim() == 2 else p.data.flip(0)


def swapped(p):
    p.data = p.data * -1.5


def written(p):
    p.data.mul_(-1.5)


def spread(p):
    """Other strides at another address, and other numbers."""
    p.data = torch.stack((p.data * -1.5, torch.full_like(p.data, torch.nan)), -1)[..., 0]


@pytest.mark.parametrize("call", (run, step))
@pytest.mark.parametrize("write", (transposed_in_place, swapped, written, spread))
def test_every_write_is_seen(write, call, backend, device):
    block, x = a_block(SQUARE, device=device), make_x(1, SQUARE, BF16, device)
    before = call(block, x, backend)
    assert torch.equal(call(block, x, backend), before) and known() == 1
    for name, p in block.parameters.items():
        write(p)
        after = call(block, x, backend)
        assert not torch.equal(after, before), name
        with Operators() as operators:
            expected = call(copy.deepcopy(block), x, backend)
        assert torch.equal(after, expected) and operators.names, name
        before = after


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.data[:-1], ValueError, "w1|b1|w2"),
        (lambda p: p.data.float(), TypeError, "w1 is torch.float32, but x is torch.bfloat16"),
        (lambda p: p.data.flatten(), ValueError, r"w1 must be \(D_S, tokens\)"),
    ],
    ids=("shape", "dtype", "dimensions"),
)
@pytest.mark.parametrize("call", (run, step))
def test_what_is_wrong_later_raises_each_time(call, change, error, message, backend, device):
    """Also where the address is the same."""
    block, x = a_block(device=device), make_x(1, SHAPE, BF16, device)
    for _ in range(2):
        y = call(block, x, backend)
    w1 = block.parameters["w1"]
    good = w1.data
    w1.data = change(w1)
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(block, x, backend)
    w1.data = good
    assert torch.equal(call(block, x, backend), y)


def test_a_known_call_draws_noise_as_the_first_one_did(backend, device):
    block, x = a_block(device=device), make_x(2, SHAPE, BF16, device)

    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(0)
        calls = [F.mixer_block(x, **block.parameters, backend=backend, dropout_p=0.5) for _ in range(2)]
        calls[1].float().sum().backward()
        return [*calls, block.parameters["w1"].grad]

    expected = drawn()
    assert not torch.equal(*expected[:2]) and known() == 1
    block.parameters["w1"].grad = None
    assert all(map(torch.equal, drawn(), expected))


@pytest.mark.parametrize(
    "wrong", ({"eps": -1.0}, {"eps": 0}, {"approximate": "some"}, {"memory": "most"}, {"activation": "tanh"}), ids=str
)
def test_wrong_options_raise_each_time(wrong, backend, device):
    block, x = a_block(device=device), make_x(1, SHAPE, BF16, device)
    run(block, x, backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=next(iter(wrong))), torch.no_grad():
            F.mixer_block(x, **block.parameters, backend=backend, **wrong)


def test_another_value_of_an_option_is_another_call(backend, device):
    block, x = a_block(device=device), make_x(1, SHAPE, BF16, device)
    for options in ({}, {"eps": 1.0}, {"eps": (1.0, 2.0)}, {"approximate": "tanh"}):
        with torch.no_grad():
            direct = F.mixer_block(x, **block.parameters, backend=backend, **options)
            with Operators() as operators:
                expected = F.mixer_block(x, **block.parameters, backend=backend, **options)
        assert operators.names and torch.equal(direct, expected), options
    assert known() == 4


def test_no_tensor_is_kept(backend, device):
    block, x = a_block(dtype=torch.float32, device=device), make_x(1, SHAPE, BF16, device)
    with torch.autocast(device, BF16):
        run(block, x, backend)
    block.parameters["w1"].data = block.parameters["w1"].data.double()  # is copied before it is packed
    with torch.autocast(device, BF16):
        run(block, x, backend)
    assert known()
    storages = [weakref.ref(t) for t in (x, *block.parameters.values())]
    del block, x
    gc.collect()
    assert all(storage() is None for storage in storages)
    held = gc.get_referents(*[item for pair in remembered._known.items() for item in pair])
    assert not any(isinstance(each, torch.Tensor) for each in held)


def test_there_is_an_end_to_it(monkeypatch, device):
    remembered.forget()
    monkeypatch.setattr(remembered, "MOST", 3)
    block = a_block(dtype=torch.float32, device=device)
    for size in (1, 2, 3, 4, 5, 1):
        x = make_x(size, SHAPE, torch.float32, device)
        assert torch.equal(run(block, x, "triton"), by_operator(block, x, "triton"))
        assert known() <= 3


# -------------------------------------------------------------------------------------------------- who looks at it


def test_gradients_after_inference_on_the_same_tensors(backend, device):
    block, x = a_block(device=device), make_x(1, SHAPE, BF16, device)
    y = run(block, x, backend)
    trained = F.mixer_block(x, **block.parameters, backend=backend)
    assert torch.equal(trained, y)
    trained.float().sum().backward()
    assert all(p.grad is not None for p in block.parameters.values())
    fixed = {name: p.detach() for name, p in block.parameters.items()}
    assert not F.mixer_block(x, **fixed, backend=backend).requires_grad  # in grad mode, with nothing to differentiate
    assert F.mixer_block(x.requires_grad_(), **fixed, backend=backend).requires_grad


def test_a_profiler_sees_the_operator(backend, device):
    block, x = a_block(device=device), make_x(1, SHAPE, BF16, device)
    for _ in range(2):
        run(block, x, backend)
    with torch.profiler.profile() as profile:
        run(block, x, backend)
        F.mixer_block(x, **block.parameters, backend=backend).float().sum().backward()
    names = {f"mixer_kernels::{name}" for name in ("mixer_block", "token_mixing", "channel_mixing_backward")}
    assert names <= {event.key for event in profile.key_averages()}


def trained(block, x, backend, through):
    """Gradients of x and the parameters, ``through`` a context."""
    x = x.detach().requires_grad_()
    with through:
        y = F.mixer_block(x, **block.parameters, backend=backend)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *block.parameters.values()])]


def test_training_is_that_of_the_operators(backend, device):
    block, x = a_block(device=device), make_x(2, SHAPE, BF16, device)
    straight = trained(block, x, backend, contextlib.nullcontext())
    with Operators() as operators:
        expected = trained(block, x, backend, operators)
    called = list(dict.fromkeys(operators.names))
    assert called == ["token_mixing", "channel_mixing", "channel_mixing_backward", "token_mixing_backward"]
    assert all(map(torch.equal, straight, expected))


def test_training_calls_no_operator(backend, device, monkeypatch):
    block, x = a_block(device=device), make_x(2, SHAPE, BF16, device)
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "call_backward", None, raising=False)
    monkeypatch.setattr(ops, "token_mixing", None)
    monkeypatch.setattr(ops, "channel_mixing", None)
    trained(block, x, backend, contextlib.nullcontext())


def test_saved_tensor_hooks_and_a_second_derivative(backend, device):
    block, x = a_block(device=device), make_x(2, SHAPE, BF16, device)
    straight = trained(block, x, backend, contextlib.nullcontext())
    assert all(map(torch.equal, straight, trained(block, x, backend, torch.autograd.graph.save_on_cpu())))
    y = F.token_mixing(x.requires_grad_(), *block.token(), backend=backend)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="have no gradient here .a second derivative"):
        dx.float().sum().backward()


def test_vmap_and_negative_views(backend, device):
    block, x = a_block(device=device), make_x(2, SHAPE, BF16, device)
    expected = run(block, x, backend)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda one: F.mixer_block(one, **block.parameters, backend=backend))(x[:, None])
    assert torch.equal(mapped[:, 0], expected)
    assert torch.equal(run(block, torch._neg_view(-x), backend), expected)  # PyTorch negates it before an operator
    block.parameters["w1"] = torch._neg_view(-block.parameters["w1"].data)
    assert torch.equal(run(block, x, backend), expected)


def test_fake_tensors(device):
    from torch._subclasses import FakeTensorMode

    block, x = a_block(dtype=torch.float32, device=device), make_x(1, SHAPE, torch.float32, device)
    run(block, x, "triton")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = run(block, mode.from_tensor(x), "triton")
    assert type(y).__name__ == "FakeTensor" and y.shape == x.shape


# ------------------------------------------------------------------------------------------------------- modules


def test_threads(cuda_kernels, device):
    """Blocks of one description, whose plans and addresses are each their own."""
    remembered.forget()
    blocks = [a_block(device=device) for _ in range(4)]
    inputs = [make_x(1, SHAPE, BF16, device) for _ in blocks]
    expected = [by_operator(block, x, "cuda") for block, x in zip(blocks, inputs, strict=True)]
    wrong = []

    def work(first: int) -> None:
        for i in range(24):
            which = (first + i) % 4
            if not torch.equal(run(blocks[which], inputs[which], "cuda"), expected[which]):
                wrong.append((first, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and known() == 4


@pytest.mark.parametrize("frozen", (False, True), ids=("", "frozen"))
def test_copies_of_a_block_that_has_run(frozen, cuda_kernels, device):
    remembered.forget()
    block = FusedMixerBlock(24, 20, device=device, dtype=BF16).eval()
    x = make_x(1, SHAPE, BF16, device)
    with torch.no_grad(), use_backend("cuda"):
        if frozen:
            assert freeze_(block).frozen
        keys = set(block.state_dict())
        y = block(x)
        assert known() == 1 and set(block.state_dict()) == keys
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(twin(x), y)
            if not frozen:
                twin.mlp_tokens.fc1.weight.data.mul_(2)
                assert not torch.equal(twin(x), y)
            assert torch.equal(block(x), y)
        assert known() == 3


def test_a_frozen_block_whose_weights_are_swapped(cuda_kernels, device):
    block = FusedMixerBlock(24, 20, device=device, dtype=BF16).eval()
    x = make_x(1, SHAPE, BF16, device)
    with torch.no_grad(), use_backend("cuda"):
        assert freeze_(block).frozen
        y = block(x)
        weight = block.mlp_tokens.fc1.weight
        for change in (weight.data.clone(), weight.data[:-1], weight.data.view(20, 12).t(), weight.data.float()):
            good = weight.data
            weight.data = change
            for _ in range(2):
                with pytest.raises(RuntimeError, match="mlp_tokens.fc1.weight was written to, replaced or converted"):
                    block(x)
            weight.data = good
            assert torch.equal(block(x), y)


def test_a_frozen_block_that_changes_otherwise(cuda_kernels, device):
    """What it repeats is compared with hooks, modes and numbers of its parts too, and with the backend asked for."""
    block = FusedMixerBlock(24, 20, drop=0.5, device=device, dtype=BF16).eval()
    x, seen = make_x(1, SHAPE, BF16, device), []
    with torch.no_grad(), use_backend("cuda"):
        assert freeze_(block).frozen
        y = block(x)
        fc1, drop = block.mlp_tokens.fc1, block.mlp_channels.drop1
        handle = fc1.register_forward_hook(lambda *_: seen.append(1))
        block(x)
        assert seen == [1]
        handle.remove()
        assert torch.equal(block(x), y) and seen == [1]
        drop.train()
        assert not torch.equal(block(x), y)
        drop.eval()
        block.norm1.eps = 1.0
        assert not torch.equal(block(x), y)
        block.norm1.eps = 1e-6
        assert torch.equal(block(x), y)
        assert torch.equal(block(torch.cat((x, x)))[1:], y)
        with use_backend("torch"), torch.profiler.profile() as profile:
            block(x)
        assert "aten::linear" in {event.key for event in profile.key_averages()}
        block.norm2.weight.mul_(2)
        with pytest.raises(RuntimeError, match="norm2.weight was written to"):
            block(x)
