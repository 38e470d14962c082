"""fuse_ on blocks of a user's own: what MixerParts says of them, what it gets wrong, what changes later."""

from __future__ import annotations

import copy
import functools
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import check_fused
from timm.layers import DropPath
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from mixer_kernels import MixerParts, freeze_, functional, fuse_, unfuse_

S, C, D_S, D_C = 6, 16, 10, 24


def mlp(features: int, hidden: int, act: nn.Module, p: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), act, nn.Dropout(p), nn.Linear(hidden, features), nn.Dropout(p))


class Mine(nn.Module):
    """As most are written by hand."""

    def __init__(self, act: type[nn.Module] = nn.GELU, p: float = 0.0) -> None:
        super().__init__()
        self.ln_a, self.ln_b = nn.LayerNorm(C), nn.LayerNorm(C, eps=1e-6)
        self.mixers = nn.ModuleDict({"tok": mlp(S, D_S, act(), p), "ch": mlp(C, D_C, act(), p)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixers["tok"](self.ln_a(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mixers["ch"](self.ln_b(x))


PARTS = {
    "norm1": "ln_a",
    "fc1": "mixers.tok.0",
    "fc2": "mixers.tok.3",
    "norm2": "ln_b",
    "fc3": "mixers.ch.0",
    "fc4": "mixers.ch.3",
}
DROPS = {"drop1": "mixers.tok.2", "drop2": "mixers.tok.4", "drop3": "mixers.ch.2", "drop4": "mixers.ch.4"}
MINE = MixerParts(**PARTS, **DROPS)


class SharedNorm(nn.Module):
    """One LayerNorm for both halves, tokens by Conv1d, no biases, functions for activations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.up, self.down = nn.Conv1d(S, D_S, 1), nn.Conv1d(D_S, S, 1, bias=False)
        self.wide, self.narrow = nn.Linear(C, D_C, bias=False), nn.Linear(D_C, C)
        self.act = F.silu

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.act(self.up(self.norm(x)))) + x
        return self.narrow(self.act(self.wide(self.norm(x)))) + x


SHARED = MixerParts(norm1="norm", fc1="up", fc2="down", norm2="norm", fc3="wide", fc4="narrow", activation="silu")


class TokenHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.LayerNorm(C, elementwise_affine=False), mlp(S, D_S, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.norm(x).mT).mT


class ChannelHalf(nn.Module):
    """Its products are Conv1d on a transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Conv1d(C, D_C, 1), nn.Conv1d(D_C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x).mT), approximate="tanh")).mT


TOKENS = MixerParts(norm1="norm", fc1="net.0", fc2="net.3", activation="relu")
CHANNELS = MixerParts(norm2="norm", fc3="up", fc4="down", approximate="tanh")
BLOCKS = {
    "GELU": (Mine, MINE, "mixer_block"),
    "tanh GELU": (
        lambda: Mine(functools.partial(nn.GELU, "tanh")),
        MixerParts(**PARTS, approximate="tanh"),
        "mixer_block",
    ),
    "ReLU": (lambda: Mine(nn.ReLU), MixerParts(**PARTS, activation="relu"), "mixer_block"),
    "one norm, Conv1d, SiLU": (SharedNorm, SHARED, "mixer_block"),
    "token half": (TokenHalf, TOKENS, "token_mixing"),
    "channel half": (ChannelHalf, CHANNELS, "channel_mixing"),
}


def trained(block: nn.Module) -> nn.Module:
    """``block`` with norms and biases that are not 1 and 0."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return block


def images(*size: int) -> Tensor:
    return torch.randn(*size or (2,), S, C)


def error(block: nn.Module, parts: MixerParts) -> str:
    """What fuse_ says of it; the block stays as it is."""
    before = type(block)
    with pytest.raises(ValueError) as caught:
        fuse_(block, blocks={type(block): parts})
    assert type(block) is before
    return str(caught.value)


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


class Scaled(Mine):
    """With a scale that is one in a new model, for each half."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(C)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale[0] * self.mixers["tok"](self.ln_a(x).mT).mT
        return x + self.scale[1] * self.mixers["ch"](self.ln_b(x))


class ScaledChannels(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixers["tok"](self.ln_a(x).mT).mT
        return x + self.scale[1] * self.mixers["ch"](self.ln_b(x))


class Detached(Mine):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixers["tok"](self.ln_a(x.detach()).mT).mT
        return x + self.mixers["ch"](self.ln_b(x))


class WithoutGradients(Mine):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Pair(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), None


class Narrow(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Broken(Mine):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("mask")


WRONG = {
    "norms the wrong way round": (Mine, {"norm1": "ln_b", "norm2": "ln_a"}, "its token half differs by up to"),
    "one norm for two": (Mine, {"norm2": "ln_a"}, "its forward calls ln_a once, not twice"),
    "another activation": (
        lambda: Mine(nn.ReLU),
        {},
        "with activation='relu' and approximate='none' it agrees",
    ),
    "another form of GELU": (
        lambda: Mine(functools.partial(nn.GELU, "tanh")),
        {},
        "with activation='gelu' and approximate='tanh' it agrees",
    ),
    "an activation that there is not": (lambda: Mine(nn.Tanh), {}, "its token half differs by up to"),
    "a scale in both": (Scaled, {}, "its token half differs by up to"),
    "a scale of channels": (ScaledChannels, {}, "its channel half differs by up to"),
    "layers swapped": (
        Mine,
        {"fc1": "mixers.tok.3", "fc2": "mixers.tok.0"},
        "its forward raised RuntimeError on a random float64 x (2, 10, 16)",
    ),
    "a half in the other's place": (
        Mine,
        {"fc1": "mixers.ch.0", "fc2": "mixers.ch.3", "fc3": "mixers.tok.0", "fc4": "mixers.tok.3"},
        "on a random float64 x (2, 16, 16), whose",
    ),
    "dropout elsewhere": (Mine, {"drop1": "mixers.ch.2"}, "its token half differs by up to"),
    "a gradient cut off": (Detached, {}, "the gradient of x differs by up to"),
    "no gradients": (WithoutGradients, {}, "its forward gives no gradients"),
    "two results": (Pair, {}, "it returns a tuple"),
    "another dtype": (Narrow, {}, "it returns a torch.float32 (2, 6, 16)"),
    "an error": (Broken, {}, "its forward raised KeyError on a random float64 x (2, 6, 16), whose"),
}


@pytest.mark.parametrize(("make", "change", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_declaration_is_an_error(make, change, expected) -> None:
    block = make()
    said = error(block, MixerParts(**PARTS | DROPS | change))
    assert said.startswith(f"blocks[{type(block).__name__}] does not describe the block: ") and expected in said, said


def test_the_error_says_how_much_and_of_which_block() -> None:
    model = nn.ModuleDict({"good": Mine(), "bad": Mine(nn.ReLU)})
    said = error_of(model, {Mine: MINE})
    assert "block 'bad'" in said
    numbers = said.split("differs by up to ")[1].split(" from what was declared, whose largest value is ")
    assert 0 < float(numbers[0]) < float(numbers[1].split(";")[0])
    assert type(model["good"]) is Mine


def error_of(model: nn.Module, blocks: dict) -> str:
    with pytest.raises(ValueError) as caught:
        fuse_(model, blocks=blocks)
    return str(caught.value)


def test_wrong_arguments() -> None:
    block = Mine()
    assert "norm1 is 'ln_c', but there is no such submodule; there are ln_a, ln_b, mixers, mixers.tok" in error(
        block, MixerParts(**PARTS | {"norm1": "ln_c"})
    )
    assert "TokenHalf, of which the model has none" in error_of(block, {TokenHalf: TOKENS})
    assert "fuse_ knows timm.models.mlp_mixer.MixerBlock" in error_of(MixerBlock(C, S), {MixerBlock: MINE})
    for blocks in ({"Mine": MINE}, {int: MINE}, {Mine: PARTS}):
        with pytest.raises(TypeError, match="blocks"):
            fuse_(block, blocks=blocks)
    with pytest.raises(ValueError, match="fc1, drop1 given without norm1, fc2"):
        MixerParts(fc1="a", drop1="b")
    with pytest.raises(ValueError, match="no parts are given"):
        MixerParts()
    with pytest.raises(ValueError, match="activation must be one of"):
        MixerParts(**PARTS, activation="tanh")
    with pytest.raises(ValueError, match="a form of GELU"):
        MixerParts(**PARTS, activation="relu", approximate="tanh")
    with pytest.raises(TypeError, match="fc4 must be a submodule's dotted path, a string, got Linear"):
        MixerParts(**PARTS | {"fc4": nn.Linear(2, 2)})


class TakesMore(Mine):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Named(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(C)])


LEFT = {
    "more arguments": (TakesMore, lambda block: None, "TakesMore.forward takes more than x"),
    "a name that is taken": (
        Named,
        lambda block: None,
        "it has 'norms', a name that fused blocks need: call it otherwise",
    ),
    "a hook": (Mine, lambda b: b.mixers["tok"].register_forward_hook(print), "mixers.tok has hooks or a replaced"),
    "another norm": (Mine, lambda b: setattr(b, "ln_a", nn.RMSNorm(C)), "norm1 (ln_a) is RMSNorm"),
    "another layer": (
        Mine,
        lambda b: b.mixers["ch"].__setitem__(3, nn.Identity()),
        "fc4 (mixers.ch.3) has torch.nn.modules.linear.Identity",
    ),
    "another dropout": (
        Mine,
        lambda b: b.mixers["ch"].__setitem__(2, nn.AlphaDropout()),
        "drop3 (mixers.ch.2) has AlphaDropout",
    ),
    "a wide Conv1d": (
        SharedNorm,
        lambda b: setattr(b, "up", nn.Conv1d(S, D_S, 3, padding=1)),
        "fc1 (up) has a Conv1d that is not pointwise",
    ),
    "no weights": (Mine, lambda b: b.to("meta"), "its weights are on the meta device"),
    "its forward": (Mine, lambda b: setattr(b, "forward", print), "its forward was replaced"),
}


@pytest.mark.parametrize(("cls", "change", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left(cls, change, reason) -> None:
    block = cls()
    change(block)
    report = fuse_(block, blocks={cls: SHARED if cls is SharedNorm else MINE})
    assert not report and reason in report.left[0].detail, report


def test_a_subclass_is_left() -> None:
    model = nn.Sequential(Mine(), Scaled())
    report = fuse_(model, blocks={Mine: MINE})
    assert [(entry.name, entry.detail) for entry in report.left] == [("1", "it is a Scaled, a subclass of Mine")]


# -------------------------------------------------------------------------------------------------- before and after


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
