"""Each kind of block that fuse_ knows, in the models that have it: logits and gradients before, while and after.

Fused models follow the accuracy rule against float64; after unfuse_ they are what they were, to the last bit. All
models on the torch backend, a small one of each kind of block on the kernels as well. Depth, width and image size are
cut down for time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from mlp_mixer_pytorch import MLPMixer, MLPMixer3D, Permutator
from parity import check_fused
from timm.models import mlp_mixer
from torch import Tensor, nn

from mixer_kernels import functional, fuse_

pytestmark = pytest.mark.usefixtures("through_functional")

ENTRY_POINTS = [name for name in timm.list_models(module="mlp_mixer")]
# What the kernels compute a block of each family by.
FUNCTIONS = {
    "mixer": {"functional.mixer_block"},
    "gmixer": {"functional.mixer_block"},
    "resmlp": {"functional.token_linear, channel_mixing"},
    "gmlp": {"functional.gated_channel_mixing"},
}


def small(name: str, monkeypatch: pytest.MonkeyPatch, **changes) -> nn.Module:
    """A model by timm's entry point ``name``: two blocks, an eighth of the width, two by two patches."""

    def create(variant: str, pretrained: bool, **options) -> nn.Module:
        smaller = {
            "num_blocks": 2,
            "embed_dim": options["embed_dim"] // 8,
            "img_size": 2 * options["patch_size"],
            "num_classes": 7,
        }
        return mlp_mixer.MlpMixer(**options | smaller | changes)

    monkeypatch.setattr(mlp_mixer, "_create_mixer", create)
    return with_trained_looks(timm.model_entrypoint(name)())


def with_trained_looks(model: nn.Module) -> nn.Module:
    """Norms, biases, scales and gates as trained ones are, none of them 0 or 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or parameter.shape[:2] == (1, 1):
                parameter += 0.2 * torch.randn_like(parameter)
            elif "gate" in name or "head" in name:
                parameter += 0.2 * torch.randn_like(parameter) * parameter.shape[1] ** -0.5
    return model


def check(model: nn.Module, x: Tensor, **options) -> set[str]:
    """Outputs and gradients before, while and after; the functions that all its blocks ran by."""
    report = check_fused(model, x, **options)
    assert not report.left
    return {entry.detail for entry in report.fused}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_timm_entry_points(name, monkeypatch) -> None:
    model = small(name, monkeypatch)
    assert check(model, torch.randn(2, 3, *model.stem.img_size)) == FUNCTIONS[name.split("_")[0].rstrip("0123456789")]


# One of each kind of block, smaller still, for the kernels.
KINDS = {
    "MixerBlock, Mlp": ("mixer_s32_224", {"num_blocks": 1, "embed_dim": 24}),
    "MixerBlock, GluMlp": ("gmixer_12_224", {"num_blocks": 1, "embed_dim": 24}),
    "ResBlock": ("resmlp_12_224", {"num_blocks": 1, "embed_dim": 24}),
    "SpatialGatingBlock": ("gmlp_ti16_224", {"num_blocks": 1, "embed_dim": 24}),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), KINDS.values(), ids=KINDS)
def test_timm_blocks_on_the_kernels(name, options, dtype, device, monkeypatch) -> None:
    model = small(name, monkeypatch, **options)
    check(model, torch.randn(2, 3, *model.stem.img_size, device=device).to(dtype), backend="triton")


@pytest.mark.parametrize("noise", [{"proj_drop_rate": 0.3}, {"drop_path_rate": 0.4}], ids=["dropout", "drop path"])
@pytest.mark.parametrize(("name", "options"), KINDS.values(), ids=KINDS)
def test_timm_blocks_draw_timms_masks(name, options, noise, monkeypatch) -> None:
    model = small(name, monkeypatch, **options, **noise).train()
    x = torch.randn(8, 3, *model.stem.img_size)
    torch.manual_seed(3)
    expected = model(x)
    assert all("not in this mode" not in entry.detail for entry in fuse_(model).fused)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(model.eval()(x), expected)


def test_resmlp_inference_follows_layer_scale(device, monkeypatch) -> None:
    """LayerScale is multiplied into a weight once, and again when either changes."""
    model = small("resmlp_12_224", monkeypatch, num_blocks=1, embed_dim=24).to(device).eval()
    reference = copy.deepcopy(model)
    fuse_(model, backend="triton")
    x = torch.randn(2, 3, *model.stem.img_size, device=device)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), reference(x))
            for m in (model, reference):
                m.blocks[0].ls2.mul_(3)


# What each of timm's other blocks must have; a part of the reason where one has something else.
LEFT = {
    "affine": ("resmlp_12_224", lambda b: setattr(b, "norm2", nn.LayerNorm(48)), "norm2 is LayerNorm"),
    "hooked affine": ("resmlp_12_224", lambda b: b.norm1.register_forward_hook(print), "norm1 has hooks"),
    "token layer": ("resmlp_12_224", lambda b: setattr(b, "linear_tokens", nn.Identity()), "Identity, not torch.nn"),
    "activation": ("resmlp_12_224", lambda b: setattr(b.mlp_channels, "act", nn.Tanh()), "Tanh, not GELU"),
    "drop path": ("resmlp_12_224", lambda b: setattr(b, "drop_path", nn.Dropout()), "drop_path is Dropout"),
    "gated activation": ("gmlp_ti16_224", lambda b: setattr(b.mlp_channels, "act", nn.ReLU()), "has ReLU, not GELU"),
    "mlp": ("gmlp_ti16_224", lambda b: setattr(b, "mlp_channels", nn.Identity()), "Identity, not GatedMlp"),
    "gate": ("gmlp_ti16_224", lambda b: setattr(b.mlp_channels, "gate", nn.Identity()), "not SpatialGatingUnit"),
    "hooked gate": ("gmlp_ti16_224", lambda b: b.mlp_channels.gate.register_forward_hook(print), "gate has hooks"),
    "gate's norm": ("gmlp_ti16_224", lambda b: setattr(b.mlp_channels.gate, "norm", nn.Identity()), "gate.norm is Id"),
    "gate's layer": ("gmlp_ti16_224", lambda b: b.mlp_channels.gate.proj.register_forward_hook(print), "hooks"),
    "gate bits": ("gmixer_12_224", lambda b: setattr(b.mlp_tokens, "gate_last", False), "gate_last=False"),
    "two kinds": ("gmixer_12_224", lambda b: setattr(b, "mlp_tokens", timm.layers.Mlp(4, 48)), "different activations"),
}


@pytest.mark.parametrize(("name", "change", "reason"), LEFT.values(), ids=LEFT)
def test_timm_blocks_left_alone(name, change, reason, monkeypatch) -> None:
    model = small(name, monkeypatch)
    change(model.blocks[1])
    report = fuse_(model)
    assert [entry.name for entry in report.left] == ["blocks.1"] and reason in report.left[0].detail
    assert [entry.name for entry in report.fused] == ["blocks.0"]


# ------------------------------------------------------------------------------------------------------- lucidrains

LUCIDRAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "default factors": (
        lambda: MLPMixer(image_size=16, channels=3, patch_size=8, dim=24, depth=2, num_classes=5),
        (2, 3, 16, 16),
    ),
    "the paper's factors": (
        lambda: MLPMixer(
            image_size=(24, 16), channels=1, patch_size=8, dim=20, depth=2, num_classes=5,
            expansion_factor=0.5, expansion_factor_token=4,
        ),
        (2, 1, 24, 16),
    ),
    "3D": (
        lambda: MLPMixer3D(
            image_size=16, time_size=4, time_patch_size=2, channels=3, patch_size=8, dim=24, depth=1, num_classes=5
        ),
        (2, 3, 4, 16, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), LUCIDRAINS.values(), ids=LUCIDRAINS)
def test_lucidrains(make, shape) -> None:
    functions = check(with_trained_looks(make()), torch.randn(shape))
    assert functions == {"functional.token_mixing", "functional.channel_mixing"}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lucidrains_on_the_kernels(dtype, device) -> None:
    model = with_trained_looks(MLPMixer(image_size=16, channels=1, patch_size=8, dim=24, depth=1, num_classes=5))
    check(model, torch.randn(2, 1, 16, 16, device=device).to(dtype), backend="triton")


def test_lucidrains_ensembles_by_vmap() -> None:
    """Weights that a transform of functions puts in the place of parameters."""
    models = [MLPMixer(image_size=16, channels=1, patch_size=8, dim=24, depth=1, num_classes=5) for _ in range(2)]
    fuse_(models[0])
    weights = {name: torch.stack((a, models[1].state_dict()[name])) for name, a in models[0].state_dict().items()}
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        both = torch.vmap(lambda weights: torch.func.functional_call(models[0], weights, x))(weights)
        torch.testing.assert_close(both, torch.stack([model(x) for model in models]))


def test_lucidrains_what_is_left() -> None:
    model = MLPMixer(image_size=16, channels=3, patch_size=8, dim=24, depth=3, num_classes=5)
    model[2][0].fn[1] = nn.ReLU()
    model[3][0].fn[3] = nn.Conv1d(96, 4, 3, padding=1)
    model[3][1].fn[0].register_forward_hook(lambda *_: None)
    model[4][1].norm = nn.RMSNorm(24)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    report = fuse_(model)
    torch.testing.assert_close(model(x), expected)
    assert [(entry.name, entry.detail) for entry in report.left] == [
        ("2.0", "fn has ReLU, not GELU"),
        ("3.0", "fn has a Conv1d that is not pointwise"),
        ("3.1", "fn has hooks or a replaced forward on a Linear"),
        ("4.1", "norm is RMSNorm, not a plain LayerNorm"),
    ]
    assert [entry.name for entry in report.fused] == ["2.1", "4.0"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_lucidrains_dropout_follows_the_mode(training, monkeypatch) -> None:
    model = MLPMixer(image_size=16, channels=3, patch_size=8, dim=24, depth=1, num_classes=5, dropout=0.3)
    fuse_(model.train(training), memory="min")
    seen = []
    for name in ("token_mixing", "channel_mixing"):
        monkeypatch.setattr(functional, name, lambda x, *args, **kwargs: seen.append(kwargs) or x)
    model(torch.randn(2, 3, 16, 16))
    assert [options["dropout_p"] for options in seen] == ([0.3, 0.3] if training else [0, 0])
    assert seen[0]["eps"] == 1e-5 and seen[1]["memory"] == "min"


def test_lucidrains_permutator_is_no_mixer() -> None:
    model = Permutator(image_size=16, patch_size=8, dim=8, depth=1, num_classes=5, segments=2)
    assert not list(fuse_(model))
