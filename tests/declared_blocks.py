"""Blocks of a user's own, and what MixerParts says of them."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer_kernels import MixerParts, fuse_

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
