"""freeze_ and unfreeze_: packs are made once, belong to their block, and a promise that is broken is said."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from mlp_mixer_pytorch import MLPMixer
from small_mixer import images, make_model
from timm.layers import GatedMlp, GluMlp
from timm.models.mlp_mixer import Affine, ResBlock, SpatialGatingBlock
from torch import nn

from mixer_kernels import FusedMixerBlock, freeze_, fuse_, unfreeze_, unfuse_, use_backend

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="waits for a machine without a GPU: counts in the strict interpreter"
)


def kernels(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """What ``model`` gives without gradients, and the kernels that it launched."""
    import strict_interpreter

    with torch.no_grad(), strict_interpreter.record() as launches:
        y = model(x)
    return y, [one.kernel for one in launches]


@pytest.fixture
def model() -> nn.Module:
    """timm's, fused, in bfloat16: its products need packs."""
    model = make_model(num_blocks=2).bfloat16().eval()
    fuse_(model, backend="triton")
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return images().bfloat16()


RESMLP = {"num_blocks": 1, "mlp_ratio": 4, "block_layer": partial(ResBlock, init_values=0.1), "norm_layer": Affine}
KINDS = {
    "mixer": {"num_blocks": 1},
    "gmixer": {"num_blocks": 1, "mlp_ratio": (1.0, 4.0), "mlp_layer": GluMlp, "act_layer": nn.SiLU},
    "resmlp": RESMLP,
    "gmlp": {"num_blocks": 1, "mlp_ratio": 6, "block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp},
}


def example(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of a library or relative, and its input."""
    if kind == "lucidrains":
        return MLPMixer(image_size=16, channels=3, patch_size=8, dim=24, depth=1, num_classes=5), images()
    if kind == "patchtsmixer":
        from transformers import PatchTSMixerConfig, PatchTSMixerModel

        sizes = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3, "d_model": 8}
        config = PatchTSMixerConfig(**sizes, num_layers=1, mode="mix_channel", gated_attn=True, dropout=0.0)
        return PatchTSMixerModel(config), torch.randn(2, 16, 3)
    return make_model(**KINDS[kind]), images()


@pytest.mark.parametrize("kind", (*KINDS, "lucidrains", "patchtsmixer"))
def test_a_frozen_model_launches_no_packing(kind):
    model, x = example(kind)
    model, x = model.bfloat16().eval(), x.bfloat16()

    def output(x):
        y = model(x)
        return y if isinstance(y, torch.Tensor) else y.last_hidden_state

    fuse_(model, backend="triton")
    state = model.state_dict()
    expected, before = kernels(output, x)
    assert "_pack_kernel" in before
    report = freeze_(model)
    assert report.frozen and not report.left, report
    got, after = kernels(output, x)
    assert torch.equal(got, expected)
    assert after == [name for name in before if name != "_pack_kernel"]
    assert list(model.state_dict()) == list(state)
    assert len(unfreeze_(model)) == len(report) and not list(unfreeze_(model))
    assert kernels(output, x)[1] == before and not any("_pack" in name for name, _ in model.named_buffers())


def test_a_frozen_block_makes_no_pack_by_other_operators():
    """ResMLP's scaled weights included: no ATen kernel but views and new memory."""
    model = make_model(**RESMLP).bfloat16().eval()
    fuse_(model, backend="triton")
    freeze_(model)
    tokens = torch.randn(2, 4, 24).bfloat16()
    with torch.no_grad(), torch.profiler.profile() as profile:
        model.blocks[0](tokens)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::mul", "aten::copy_", "aten::_to_copy", "aten::cat"}, names


def test_under_autocast():
    """Frozen under the autocast of inference; elsewhere it packs in each call, and is right."""
    model, x = make_model(num_blocks=1).eval(), images()
    fuse_(model, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = kernels(model, x)
        freeze_(model)
        got, launched = kernels(model, x)
    assert torch.equal(got, expected) and "_pack_kernel" not in launched
    y, launched = kernels(model, x)
    assert "_pack_kernel" in launched
    unfreeze_(model)
    assert torch.equal(kernels(model, x)[0], y)


@pytest.mark.parametrize(
    ("copied", "name"),
    ((lambda m: m, "itself"), (copy.deepcopy, "a deepcopy"), (lambda m: pickle.loads(pickle.dumps(m)), "a pickle")),
)
def test_packs_go_along(copied, name, model, x):
    freeze_(model)
    expected, launched = kernels(model, x)
    twin = copied(model).to("cpu", torch.bfloat16)
    y, got = kernels(twin, x)
    assert torch.equal(y, expected) and got == launched
    buffers = [t.data_ptr() for t in model.buffers()]
    assert name == "itself" or not set(buffers) & {t.data_ptr() for t in twin.buffers()}
    with torch.no_grad():
        twin.blocks[1].mlp_channels.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="block 'blocks.1' is frozen, but its mlp_channels.fc1.weight was written"):
        kernels(twin, x)
    for later in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")):
        with pytest.raises(RuntimeError, match="call mixer_kernels.unfreeze_ and then freeze_ again"):
            kernels(later(twin), x)
    freeze_(twin)
    changed = kernels(twin, x)[0]
    assert not torch.equal(changed, expected)
    unfreeze_(twin)
    assert torch.equal(kernels(twin, x)[0], changed)


def _step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _new_parameter(model):
    fc2 = model.blocks[0].mlp_tokens.fc2
    fc2.bias = nn.Parameter(fc2.bias.detach() + 1)


def _new_layer(model):
    tokens = model.blocks[0].mlp_tokens
    tokens.fc1 = copy.deepcopy(tokens.fc1).requires_grad_(False)


def _new_half(model):
    model.blocks[0].mlp_tokens = copy.deepcopy(model.blocks[0].mlp_tokens)


def _no_bias(model):
    model.blocks[0].mlp_channels.fc1.bias = None


def _new_storage(model):
    p = model.blocks[0].norm2.weight
    p.data = p.data + 1


@pytest.mark.parametrize(
    ("write", "what"),
    (
        (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())), "norm1.weight"),
        (_step, "norm1.weight"),
        (_new_parameter, "mlp_tokens.fc2.bias"),
        (_new_layer, "mlp_tokens.fc1"),
        (_new_half, "mlp_tokens"),
        (_no_bias, "mlp_channels.fc1.bias"),
        (_new_storage, "norm2.weight"),
        (lambda m: m.float(), "norm1.weight"),
        (lambda m: m.half(), "norm1.weight"),
    ),
    ids=(
        "load_state_dict",
        "step",
        "another parameter",
        "another layer",
        "another half",
        "no bias",
        "another storage",
        "float",
        "half",
    ),
)
def test_what_pytorch_counts_raises(write, what, model, x):
    freeze_(model)
    write(model)
    with pytest.raises(RuntimeError, match=f"block 'blocks.0' is frozen, but its {what} was written to, replaced or"):
        kernels(model, x.to(model.head.weight.dtype))
    unfreeze_(model)
    kernels(model, x.to(model.head.weight.dtype))


def test_training_raises(model, x):
    with pytest.raises(RuntimeError, match="block 'blocks.0' is in training mode: call model.eval"):
        freeze_(model.train())
    freeze_(model.eval())
    with pytest.raises(RuntimeError, match="'blocks.0' is frozen, but its norm1.weight requires a gradient.*no_grad"):
        model(x)
    with pytest.raises(RuntimeError, match="'blocks.0' is frozen, but in training mode: call mixer_kernels.unfreeze_"):
        kernels(model.train(), x)
    model.eval().requires_grad_(False)
    x.requires_grad_()
    model(x).float().sum().backward()  # of the input: its packs are made in the call
    assert x.grad.isfinite().all()
    unfreeze_(model)
    model.train().requires_grad_(True)
    model(x).float().sum().backward()


def test_left_as_it_is(model, x):
    fuse_(model, backend="torch")
    report = freeze_(model)
    assert not report and [entry.outcome for entry in report] == ["left"] * 2
    assert "nothing to keep" in report.left[0].detail
    fuse_(model, backend="triton")
    model.blocks[0].mlp_tokens.act.register_forward_hook(lambda *_: None)
    report = freeze_(model)
    assert [entry.name for entry in report.frozen] == ["blocks.1"] and "hooks" in report.left[0].detail
    assert len(unfuse_(model)) == 2 and not any(b is not None for _, b in model.named_buffers())
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got int"):
        freeze_(1)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got int"):
        unfreeze_(1)


@pytest.mark.parametrize("autocast", (False, True), ids=("bfloat16", "float32 under autocast"))
def test_our_own_block(autocast):
    """In either form of fc1: its weight with LayerNorm folded into it, and as it is."""
    block, x = FusedMixerBlock(24, 20).eval(), torch.randn(2, 20, 24)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    if not autocast:
        block, x = block.bfloat16(), x.bfloat16()
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, _ = kernels(block, x)
        assert len(freeze_(block)) == 1
        got, launched = kernels(block, x)
        with pytest.raises(RuntimeError, match="the block is frozen, but in training mode"):
            block.train()(x)
    assert torch.equal(got, expected) and len(launched) == 5


def test_compiles_in_one_graph(model, x):
    freeze_(model)
    expected, launched = kernels(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y, got = kernels(compiled, x)
    assert torch.equal(y, expected) and got == launched


def test_packs_are_static_inputs_of_a_compiled_graph(model, x):
    """mode="reduce-overhead" copies other inputs before each replay: buffers it does not."""
    freeze_(model)
    packs = {t.data_ptr() for name, t in model.named_buffers() if "_pack" in name}
    seen = []

    def backend(graph, inputs):
        static = [t for t in inputs if getattr(t, "_dynamo_static_input_type", None)]
        seen.append({t.data_ptr() for t in static})
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    assert len(seen) == 1 and packs and packs <= seen[0]


def test_exports(model, x):
    freeze_(model)
    expected, launched = kernels(model, x)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    y, got = kernels(program.module(), x)
    assert torch.equal(y, expected) and got == launched
