"""Training through the kernels in every mode that people train in: the same weights as with the torch backend.

Where two runs on the kernels are the same computation, they are compared to the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from mixer_kernels import FusedMixer, use_backend

# The model that `make demo` trains.
DIGITS = {"num_classes": 10, "img_size": 8, "in_chans": 1, "patch_size": 2, "num_blocks": 4, "embed_dim": 64}
TINY = {"num_classes": 3, "img_size": 4, "in_chans": 1, "patch_size": 2, "num_blocks": 2, "embed_dim": 8}
NOISE = {"proj_drop_rate": 0.2, "drop_path_rate": 0.3}
LEARNING_RATE = 3e-3
# AdamW divides by the gradient's size plus this. Its default, 1e-8, makes a whole step of learning rate out of the
# rounding errors of a gradient that is almost zero, and runs of eager PyTorch that differ in rounding drift apart.
ADAM_EPS = 1e-3


@pytest.fixture(autouse=True)
def on_the_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def make_model(device: str, **config) -> nn.Module:
    """A new model whose classifier is not zero, so that all parameters have gradients from the first step on."""
    model = FusedMixer(**config).to(device)
    nn.init.normal_(model.head.weight, std=0.3)
    return model


def make_batch(device: str, size: int, config=TINY) -> tuple[Tensor, Tensor]:
    images = torch.rand(size, 1, config["img_size"], config["img_size"], device=device) * 2 - 1
    return images, torch.arange(size, device=device) % config["num_classes"]


def adamw(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05, **{"eps": ADAM_EPS} | options)


def autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast(device, dtype) if dtype else contextlib.nullcontext()


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """One forward and backward pass; the loss."""
    images, labels = batch
    with autocast(images.device.type, dtype):
        loss = F.cross_entropy(model(images).float(), labels, label_smoothing=0.1)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and weights after some steps of AdamW on one batch. The model given stays as it is."""
    model = copy.deepcopy(model).train()
    optimizer = adamw(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(backward(model, batch, dtype))
        optimizer.step()
    return torch.stack(losses), weights_of(model)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum((first[name].double() - second[name].double()).square().sum().item() for name in first) ** 0.5


def evaluated(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def on_fresh_weights(model: nn.Module, images: Tensor) -> Tensor:
    """What a copy computes, whose parameters no call has seen."""
    return evaluated(copy.deepcopy(model), images)


def test_float32_follows_the_torch_backend(device) -> None:
    """Each loss is off by at most 8 units in the last place, each parameter by 5e-5 of how far it moved.

    The gradients are sums of up to 256 products in float32, added up in another order: a relative error of some
    sqrt(256) * 6e-8 = 1e-6, which four steps through AdamW enlarge a few times (3e-6 is seen). An element counts as
    having moved by at least one step of the learning rate: b2 of token mixing adds the same to all channels of a token,
    each LayerNorm after it takes that away again, and what is left of its gradient is rounding.
    """
    model, batch = make_model(device, **DIGITS), make_batch(device, 8, DIGITS)
    losses, weights = train(model, batch, steps=4)
    with use_backend("torch"):
        expected_losses, expected = train(model, batch, steps=4)
    start = weights_of(model)
    assert expected_losses[-1] < 0.95 * expected_losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    for name in weights:
        moved = max((expected[name] - start[name]).norm().item(), LEARNING_RATE * weights[name].numel() ** 0.5)
        assert (weights[name] - expected[name]).norm() <= 5e-5 * moved, name


def test_bfloat16_autocast_follows_the_torch_backend(device) -> None:
    """At most three times as far from float32 training as the torch backend's own bfloat16 autocast is.

    Measured on the weights, some hundred thousand numbers: in the mean of a loss, rounding errors cancel by luck.
    """
    model, batch = make_model(device, **DIGITS), make_batch(device, 8, DIGITS)
    _, weights = train(model, batch, 4, torch.bfloat16)
    with use_backend("torch"):
        _, eager = train(model, batch, 4, torch.bfloat16)
        _, exact = train(model, batch, 4)
    assert 0 < distance(weights, exact) <= 3 * distance(eager, exact)


def test_float16_autocast_with_grad_scaler(device) -> None:
    """An overflow skips the step and lowers the scale; the next gradients are within three times eager's error."""
    start, batch = make_model(device, **TINY), make_batch(device, 2)

    def run(backend: str) -> dict[str, Tensor]:
        model = copy.deepcopy(start)
        optimizer, scaler = adamw(model), torch.amp.GradScaler(device, init_scale=2.0**30, backoff_factor=2.0**-20)
        for scale in (2.0**30, 2.0**10):
            assert scaler.get_scale() == scale
            before = weights_of(model)
            optimizer.zero_grad()
            with use_backend(backend), autocast(device, torch.float16):
                loss = F.cross_entropy(model(batch[0]), batch[1])
            with use_backend(backend):
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            gradients = gradients_of(model)
            scaler.step(optimizer)
            scaler.update()
            moved = distance(weights_of(model), before)
            assert moved == 0 if scale == 2.0**30 else moved > 0
        assert scaler.get_scale() == 2.0**10
        return gradients

    ours, eager = run("triton"), run("torch")
    with use_backend("torch"):
        F.cross_entropy(start(batch[0]), batch[1]).backward()
    exact = gradients_of(start)
    assert 0 < distance(ours, exact) <= 3 * distance(eager, exact)


@pytest.mark.parametrize("noise", [{}, NOISE], ids=["plain", "dropout"])
def test_gradient_checkpointing_changes_nothing(noise, device) -> None:
    model, batch = make_model(device, **TINY, **noise), make_batch(device, 2)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        backward(model, batch)
        gradients.append(gradients_of(model))
    assert_same(*gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_block_has_the_same_gradients(use_reentrant, device) -> None:
    block = make_model(device, **TINY, **NOISE).blocks[0]
    x = torch.randn(2, 4, 8, device=device)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        run(leaf).square().sum().backward()
        results.append(gradients_of(block) | {"x": leaf.grad})
    assert_same(*results)


def test_memory_modes_train_alike(device) -> None:
    """Not to the bit: "min" computes z by another product."""
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    lean = FusedMixer(**TINY, memory="min").to(device)
    lean.load_state_dict(model.state_dict())
    (losses, weights), (lean_losses, lean_weights) = (train(m, batch, 2) for m in (model, lean))
    torch.testing.assert_close(lean_losses, losses, rtol=1e-5, atol=0)
    assert distance(lean_weights, weights) <= 1e-4 * distance(weights, weights_of(model))


def test_gradients_accumulate(device) -> None:
    model = make_model(device, **TINY)
    separate = []
    batches = [make_batch(device, size) for size in (2, 1)]
    for batch in batches:
        model.zero_grad()
        backward(model, batch)
        separate.append(gradients_of(model))
    model.zero_grad()
    for batch in batches:
        backward(model, batch)
    assert_same(gradients_of(model), {name: separate[0][name] + separate[1][name] for name in separate[0]})


def test_functional_call_trains_the_weights_given(device) -> None:
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    other = make_model(device, **TINY)
    backward(other, batch)
    given = {name: weight.requires_grad_() for name, weight in weights_of(other).items()}
    logits = torch.func.functional_call(model, given, batch[0])
    F.cross_entropy(logits.float(), batch[1], label_smoothing=0.1).backward()
    assert_same({name: weight.grad for name, weight in given.items()}, gradients_of(other))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_copies_train_alike_and_apart(device) -> None:
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    evaluated(model, batch[0])
    start = weights_of(model)
    expected = train(model, batch, steps=1)[1]
    assert distance(expected, start) > 0
    assert_same(train(pickle.loads(pickle.dumps(model)), batch, steps=1)[1], expected)
    assert_same(weights_of(model), start)


FROZEN = ("blocks.0.mlp_tokens.fc1.weight", "blocks.1.norm2.weight", "blocks.1.mlp_channels.fc2.bias")


def test_parameters_frozen_between_steps(device) -> None:
    """A frozen parameter gets no gradient and stays; all others move; the gradients of the rest stay the same.

    Frozen in the blocks alone: what a convolution computes when its bias is frozen is PyTorch's to choose.
    """
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    optimizer = adamw(model)
    parameters = dict(model.named_parameters())
    for frozen in ((), FROZEN, ()):
        model.requires_grad_(True)
        optimizer.zero_grad()
        backward(model, batch)
        full = gradients_of(model)
        for name in frozen:
            parameters[name].requires_grad_(False)
        optimizer.zero_grad()
        backward(model, batch)
        before = weights_of(model)
        optimizer.step()
        for name, parameter in parameters.items():
            assert (parameter.grad is None) is (name in frozen), name
            assert torch.equal(parameter, before[name]) is (name in frozen), name
            assert name in frozen or torch.equal(parameter.grad, full[name]), name


def test_deterministic_algorithms(device) -> None:
    """None of them is missing; PyTorch may have others than without."""
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (train(model, batch, steps=1)[1] for _ in range(2))
        assert_same(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_evaluation_sees_the_optimizers_step(options, device) -> None:
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    before = evaluated(model, batch[0])
    optimizer = adamw(model, **options)
    backward(model.train(), batch)
    optimizer.step()
    after = evaluated(model, batch[0])
    assert not torch.equal(after, before)
    assert torch.equal(after, on_fresh_weights(model, batch[0]))


def test_evaluation_sees_loaded_halved_and_averaged_weights(device) -> None:
    model, batch = make_model(device, **TINY), make_batch(device, 2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    first = evaluated(model, batch[0])
    assert torch.equal(evaluated(average, batch[0]), first)

    other = make_model(device, **TINY)
    model.load_state_dict(other.state_dict())
    second = evaluated(model, batch[0])
    assert not torch.equal(second, first) and torch.equal(second, on_fresh_weights(other, batch[0]))

    average.update_parameters(model)
    mean = evaluated(average, batch[0])
    assert not torch.equal(mean, first) and torch.equal(mean, on_fresh_weights(average, batch[0]))

    images = batch[0].half()
    half = evaluated(model.half(), images)
    assert half.dtype is torch.float16 and torch.equal(half, on_fresh_weights(model, images))
    assert torch.equal(evaluated(model.float(), batch[0]), on_fresh_weights(model, batch[0]))


@pytest.mark.parametrize("config", [{}, {"memory": "min"}, NOISE], ids=["fast", "min", "dropout"])
def test_a_compiled_training_step_is_the_eager_one(config, device) -> None:
    model, batch = make_model(device, **TINY, **config), make_batch(device, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        loss = backward(run, batch)
        results.append(gradients_of(model) | {"loss": loss})
    eager, actual = results
    # The stem, the head and the loss are PyTorch's, and the compiler may choose other operators for them.
    torch.testing.assert_close(actual, eager, rtol=1e-5, atol=1e-6)
