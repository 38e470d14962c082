"""fuse_ on blocks of a user's own: declarations that are wrong, blocks that are left."""

from __future__ import annotations

import functools

import pytest
import torch
from declared_blocks import (
    D_S,
    DROPS,
    MINE,
    PARTS,
    SHARED,
    TOKENS,
    C,
    Mine,
    S,
    SharedNorm,
    TokenHalf,
    error,
)
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn

from mixer_kernels import MixerParts, fuse_


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


class Masked(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.any(-1, keepdim=True)


class Clamped(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-65504, 65504)


class Flushed(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.where(x.abs() > 1e-4, 0))


class NotCopied(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.last = self.ln_a.weight * 2


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
    "a mask": (Masked, {}, "where x has a row of zeros, so that it depends on their size"),
    "a bound": (Clamped, {}, "where x has a row of numbers around 1e+06"),
    "small numbers": (Flushed, {}, "where x has a row of numbers around 0.001"),
    "an error": (Broken, {}, "its forward raised KeyError on a random float64 x (2, 6, 16), whose"),
}


@pytest.mark.parametrize(("make", "change", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_declaration_is_an_error(make, change, expected) -> None:
    block = make()
    said = error(block, MixerParts(**PARTS | DROPS | change))
    assert said.startswith(f"blocks[{type(block).__name__}] does not describe the block: ") and expected in said, said


def test_a_block_that_cannot_be_copied_is_named() -> None:
    said = error_of(nn.Sequential(NotCopied()), {NotCopied: MINE})
    assert said.startswith("blocks[NotCopied]: fuse_ checks a copy of block '0', but copy.deepcopy raised RuntimeError")


class Outer(Mine):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TokenHalf()


def test_a_block_in_a_declared_block() -> None:
    model = nn.Sequential(Outer())
    said = error_of(model, {Outer: MINE, TokenHalf: TOKENS})
    assert "block '0.inner', TokenHalf, lies in block '0', Outer" in said and "leave Outer or TokenHalf out" in said
    assert type(model[0]) is Outer and type(model[0].inner) is TokenHalf
    fuse_(model, blocks={TokenHalf: TOKENS})
    assert "unfuse_ the one of an earlier call" in error_of(model, {Outer: MINE})


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
        "it has 'norms', a name that fused blocks use: rename it",
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
