"""A small model of timm's for the tests of fuse_: equal to the last bit where "auto" means the torch backend."""

from __future__ import annotations

import pytest
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from mixer_kernels import functional

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_blocks": 3, "num_classes": 5}


def make_model(**options) -> MlpMixer:
    """timm's model of three small blocks, in training mode, with random norms, biases and head."""
    model = MlpMixer(**SMALL | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients, for a seed and an upstream gradient that are the same on every call."""
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], upstream)]


def assert_same(expected: list[Tensor], got: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The options of each call of functional.mixer_block, which still runs."""
    seen: list[dict] = []
    original = functional.mixer_block

    def counted(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "mixer_block", counted)
    return seen
