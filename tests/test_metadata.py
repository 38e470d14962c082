"""What is compared between two calls, in Python and compiled: the same changes are seen by both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixer_kernels import metadata
from mixer_kernels.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("metadata_read")
DENSE = torch.randn(6, 4)
OTHERS = {
    "another address": DENSE.clone(),
    "a part of it": DENSE[:3],
    "transposed": DENSE.t(),
    "another row length": DENSE.view(4, 6),
    "other strides": DENSE.as_strided((6, 4), (2, 1)),
    "one row": DENSE[0],
    "negated": torch._neg_view(DENSE),
    "another dtype": DENSE.view(torch.int32),
    "a shorter dtype": DENSE.view(torch.bfloat16).as_strided((6, 4), (4, 1)),
    "none": None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_tensors_that_differ_are_described_differently(other: Tensor | None) -> None:
    assert metadata.described([DENSE, None, DENSE]) == metadata.described([DENSE.view(6, 4), None, DENSE.detach()])
    assert metadata.described([DENSE, None, other]) != metadata.described([DENSE, None, DENSE])
    assert len({metadata.described([DENSE]), metadata.described([other])}) == 2  # as keys


def test_a_tensor_without_an_address_has_no_description() -> None:
    with pytest.raises(RuntimeError):
        metadata.described([DENSE, DENSE.to_sparse()])


def set_to(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda norm: setattr(norm, name, value)


CHANGES = {
    "a number": set_to("eps", 0.5),
    "what cannot be compared": set_to("eps", torch.ones(2)),
    "another tuple": set_to("normalized_shape", (4, 1)),
    "a method hidden": set_to("forward", torch.sin),
    "an attribute gone": lambda norm: delattr(norm, "eps"),
    "a hook": lambda norm: norm.register_forward_pre_hook(lambda *_: None),
    "another class": set_to("__class__", nn.Identity),
    "a parameter of another class": lambda norm: norm._parameters.update(bias=DENSE),
    "a parameter gone": lambda norm: norm._parameters.pop("bias"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[nn.Module], None]) -> None:
    block = nn.Sequential(nn.Sequential(nn.LayerNorm(4), nn.GELU()))
    snapshot = Snapshot(block, block.children())
    block(torch.ones(4)), block.train(), block.eval()
    block[0][0].weight = nn.Parameter(torch.zeros(4))
    assert snapshot.holds(block)
    change(block[0][0])
    assert not snapshot.holds(block)


def test_another_child_is_seen() -> None:
    block = nn.Sequential(nn.Sequential(nn.GELU()))
    snapshot = Snapshot(block, block.children())
    block[0][0] = nn.GELU()
    assert not snapshot.holds(block)
