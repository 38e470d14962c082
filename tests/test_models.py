"""FusedMixer, and timm's MlpMixer with fused blocks, against timm's own models: equal to the last bit.

All on the CPU, where "auto" means the torch backend, which runs timm's operators; the kernels have tests of their own.
"""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp
from timm.models._manipulate import group_parameters
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from mixer_kernels import FusedMixer, FusedMixerBlock, functional, use_backend
from mixer_kernels.coverage import why_not_fused
from mixer_kernels.shapes import SPECS

ENTRY_POINTS = {
    "mixer_s32_224": "S/32", "mixer_s16_224": "S/16", "mixer_b32_224": "B/32",
    "mixer_b16_224": "B/16", "mixer_l32_224": "L/32", "mixer_l16_224": "L/16",
}  # fmt: skip
PAPER_PARAMETERS = {  # of the models for 224x224 pixels and 1000 classes
    "S/32": 19_104_624, "S/16": 18_528_264, "B/32": 60_293_428, "B/16": 59_880_472,
    "L/32": 206_939_264, "L/16": 208_196_168, "H/14": 432_350_952,
}  # fmt: skip
IMG_SIZE, NUM_BLOCKS, NUM_CLASSES, BATCH = 64, 1, 10, 2
SMALL = {"img_size": 16, "patch_size": 4, "num_blocks": 4, "embed_dim": 24, "num_classes": 5}


def randomize_(model: nn.Module) -> nn.Module:
    """Every parameter random: a new model's classifier and biases are zero, and hide errors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return model


def timm_model(name: str, **kwargs) -> nn.Module:
    """A timm entry point for small images and few blocks. The blocks that are dropped never get memory."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=IMG_SIZE, num_classes=NUM_CLASSES, **kwargs)
    model.blocks = model.blocks[:NUM_BLOCKS]
    return model.to_empty(device="cpu")


def small_twins(**config) -> tuple[nn.Module, nn.Module]:
    """timm's MlpMixer and FusedMixer with the same random weights."""
    theirs = randomize_(MlpMixer(**SMALL | config))
    ours = FusedMixer(**SMALL | config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def images_for(model: nn.Module, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    images = torch.randn(BATCH, model.stem.proj.in_channels, *model.stem.img_size).to(dtype)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def logits_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and all parameters' gradients, for the same upstream gradient on every call."""
    logits = model(images)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    return [logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), upstream)]


def assert_same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours)
    for expected, got in zip(theirs, ours, strict=True):
        assert torch.equal(expected, got)


@pytest.fixture(scope="module", params=ENTRY_POINTS)
def entry_point(request) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A timm model, the same with block_layer=FusedMixerBlock, and FusedMixer, all from timm's state_dict."""
    torch.manual_seed(0)
    theirs = randomize_(timm_model(request.param))
    fused_blocks = timm_model(request.param, block_layer=FusedMixerBlock)
    ours = FusedMixer.from_spec(
        ENTRY_POINTS[request.param], img_size=IMG_SIZE, num_classes=NUM_CLASSES, num_blocks=NUM_BLOCKS, device="meta"
    ).to_empty(device="cpu")
    for model in (fused_blocks, ours):
        model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, fused_blocks, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_entry_points_are_timms(entry_point, dtype: torch.dtype) -> None:
    theirs, *fused = (copy.deepcopy(model).to(dtype) for model in entry_point)
    for channels_last in (False, True):
        images = images_for(theirs, dtype, channels_last)
        with torch.no_grad(), use_backend("torch"):
            expected = theirs.eval()(images)
            assert expected.abs().max() > 0.1
            for model in fused:
                assert all(why_not_fused(block) is None for block in model.blocks)
                assert torch.equal(model.eval()(images), expected)
        if dtype is torch.float16 and theirs.embed_dim > 512:
            continue  # minutes on a CPU; the blocks' gradients in float16 are compared in test_modules
        expected = logits_and_gradients(theirs.train(), images)
        for model in fused:
            assert_same(expected, logits_and_gradients(model.train(), images))


CONFIGS = {
    "default": {},
    "not square": {"img_size": (16, 24), "patch_size": (8, 3)},
    "leftover pixels": {"img_size": 18},
    "odd sizes": {"img_size": 12, "embed_dim": 19, "in_chans": 1},
    "one ratio": {"mlp_ratio": 2.0},
    "tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "eps 1e-5": {"norm_layer": nn.LayerNorm},
    "stem norm": {"stem_norm": True},
    "no pool": {"global_pool": ""},
    "no head": {"num_classes": 0},
    "gmixer": {"mlp_layer": GluMlp, "act_layer": nn.SiLU, "mlp_ratio": (1.0, 4.0)},
    "rms norm": {"norm_layer": nn.RMSNorm},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configurations_are_timms(config) -> None:
    theirs, ours = small_twins(**config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = images_for(ours)
    assert_same(logits_and_gradients(theirs, images), logits_and_gradients(ours, images))
    assert torch.equal(ours.forward_features(images), theirs.forward_features(images))
    features = torch.randn(BATCH, ours.stem.num_patches, ours.embed_dim)
    for pre_logits in (False, True):
        assert torch.equal(ours.forward_head(features, pre_logits), theirs.forward_head(features, pre_logits))


@pytest.mark.parametrize("name", ["gmixer_12_224", "gmixer_24_224"])
def test_timms_gmixer_with_fused_blocks(name: str) -> None:
    theirs = randomize_(timm_model(name)).eval()
    ours = timm_model(name, block_layer=FusedMixerBlock).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = images_for(theirs)
    assert torch.equal(ours(images), theirs(images))


def test_dropout_draws_timms_masks() -> None:
    rates = {"drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.2}
    theirs, ours = small_twins(**rates)
    images = images_for(ours)
    torch.manual_seed(2)
    expected = logits_and_gradients(theirs.train(), images)
    torch.manual_seed(2)
    assert_same(expected, logits_and_gradients(ours.train(), images))
    assert not torch.equal(expected[0], theirs.eval()(images))


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), {"nlhb": True}, {"dtype": torch.float64}, {"proj_drop_rate": 0.1, "drop_path_rate": 0.1}],
    ids=[*CONFIGS, "nlhb", "float64", "dropout"],
)
def test_initial_weights_are_timms(config) -> None:
    torch.manual_seed(7)
    theirs = MlpMixer(**SMALL | config)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    ours = FusedMixer(**SMALL | config)
    assert torch.equal(torch.get_rng_state(), state)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    for model in (theirs, ours):
        torch.manual_seed(9)
        model.init_weights()
    assert_same(list(theirs.state_dict().values()), list(ours.state_dict().values()))


def test_initial_weights_where_timm_has_none() -> None:
    model = FusedMixer(**SMALL, norm_layer=partial(nn.LayerNorm, elementwise_affine=False))
    assert "norm.weight" not in model.state_dict()
    assert FusedMixer(**SMALL | {"num_classes": 0}, nlhb=True).head(torch.ones(1)).item() == 1  # timm: log(0)
    assert torch.all(FusedMixer(**SMALL, nlhb=True).head.bias == -math.log(5))


@pytest.mark.parametrize("name", SPECS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    model = FusedMixer.from_spec(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PAPER_PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_from_spec() -> None:
    model = FusedMixer.from_spec("B/16", img_size=448, num_classes=7, in_chans=1, num_blocks=1, device="meta")
    assert model.blocks[0].mlp_tokens.fc1.weight.shape == (384, 784)  # D_S stays, S grows
    assert model.stem.proj.weight.shape == (768, 1, 16, 16) and model.head.weight.shape == (7, 768)
    assert len(model.blocks) == 1
    with pytest.raises(ValueError, match="'S/32', 'S/16', .*'H/14', got 'B/8'"):
        FusedMixer.from_spec("B/8")


def test_attributes_are_timms() -> None:
    config = {"patch_size": (8, 4), "in_chans": 2}
    theirs, ours = small_twins(**config)
    names = ["num_classes", "num_features", "embed_dim", "head_hidden_size", "global_pool", "grad_checkpointing",
             "in_chans", "feature_info"]  # fmt: skip
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ["img_size", "patch_size", "grid_size", "num_patches"]:
        assert getattr(ours.stem, name) == getattr(theirs.stem, name), name
    assert ours.stem.feat_ratio(as_scalar=False) == theirs.stem.feat_ratio(as_scalar=False)
    assert group_parameters(ours, ours.group_matcher()) == group_parameters(theirs, theirs.group_matcher())


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("indices", [None, 2, [0, -1], [1], (2, 0)], ids=str)
def test_forward_intermediates_is_timms(indices, output_fmt: str) -> None:
    theirs, ours = small_twins(img_size=(16, 24))
    images = images_for(ours)
    for norm in (False, True):
        for stop_early in (False, True):
            options = {"indices": indices, "norm": norm, "stop_early": stop_early, "output_fmt": output_fmt}
            expected, expected_list = theirs.forward_intermediates(images, **options)
            got, got_list = ours.forward_intermediates(images, **options)
            assert torch.equal(got, expected)
            assert_same(expected_list, got_list)
            assert [t.stride() for t in got_list] == [t.stride() for t in expected_list]
            assert_same(expected_list, ours.forward_intermediates(images, **options, intermediates_only=True))


@pytest.mark.parametrize("options", [{}, {"indices": [1]}, {"indices": [0, -2], "prune_norm": True},
                                     {"indices": 2, "prune_head": False}], ids=str)  # fmt: skip
def test_prune_intermediate_layers_is_timms(options) -> None:
    theirs, ours = small_twins()
    assert ours.prune_intermediate_layers(**options) == theirs.prune_intermediate_layers(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = images_for(ours)
    assert torch.equal(ours(images), theirs(images))
    assert (ours.num_classes, ours.global_pool) == (theirs.num_classes, theirs.global_pool)


def test_reset_classifier() -> None:
    model = FusedMixer(**SMALL, dtype=torch.float64).eval()
    model.reset_classifier(3)
    assert model.get_classifier() is model.head
    assert model.head.weight.shape == (3, 24) and model.head.weight.dtype is torch.float64
    assert not model.head.training and model.num_classes == 3 and model.global_pool == "avg"
    model.reset_classifier(0, "")
    images = images_for(model, torch.float64)
    assert torch.equal(model(images), model.forward_features(images))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_grad_checkpointing_gives_the_same_gradients(rate: float, monkeypatch) -> None:
    _, model = small_twins(proj_drop_rate=rate)
    model.train()
    images = images_for(model)
    runs = []
    for block in model.blocks:
        monkeypatch.setattr(
            block, "forward", lambda x, block=block: runs.append(0) or FusedMixerBlock.forward(block, x)
        )
    torch.manual_seed(8)
    expected = logits_and_gradients(model, images)
    assert len(runs) == 4
    model.set_grad_checkpointing()
    torch.manual_seed(8)
    assert_same(expected, logits_and_gradients(model, images))
    assert len(runs) == 4 + 2 * 4  # each block once more in the backward pass
    model.set_grad_checkpointing(False)
    model(images)
    assert len(runs) == 16


def test_checkpointed_intermediates_have_the_same_gradients() -> None:
    _, model = small_twins()
    images = images_for(model)

    def gradients() -> list[Tensor]:
        features, intermediates = model.forward_intermediates(images, indices=[1, 2])
        loss = features.square().sum() + sum(y.square().sum() for y in intermediates)
        return list(torch.autograd.grad(loss, list(model.blocks.parameters())))

    expected = gradients()
    model.set_grad_checkpointing()
    assert_same(expected, gradients())


def test_copies_compute_the_same() -> None:
    _, model = small_twins()
    images = images_for(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))


def test_memory_reaches_the_blocks_and_only_if_asked_for() -> None:
    assert {block.memory for block in FusedMixer(**SMALL, memory="min").blocks} == {"min"}
    assert {block.memory for block in FusedMixer(**SMALL).blocks} == {"fast"}
    blocks = FusedMixer(**SMALL, block_layer=partial(FusedMixerBlock, memory="min")).blocks
    assert {block.memory for block in blocks} == {"min"}  # the default does not overrule it
    foreign = FusedMixer(**SMALL, block_layer=MixerBlock)
    assert torch.isfinite(foreign(images_for(foreign))).all()
    with pytest.raises(TypeError, match="memory"):
        FusedMixer(**SMALL, block_layer=MixerBlock, memory="min")
    with pytest.raises(ValueError, match="memory must be one of 'fast', 'min', got 'max'"):
        FusedMixer(**SMALL, memory="max")


def test_every_block_goes_through_the_functional_api(monkeypatch, through_functional) -> None:
    _, model = small_twins()
    images = images_for(model)
    expected = model(images)
    monkeypatch.setattr(functional, "mixer_block", lambda x, *args, **kwargs: x)
    assert not torch.equal(model(images), expected)
    assert torch.equal(model.forward_features(images), model.norm(model.stem(images)))


def test_compiles_in_one_graph() -> None:
    model = small_twins(num_blocks=2)[1].double()
    images = images_for(model, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = logits_and_gradients(model, images)
    torch.testing.assert_close(logits_and_gradients(compiled, images), expected, rtol=1e-12, atol=1e-12)


def test_exports_for_any_batch_size() -> None:
    model = small_twins(num_blocks=1)[1].double()
    batch = torch.export.Dim("batch", min=2, max=64)
    example = images_for(model, torch.float64)
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(exported(images), model(images), rtol=1e-12, atol=1e-12)


WITHOUT_TIMM = """
import sys
sys.modules["timm"] = None  # importing it raises ImportError
import torch
from mixer_kernels import FusedMixer
model = FusedMixer(num_classes=5, img_size=16, patch_size=4, num_blocks=2, embed_dim=24, drop_path_rate=0.1)
model(torch.randn(2, 3, 16, 16)).sum().backward()
features, taken = model.eval().forward_intermediates(torch.randn(2, 3, 16, 16), indices=1)
print(tuple(taken[0].shape), [name for name in sys.modules if name.startswith("timm.")])
"""


def test_works_without_timm() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_TIMM], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "(2, 24, 4, 4) []"


@pytest.mark.parametrize("shape", [(2, 3, 16, 17), (2, 3, 17, 16), (2, 1, 16, 16), (3, 16, 16)], ids=str)
def test_wrong_images_are_named(shape) -> None:
    model = FusedMixer(**SMALL)
    with pytest.raises(ValueError) as error:
        model(torch.randn(shape))
    assert "built for images (batch, 3, 16, 16)" in str(error.value)
    assert str(shape) in str(error.value)


def test_wrong_arguments_are_named() -> None:
    model = FusedMixer(**SMALL)
    images = images_for(model)
    with pytest.raises(ValueError, match="global_pool must be one of '', 'avg', got 'max'"):
        FusedMixer(**SMALL, global_pool="max")
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="no patch of 32x32 pixels fits into an image of 16x24"):
        FusedMixer(img_size=(16, 24), patch_size=32)
    with pytest.raises(ValueError, match="'NCHW', 'NLC', got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    for indices in (0, 5, [4], [-5], []):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(images, indices=indices)
    assert model.num_classes == 5  # a refused argument changed nothing
