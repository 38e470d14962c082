"""What a block remembers of itself is never stale: after any change it says what a block without a memory says."""

from __future__ import annotations

import copy
import numbers
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from small_mixer import make_model
from test_freeze import KINDS, example
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from mixer_kernels import FusedMixerBlock, fuse_, unfuse_
from mixer_kernels.snapshot import Snapshot, Watched

pytestmark = pytest.mark.usefixtures("metadata_read")


def blocks_of(kind: str) -> list[Watched]:
    """One block of each class that a model of this kind has, all as fuse_ and a first question leave them."""
    if kind == "ours":
        model = FusedMixerBlock(8, 4)
    else:
        model, _ = example(kind)
        fuse_(model, backend="triton")
    blocks = {type(m): m for m in model.modules() if isinstance(m, Watched)}.values()
    for _ in range(2):  # a layer's first memory is of mixers that have none
        assert blocks and all(ask(block) is None for block in blocks)
    return list(blocks)


def ask(block: Watched) -> str | None:
    """Whether it is covered, as it says with its memory; what it says must be what one without says."""
    remembered = block.why_not_covered_now()
    assert remembered == type(block).why_not_covered(block)
    return remembered


@pytest.fixture(params=(*KINDS, "lucidrains", "patchtsmixer", "ours"))
def blocks(request) -> list[Watched]:
    return blocks_of(request.param)


def parts(block: nn.Module) -> list[nn.Module]:
    return list(block.modules())[1:]


@contextmanager
def attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """``module`` with another attribute, past ``nn.Module.__setattr__``."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    yield
    if before is missing:
        del module.__dict__[name]
    else:
        module.__dict__[name] = before


def others(value: object) -> list[object]:
    """Values of the same kind, and None."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, numbers.Number):
        return [0, -1, value + 1, None]
    if isinstance(value, str):
        return ["tanh", "none", "sigmoid", None]
    if isinstance(value, tuple):
        return [tuple(v + 1 for v in value if isinstance(v, int)), (1,), None]
    return [1, True]


def test_it_is_asked_once(blocks, monkeypatch) -> None:
    asked = []
    for block in blocks:
        cls, original = type(block), type(block).why_not_covered
        monkeypatch.setattr(cls, "why_not_covered", staticmethod(lambda b, f=original: asked.append(b) or f(b)))
        for mode in (True, False, True):
            assert block.train(mode).why_not_covered_now() is None
    assert not asked


def test_every_plain_attribute(blocks) -> None:
    seen = 0
    for block in blocks:
        for module in (block, *parts(block)):
            for name, value in list(module.__dict__.items()):
                if name.startswith("_") and name != "_fast_norm" or not isinstance(value, (*_kinds(), type(None))):
                    continue
                for other in others(value):
                    with attribute(module, name, other):
                        try:
                            type(block).why_not_covered(block)
                        except TypeError:  # None > 0
                            with pytest.raises(TypeError):
                                block.why_not_covered_now()
                        else:
                            seen += ask(block) is not None
                    assert ask(block) is None
    assert seen


def _kinds() -> tuple[type, ...]:
    return bool, numbers.Number, str, tuple


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks(register, blocks) -> None:
    for block in blocks:
        for part in (module for each in block.parts() for module in each.modules()):
            for _ in range(2):  # the first one leaves a trace in another attribute
                handle = getattr(part, f"register_{register}_hook")(lambda *_: None)
                assert ask(block) is not None
                handle.remove()
                assert ask(block) is None
        handle = getattr(nn.modules.module, f"register_module_{register}_hook")(lambda *_: None)
        try:
            assert "global" in ask(block)
        finally:
            handle.remove()
        assert ask(block) is None


def test_hooks_in_another_dictionary(blocks) -> None:
    """As who empties ``_forward_hooks`` by a new one, and registers again."""
    for block in blocks:
        part = next(p for p in parts(block) if isinstance(p, nn.Linear | nn.Conv1d))
        part._forward_hooks = OrderedDict()
        assert ask(block) is None
        part.register_forward_hook(lambda *_: None)
        assert "hooks" in ask(block)
        part._forward_hooks = OrderedDict()
        assert ask(block) is None


def test_other_parts_classes_weights_and_forwards(blocks) -> None:
    for block in blocks:
        for name, part in list(block.named_modules())[1:]:
            parent, leaf = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            parent._modules[leaf] = nn.Tanh()
            changed = _reason(block)
            parent._modules[leaf] = part
            assert ask(block) is None
            cls = type(part)
            part.__class__ = type(cls.__name__, (cls,), {})
            assert (_reason(block) is None) is (changed is None)
            part.__class__ = cls
            assert ask(block) is None  # and remembers it
            with attribute(part, "forward", torch.tanh):
                _reason(block)
            assert ask(block) is None
            weight = part._parameters.get("weight")
            if weight is not None and weight.dim() > 1:
                part.weight = nn.Parameter(TwoTensor(weight.detach(), weight.detach()))
                assert (ask(block) is None) is (name.startswith("channel_feature_mixer"))  # called as it is
                part.weight = weight
                assert ask(block) is None


def _reason(block: Watched) -> str | None:
    """``ask``, of a block that may lack what its reasons are read from."""
    try:
        expected = type(block).why_not_covered(block)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        with pytest.raises(type(error)):
            block.why_not_covered_now()
        return "broken"
    assert block.why_not_covered_now() == expected
    return expected


@pytest.mark.parametrize(
    ("change", "undo"),
    [
        (
            lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        ),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
            lambda layer: prune.remove(layer, "weight"),
        ),
    ],
    ids=["parametrize", "prune"],
)
def test_parametrized_and_pruned(change, undo, blocks) -> None:
    for block in blocks:
        layer = next(p for p in parts(block) if isinstance(p, nn.Linear | nn.Conv1d))
        change(layer)
        assert ask(block) is not None
        undo(layer)
        assert ask(block) is None


COPIES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "copy": copy.copy,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies(name, blocks) -> None:
    for block in blocks[:1]:  # a layer's are blocks themselves
        twin = COPIES[name](block)
        assert isinstance(twin.__dict__["_snapshot"], Snapshot) is (name == "copy")
        assert ask(twin) is None
        part = next(p for p in parts(twin) if isinstance(p, nn.LayerNorm | nn.Linear))
        part.register_forward_hook(lambda *_: None)
        assert "hooks" in ask(twin)
        assert (ask(block) is None) is (name != "copy")  # which shares its parts
        twin.__dict__["_modules"] = {n: nn.Identity() for n in twin._modules}
        assert _reason(twin) is not None


def test_replicas_of_data_parallel() -> None:
    """A shallow copy whose parts are replaced, and whose weights are plain attributes."""
    [block] = blocks_of("mixer")
    replica = block._replicate_for_data_parallel()
    assert replica._snapshot is block._snapshot
    for name, part in block._modules.items():
        replica._modules[name] = copy.deepcopy(part)
    assert ask(replica) is None and replica._snapshot is not block._snapshot
    fc1 = replica.mlp_tokens.fc1
    weight = fc1.weight.detach()
    del fc1._parameters["weight"]
    fc1.__dict__["weight"] = weight
    assert ask(replica) is None
    fc1.__dict__["weight"] = TwoTensor(weight, weight)
    assert "subclass" in ask(replica)
    assert ask(block) is None


def test_a_quantised_weight_set_later() -> None:
    [block] = blocks_of("mixer")
    weight = block.mlp_channels.fc2.weight.detach()
    block.mlp_channels.fc2.weight = nn.Parameter(TwoTensor(weight, weight))
    assert "subclass" in ask(block)


def test_unfuse_and_other_options_leave_nothing() -> None:
    model = make_model(num_blocks=1)
    before = set(model.blocks[0].__dict__)
    fuse_(model, backend="triton")
    block = model.blocks[0]
    assert ask(block) is None and block._snapshot is not None
    fuse_(model, backend="torch")
    assert ask(block) is None
    unfuse_(model)
    assert set(block.__dict__) == before


def test_not_while_compiling(monkeypatch) -> None:
    """A graph's guards are PyTorch's: what a block remembers is not among them."""
    block = FusedMixerBlock(8, 4).double().eval()
    torch._dynamo.reset()
    x = torch.randn(1, 4, 8).double()
    from mixer_kernels.functional import checks

    monkeypatch.setattr(checks, "runs_on_torch", lambda *_: False)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
        assert block._snapshot is None
        torch.testing.assert_close(block(x), expected)
        assert block._snapshot is not None
        seen = []
        block.mlp_tokens.fc1.register_forward_hook(lambda *_: seen.append(1))
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(x), expected)
        assert seen
