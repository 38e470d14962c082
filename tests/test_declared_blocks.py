"""fuse_ on blocks of a user's own: inference, training, what changes later, copies, shards."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from declared_blocks import (
    BLOCKS,
    D_S,
    DROPS,
    MINE,
    PARTS,
    SHARED,
    C,
    Mine,
    S,
    SharedNorm,
    images,
    trained,
)
from parity import check_fused
from timm.layers import DropPath
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from mixer_kernels import MixerParts, freeze_, functional, fuse_, unfuse_


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The options of each call of functional.mixer_block by a block; the check gives no packs."""
    seen: list[dict] = []
    original = functional.mixer_block
    monkeypatch.setattr(
        functional, "mixer_block", lambda *a, **k: seen.extend([k] * ("packs" in k)) or original(*a, **k)
    )
    return seen


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.usefixtures("through_functional")
@pytest.mark.parametrize(("make", "parts", "function"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_ones_own(make, parts, function) -> None:
    model = nn.Sequential(trained(make()), nn.Linear(C, C), trained(make()))
    report = check_fused(model, images(), blocks={type(model[0]): parts})
    assert [(entry.name, entry.detail) for entry in report] == [
        ("0", f"functional.{function}"),
        ("2", f"functional.{function}"),
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("make", "parts", "function"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_ones_own_on_the_kernels(make, parts, function, device) -> None:
    block = trained(make())
    check_fused(block, images().to(device), blocks={type(block): parts}, backend="triton")


def test_inference_on_the_cpu_kernels() -> None:
    block = trained(Mine()).eval()
    x, exact = images(), copy.deepcopy(block).double()
    fuse_(block, blocks={Mine: MINE}, backend="cpu")
    with torch.no_grad():
        for _ in range(3):  # the last ones repeat a call
            torch.testing.assert_close(block(x), exact(x.double()).float())
            block.ln_a.weight.mul_(2), exact.ln_a.weight.mul_(2)


@pytest.mark.usefixtures("through_functional")
def test_dropout_and_stochastic_depth_are_the_parts_own(calls) -> None:
    class Deep(Mine):
        def __init__(self) -> None:
            super().__init__(p=0.3)
            self.path = DropPath(0.2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.path(self.mixers["tok"](self.ln_a(x).transpose(1, 2)).transpose(1, 2))
            return x + self.path(self.mixers["ch"](self.ln_b(x)))

    block, x = Deep().train(), images(8)
    torch.manual_seed(3)
    expected = block(x)
    parts = MixerParts(**PARTS, **DROPS, drop_path1="path", drop_path2="path")
    assert fuse_(block, blocks={Deep: parts}).fused[0].detail == "functional.mixer_block"
    torch.manual_seed(3)
    torch.testing.assert_close(block(x), expected)
    block.path.drop_prob = 0.1
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
    block(x), block.eval()(x)
    noise = [(call["dropout_p"], call["drop_path_p"]) for call in calls]
    assert noise == [(0.3, 0.2), (0.4, 0.1), (0.0, 0.0)]
    block.train().mixers["tok"][2].p = 0.1
    block(x)
    assert len(calls) == 3


class FunctionalDropout(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * F.dropout(x, 0.01, self.training))


class SometimesSkipped(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 1e-9 else super().forward(x)


class ScaledInTraining(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


@pytest.mark.usefixtures("through_functional")
@pytest.mark.parametrize("cls", [FunctionalDropout, SometimesSkipped, ScaledInTraining])
def test_what_training_does_beside_is_computed_as_before(cls, calls, said) -> None:
    block, x = cls().train(), images()
    detail = fuse_(block, blocks={cls: MINE}).fused[0].detail
    assert (
        detail
        == "functional.mixer_block, but not in this mode: in training its forward draws or does more than was declared"
    )
    torch.manual_seed(3)
    expected = cls.forward(block, x)
    torch.manual_seed(3)
    assert torch.equal(block(x), expected)
    assert not calls and len(said) == 1
    block.eval()(x)
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ what is found wrong


class Counting(Mine):
    seen: list[nn.Module] = []

    def __init__(self, sizes: int = 1, mask: int = 1) -> None:
        super().__init__()
        self.sizes = [sizes]
        self.register_buffer("mask", torch.tensor(mask))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self)
        return super().forward(x)


def test_blocks_that_differ_in_their_weights_alone_are_checked_once() -> None:
    tied = Counting()
    tied.ln_b.bias = tied.ln_a.bias
    alike = [trained(Counting()) for _ in range(3)]
    model = nn.Sequential(*alike, Counting(sizes=2), Counting(mask=2), tied, Counting(sizes=2))
    assert len(fuse_(model, blocks={Counting: MINE})) == 7
    assert len(set(Counting.seen)) == 4
    x = images()
    torch.testing.assert_close(model[1](x), Counting.forward(model[1], x))


class Drawing(Mine):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            torch.rand(()), random.random(), np.random.rand()
        return super().forward(x)


def test_the_check_leaves_no_traces() -> None:
    block = trained(Drawing(p=0.3)).train()
    block.ln_a.eval(), block.ln_b.bias.requires_grad_(False)
    block.register_forward_hook(lambda *_: pytest.fail("the block itself ran"))
    before = {name: (p.clone(), p._version, p.requires_grad) for name, p in block.named_parameters()}
    modes, keys = [m.training for m in block.modules()], [sorted(m.__dict__) for m in block.modules()]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]
        fuse_(block, blocks={Drawing: MINE})
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
        assert all(np.array_equal(a, b) for a, b in zip(states[2], np.random.get_state()[1:3], strict=True))
    for name, p in block.named_parameters():
        value, version, requires_grad = before[name]
        assert torch.equal(p, value) and p._version == version and p.requires_grad == requires_grad and p.grad is None
    unfuse_(block)
    assert (modes, keys) == ([m.training for m in block.modules()], [sorted(m.__dict__) for m in block.modules()])
    assert type(block) is Drawing


CHANGES = {
    "an activation": lambda b: b.twice.__setitem__(1, nn.ReLU()),
    "a form": lambda b: setattr(b.mixers["tok"][1], "approximate", "tanh"),
    "a part": lambda b: setattr(b, "ln_a", nn.Identity()),
    "a number": lambda b: setattr(b, "scale", 2.0),
    "a function": lambda b: setattr(b, "after", torch.square),
    "an attribute of the class": lambda b: setattr(b, "factor", 2.0),
    "a method": lambda b: setattr(b, "before", torch.square),
    "one of a layer's two places": lambda b: b.twice.__setitem__(0, nn.Linear(S, D_S)),
}


class Changing(Mine):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.after = 1.0, torch.clone
        self.twice = nn.Sequential(*self.mixers["tok"])  # which are those that are called

    def before(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = x + self.twice(self.ln_a(x).transpose(1, 2)).transpose(1, 2)
        return self.after(self.scale * self.factor * (x + self.mixers["ch"](self.ln_b(x))))


@pytest.mark.usefixtures("through_functional")
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_is_computed_as_changed(change, copied, calls, said) -> None:
    block, x = trained(Changing()).eval(), images()
    fuse_(block, blocks={Changing: MINE})
    block(x)
    block = copy.deepcopy(block) if copied else block
    change(block)
    with torch.no_grad():
        expected = Changing.forward(block, x)
        assert torch.equal(block(x), expected) and len(calls) == 1
        assert len(said) == 1 and "is not what it was when fuse_ checked the block: call fuse_ again" in said[0]
    unfuse_(block)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_ends_repeated_calls(change) -> None:
    block, x = trained(Changing()).eval(), images()
    fuse_(block, blocks={Changing: MINE}, backend="cpu")
    with torch.no_grad():
        for _ in range(3):
            block(x)
        change(block)
        assert torch.equal(block(x), Changing.forward(block, x))


class Keyword(Mine):
    def forward(self, inp: Tensor | None = None) -> Tensor:
        return images(1).sum() if inp is None else super().forward(inp)


@pytest.mark.usefixtures("through_functional")
def test_calls_by_keyword_are_those_of_the_own_forward(calls) -> None:
    block, x = trained(Keyword()).eval(), images()
    expected = block(inp=x)
    fuse_(block, blocks={Keyword: MINE})
    torch.testing.assert_close(block(inp=x), expected)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(inp=x), expected)
    assert len(calls) == 2 and block().dim() == 0
    for wrong in ({"x": x}, {"inp": x, "mask": x}):
        with pytest.raises(TypeError, match="forward.. got an unexpected keyword argument"):
            block(**wrong)


@pytest.mark.usefixtures("through_functional")
def test_fusing_again(calls) -> None:
    block, x = trained(Mine()).eval(), images()
    first = fuse_(block, blocks={Mine: MINE})
    fused = type(block)
    assert fuse_(block, memory="min") == first and type(block) is fused
    block.mixers["tok"][1] = block.mixers["ch"][1] = nn.ReLU()
    expected = Mine.forward(block, x)
    with pytest.raises(ValueError, match="with activation='relu'"):
        fuse_(block)
    assert torch.equal(block(x), expected) and not calls
    parts = MixerParts(**PARTS, **DROPS, activation="relu")
    assert len(fuse_(block, blocks={type(block): parts})) == 1 and type(block) is not fused
    torch.testing.assert_close(block(x), expected)
    assert len(calls) == 1 and calls[0]["activation"] == "relu"
    unfuse_(block)
    assert type(block) is Mine


@pytest.mark.usefixtures("through_functional")
def test_copies_pickles_and_names(calls) -> None:
    model, x = nn.Sequential(trained(Mine()), trained(Mine())).eval(), images()
    fuse_(model, blocks={Mine: MINE}, memory="min")
    expected = model(x)
    assert type(model[0]).__name__ == "Mine" and isinstance(model[0], Mine) and type(model[0]) is type(model[1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(twin(x), expected) and [call["memory"] for call in calls] == ["min"] * 2
        assert len(unfuse_(twin)) == 2 and type(twin[0]) is Mine
        assert torch.equal(twin(x), expected) is False or len(calls) == 2


def test_freezing() -> None:
    block, x = trained(SharedNorm()).eval(), images()
    with torch.no_grad():
        expected = block(x)
        fuse_(block, blocks={SharedNorm: SHARED}, backend="triton")
        report = freeze_(block)
        assert len(report.frozen) == 1 and "triton" in report.frozen[0].detail
        torch.testing.assert_close(block(x), expected)
        unfuse_(block)
        assert torch.equal(block(x), expected) and not list(block.buffers())


@pytest.mark.usefixtures("through_functional")
def test_a_block_compiles_in_one_graph() -> None:
    block, x = trained(Mine()).eval(), images()
    fuse_(block, blocks={Mine: MINE})
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.usefixtures("process_group", "through_functional")
def test_fsdp2_shards_fused_blocks(calls) -> None:
    model, x = nn.Sequential(trained(Mine()), trained(Mine())).double(), images().double()
    expected, first = model(x), fuse_(model, blocks={Mine: MINE})
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 and fuse_(model) == first
    assert "it has become a FSDPMine" in unfuse_(model).left[0].detail
