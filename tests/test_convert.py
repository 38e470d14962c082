"""Weights of other origins give those models' numbers; what does not fit is named."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, reference
from mlp_mixer_pytorch import MLPMixer
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixer_kernels import FusedMixer, convert

DATA = Path(__file__).parent / "data"
GENERATIONS = ("google_mixer.npz", "google_mixer_older.npz")
CONFIG = {"num_classes": 5, "img_size": (12, 8), "patch_size": 4, "num_blocks": 2, "embed_dim": 10}


def randomize_(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
            )
    return model.eval()


def loaded(state_dict, **kwargs) -> FusedMixer:
    """The model that these weights are of."""
    model = FusedMixer(**convert.model_arguments(state_dict, **kwargs))
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def tokens_of(model: FusedMixer, images: Tensor) -> Tensor:
    """Before the last LayerNorm: that hides the bias that token mixing adds to all channels of a token."""
    return model.blocks(model.stem(images))


def mixer() -> FusedMixer:
    return randomize_(FusedMixer(**CONFIG))


def arrays(name: str = GENERATIONS[0]) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as archive:
        return dict(archive)


def npz(contents: dict[str, np.ndarray]) -> io.BytesIO:
    file = io.BytesIO()
    np.savez(file, **contents)
    file.seek(0)
    return file


# ------------------------------------------------------------------------------------------------------------ Google


@pytest.mark.parametrize("name", GENERATIONS)
def test_google_gives_flaxs_logits(name: str) -> None:
    """The file, the logits and the tokens are Flax's, by data/make_google_mixer.py."""
    with np.load(DATA / "google_mixer_expected.npz") as archive:
        flax = {name: torch.from_numpy(archive[name]) for name in archive.files}
    images = flax["images"].permute(0, 3, 1, 2)
    state_dict = convert.from_google_npz(DATA / name)
    model = loaded(state_dict, grid=(3, 2), origin="google")
    wide = loaded(state_dict, grid=(3, 2), origin="google").double()
    with torch.no_grad():
        tokens, logits = (
            reference(lambda f=f: f(wide, images.double()), torch.float32) for f in (tokens_of, nn.Module.__call__)
        )
        torch.testing.assert_close(tokens.value, flax["tokens_float64"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits.value, flax["logits_float64"], rtol=1e-12, atol=1e-12)
        assert_accurate(tokens_of(model, images), flax["tokens"], tokens, what="tokens")
        assert_accurate(model(images), flax["logits"], logits, what="logits")
        with_erf = loaded(state_dict, grid=(3, 2))(images)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(with_erf, flax["logits"], logits)  # what the tanh form of GELU is for


def test_google_generations_are_the_same_weights() -> None:
    newer, older = (convert.from_google_npz(DATA / name) for name in GENERATIONS)
    assert list(newer) == list(older)
    assert all(torch.equal(newer[name], older[name]) for name in newer)


def test_google_layernorms_numbered_among_all_layers() -> None:
    """Before Linen, Flax counted the layers of all classes together."""
    renamed = {n.replace("LayerNorm_1", "LayerNorm_2"): a for n, a in arrays(GENERATIONS[1]).items()}
    expected = convert.from_google_npz(DATA / GENERATIONS[1])
    assert all(torch.equal(t, expected[n]) for n, t in convert.from_google_npz(npz(renamed)).items())


@pytest.mark.parametrize("prefix", ["opt/target/", "params/"])
def test_google_training_checkpoints(prefix: str) -> None:
    contents = {prefix + name: array for name, array in arrays().items()}
    contents["opt/state/step"] = np.array(7)
    expected = convert.from_google_npz(DATA / GENERATIONS[0])
    assert all(torch.equal(t, expected[n]) for n, t in convert.from_google_npz(npz(contents)).items())


def test_google_without_head_and_in_bfloat16() -> None:
    contents = {name: array for name, array in arrays().items() if not name.startswith("head/")}
    weights = {name: torch.from_numpy(array).bfloat16() for name, array in contents.items()}
    state_dict = convert.from_google_npz(npz({n: w.view(torch.int16).numpy().view("V2") for n, w in weights.items()}))
    assert convert.model_arguments(state_dict, grid=(3, 2))["num_classes"] == 0
    assert torch.equal(state_dict["stem.proj.weight"], weights["stem/kernel"].permute(3, 2, 0, 1))
    assert state_dict["norm.weight"].dtype is torch.bfloat16


def test_google_files_that_are_not_weights() -> None:
    array, text = io.BytesIO(), io.BytesIO(b"not a zip file at all")
    np.save(array, np.zeros(3))
    array.seek(0)
    with pytest.raises(ValueError, match="a single array"):
        convert.from_google_npz(array)
    with pytest.raises(ValueError, match="is not an .npz archive"):
        convert.from_google_npz(text)
    with pytest.raises(ValueError, match="is not an .npz archive"):
        convert.from_google_npz(io.BytesIO((DATA / GENERATIONS[0]).read_bytes()[:2000]))
    with pytest.raises(FileNotFoundError):
        convert.from_google_npz("no such file.npz")


def test_google_pickles_are_not_loaded() -> None:
    contents = arrays() | {"head/bias": np.array([print, 1, 2], dtype=object)}
    with pytest.raises(ValueError, match="head/bias cannot be read: .*allow_pickle=False"):
        convert.from_google_npz(npz(contents))


def test_google_wrong_keys_and_shapes_are_named() -> None:
    good = arrays()

    def error(kind=ValueError, remove: str = "", **add) -> str:
        contents = {name: array for name, array in good.items() if name != remove}
        contents |= {name.replace("__", "/"): array for name, array in add.items()}
        with pytest.raises(kind) as caught:
            convert.from_google_npz(npz(contents))
        return str(caught.value)

    kernel = "MixerBlock_1/token_mixing/Dense_1/kernel"
    assert f"missing: {kernel}" in error(remove=kernel)
    message = error(head__scale=np.ones(3, np.float32))
    assert "not expected: head/scale" in message and "missing" not in message
    message = error(**{kernel.replace("/", "__"): np.ones((5, 7), np.float32)})
    assert kernel in message and "(7, 5), expected (6, 5)" in message
    assert "stem/kernel must have 4 dimensions, got shape (4, 3, 8)" in error(stem__kernel=np.ones((4, 3, 8), "f4"))
    assert "head/bias must hold floating-point numbers" in error(TypeError, head__bias=np.ones(3, int))
    assert "head/bias must hold floating-point numbers" in error(TypeError, head__bias=np.array(["a", "b", "c"]))


def test_another_models_file_is_refused_briefly() -> None:
    contents = {f"Transformer/encoderblock_{i}/kernel": np.ones(1, np.float32) for i in range(50)}
    with pytest.raises(ValueError, match="not the weights of a Google Mixer; missing: stem/kernel.* and 30 more$"):
        convert.from_google_npz(npz(contents))


# -------------------------------------------------------------------------------------------------------- lucidrains


def lucidrains() -> nn.Module:
    return randomize_(MLPMixer(image_size=(12, 8), channels=3, patch_size=4, dim=10, depth=2, num_classes=5))


def test_lucidrains_gives_the_same_logits() -> None:
    theirs, images = lucidrains(), torch.randn(2, 3, 12, 8)
    state_dict = convert.from_lucidrains(theirs.state_dict())
    arguments = convert.model_arguments(state_dict, grid=(3, 2), origin="lucidrains")
    assert arguments["mlp_ratio"] == (4.0, 0.5)  # the other way round than the paper's
    ours = loaded(state_dict, grid=(3, 2), origin="lucidrains")
    with torch.no_grad():
        actual, eager = (tokens_of(ours, images), ours(images)), (theirs[:4](images), theirs(images))
        wide = theirs.double()
        exact = reference(lambda: (wide[:4](images.double()), wide(images.double())), torch.float32)
    for name, *results in zip(("tokens", "logits"), actual, eager, exact, strict=True):
        assert_accurate(*results, what=name)


def test_lucidrains_wrong_weights_are_named() -> None:
    good = lucidrains().state_dict()

    def error(**options) -> str:
        changes = options.pop("changes", {})
        with pytest.raises(ValueError) as caught:
            convert.from_lucidrains({n: t for n, t in {**good, **changes}.items() if t is not None}, **options)
        return str(caught.value)

    assert "missing: 2.0.fn.0.bias" in error(changes={"2.0.fn.0.bias": None})
    assert "not expected: 7.weight" in error(changes={"7.weight": torch.ones(1)})
    assert "2.0.fn.0.weight (as blocks.0.mlp_tokens.fc1.weight)" in error(
        changes={"2.0.fn.0.weight": torch.ones(40, 6, 3)}
    )
    assert "1.weight takes 48 values a patch, no square of in_chans=1 channels" in error(in_chans=1)
    assert "in_chans must be at least 1" in error(in_chans=0)


# -------------------------------------------------------------------------------------------------------------- timm


def test_timm_both_ways() -> None:
    theirs, images = randomize_(MlpMixer(**CONFIG)), torch.randn(2, 3, 12, 8)
    state_dict = convert.from_timm(theirs.state_dict())
    ours = loaded(state_dict, grid=(3, 2))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    back = MlpMixer(**convert.model_arguments(state_dict, grid=(3, 2))).eval()
    back.load_state_dict(convert.to_timm(ours.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(back(images), theirs(images))


def test_timm_training_checkpoints_give_the_averaged_weights() -> None:
    weights, averaged = mixer().state_dict(), mixer().state_dict()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in averaged.items()}
    state_dict = convert.from_timm({"epoch": 3, "state_dict": weights, "state_dict_ema": wrapped})
    assert list(state_dict) == list(averaged)
    assert all(torch.equal(state_dict[name], averaged[name]) for name in averaged)


def test_timm_models_of_another_kind_are_refused() -> None:
    from timm.layers import GluMlp
    from timm.models.mlp_mixer import Affine, ResBlock

    resmlp = MlpMixer(**CONFIG, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine)
    with pytest.raises(ValueError, match="missing: .*mlp_tokens.fc1.weight.*not expected: .*linear_tokens.*a ResMLP"):
        convert.from_timm(resmlp.state_dict())
    gmixer = MlpMixer(**CONFIG, mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp)
    with pytest.raises(ValueError, match=r"blocks.0.mlp_tokens.fc2.weight has shape \(6, 5\), .* \(6, 10\).*a gMixer"):
        convert.from_timm(gmixer.state_dict())


# Keys that one layer of a model that is no Mixer, or is one in another format, adds; a part of what is said of them.
KINDS = {
    "LoRA": ("blocks.0.mlp_tokens.fc1.lora_A.default.weight", "merge them first"),
    "gMLP": ("blocks.0.mlp_channels.gate.proj.weight", "a gMLP: build it by timm"),
    "ResMLP of its authors": ("blocks.0.gamma_1", "a ResMLP: build it by timm"),
    "ViT": ("blocks.0.attn.qkv.weight", "a transformer: it has attention"),
}


@pytest.mark.parametrize(("key", "kind"), KINDS.values(), ids=KINDS)
def test_what_weights_are_is_said_where_their_keys_tell(key: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"not expected: {key}.*; .*{kind}"):
        convert.from_timm(mixer().state_dict() | {key: torch.zeros(1)})


def test_another_format_is_named() -> None:
    with pytest.raises(ValueError, match="this is lucidrains' MLPMixer: from_lucidrains"):
        convert.from_timm(lucidrains().state_dict())
    with pytest.raises(ValueError, match="this is timm's MlpMixer: from_timm"):
        convert.from_lucidrains(mixer().state_dict())
    with pytest.raises(ValueError, match="this is Google's Mixer: give its .npz file to from_google_npz"):
        convert.from_timm({"MixerBlock_0/token_mixing/Dense_0/kernel": torch.zeros(6, 5)})


PREFIXES = ["model.", "net.", "base_model.model.", "module.", "model._orig_mod.", "module.module."]


@pytest.mark.parametrize("entry", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_as_trainers_save_them(prefix: str, entry: str | None) -> None:
    """Lightning, PEFT, DistributedDataParallel, torch.compile; DeiT, MAE and plain PyTorch."""
    for from_it, weights in (
        (convert.from_timm, mixer().state_dict()),
        (convert.from_lucidrains, lucidrains().state_dict()),
    ):
        wrapped = {prefix + name: tensor for name, tensor in weights.items()}
        expected = from_it(weights)
        got = from_it(wrapped if entry is None else {entry: wrapped, "epoch": 3, "optimizer": {"state": {}}})
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_blocks_that_were_wrapped_one_by_one() -> None:
    weights = mixer().state_dict()
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in weights.items()}
    assert wrapped.keys() != weights.keys() == convert.from_timm(wrapped).keys()


def test_ambiguous_prefixes_are_named() -> None:
    weights = mixer().state_dict()
    two = {prefix + name: tensor for name, tensor in weights.items() for prefix in ("student.", "teacher.")}
    with pytest.raises(ValueError, match="the weights of 2 Mixers, under the prefixes 'student.', 'teacher.': keep"):
        convert.from_timm(two)
    with pytest.raises(ValueError, match="norm.bias is in it twice, with and without a prefix"):
        convert.from_timm({f"net.{name}": tensor for name, tensor in weights.items()} | {"norm.bias": torch.zeros(10)})
    with pytest.raises(ValueError, match="not expected: criterion.weight"):
        convert.from_timm(
            {f"net.{name}": tensor for name, tensor in weights.items()} | {"criterion.weight": torch.ones(1)}
        )


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    weights = mixer().state_dict()
    checkpoint = {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}, "epoch": 1}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert convert.from_timm(convert.load_state_dict(tmp_path / "last.ckpt")).keys() == weights.keys()


def test_files_and_folders_that_are_not_there_are_said(tmp_path: Path) -> None:
    for load, name in ((convert.load_state_dict, "a.pth"), (convert.load_state_dict, "a.safetensors")):
        with pytest.raises(FileNotFoundError, match=f"^No such file: .*{name}$"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="^No such file: .*a.npz$"):
        convert.from_google_npz(tmp_path / "a.npz")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.pth is a folder, expected a file"):
        convert.load_state_dict(tmp_path / "folder.pth")
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder to write"):
            convert.save_state_dict(mixer().state_dict(), tmp_path / "nowhere" / name)


@pytest.mark.parametrize("make", [lambda: MlpMixer(**CONFIG), lucidrains], ids=["timm", "lucidrains"])
def test_of_a_pickled_model_of_a_library_the_weights_are_taken(make, tmp_path: Path) -> None:
    model = make()
    torch.save(model, tmp_path / "model.pth")
    loaded, expected = convert.load_state_dict(tmp_path / "model.pth"), model.state_dict()
    assert list(loaded) == list(expected) and all(torch.equal(loaded[name], expected[name]) for name in expected)


class Unknown(nn.Module):
    """Of a package that is not known."""


def test_of_a_pickled_model_the_weights_are_taken(tmp_path: Path) -> None:
    model = mixer()
    torch.save(model, tmp_path / "model.pth")
    loaded, expected = convert.load_state_dict(tmp_path / "model.pth"), model.state_dict()
    assert list(loaded) == list(expected) and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_pickled_model_of_unknown_classes_is_not_loaded(tmp_path: Path) -> None:
    torch.save(nn.Sequential(Unknown()), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"holds objects of other kinds.*Save model.state_dict\(\) alone$"):
        convert.load_state_dict(tmp_path / "model.pth")


def test_to_timm_names_what_is_wrong() -> None:
    state_dict = mixer().state_dict()
    with pytest.raises(ValueError, match="missing: norm.bias"):
        convert.to_timm({name: tensor for name, tensor in state_dict.items() if name != "norm.bias"})
    with pytest.raises(TypeError, match="norm.bias must be a tensor, got list"):
        convert.to_timm(state_dict | {"norm.bias": [0.0] * 10})
    with pytest.raises(ValueError, match=r"head.bias has shape \(4,\), expected \(5,\)"):
        convert.to_timm(state_dict | {"head.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="not the weights of a Mixer; missing: stem.proj.weight"):
        convert.to_timm({})


def test_model_arguments() -> None:
    model = FusedMixer(7, img_size=8, in_chans=1, patch_size=(4, 2), embed_dim=13, mlp_ratio=(0.5, 3.1), stem_norm=True)
    with pytest.raises(ValueError, match=r"8 tokens do not form a square: pass grid=\(rows, columns\)"):
        convert.model_arguments(model.state_dict())
    with pytest.raises(ValueError, match=r"built for 8 tokens, but grid=\(3, 4\) has 12"):
        convert.model_arguments(model.state_dict(), grid=(3, 4))
    with pytest.raises(ValueError, match="origin must be one of 'timm', 'google', 'lucidrains', got 'jax'"):
        convert.model_arguments(model.state_dict(), grid=(2, 4), origin="jax")
    rebuilt = loaded(model.state_dict(), grid=(2, 4))
    assert rebuilt.stem.img_size == (8, 8) and rebuilt.num_classes == 7


def test_widths_survive_the_ratio() -> None:
    """The model rounds mlp_ratio * C down: every width has to come back. 11 * (15 / 11) is below 15."""
    for C in range(7, 12):
        for D in range(1, 62):
            sizes = convert.layout.Sizes(1, 1, (1, 1), S=1, C=C, D_S=D, D_C=D, num_classes=0)
            weights = {name: torch.empty(shape) for name, shape in sizes.shapes().items()}
            assert [int(ratio * C) for ratio in convert.model_arguments(weights)["mlp_ratio"]] == [D, D]


# ----------------------------------------------------------------------------------------------------- resize_tokens


@pytest.mark.parametrize("factors", [(2, 2), (1, 3), (3, 2)], ids=str)
def test_resized_tokens_are_those_of_the_parts(factors: tuple[int, int]) -> None:
    """Appendix C: for an image of K x K parts, the larger model computes for each part what the old one computed."""
    small = mixer().double()
    down, right = factors
    old_grid, new_grid = small.stem.grid_size, (3 * down, 2 * right)
    state_dict = convert.resize_tokens(small.state_dict(), old_grid, new_grid)
    large = loaded(state_dict, grid=new_grid).double()
    large.load_state_dict(state_dict)
    parts = torch.randn(down, right, 2, 3, 12, 8, dtype=torch.float64)
    image = torch.cat([torch.cat(list(row), dim=-1) for row in parts], dim=-2)
    with torch.no_grad():
        tokens = tokens_of(large, image).unflatten(1, new_grid)
        for i in range(down):
            for j in range(right):
                of_part = tokens[:, 3 * i : 3 * (i + 1), 2 * j : 2 * (j + 1)].flatten(1, 2)
                torch.testing.assert_close(of_part, tokens_of(small, parts[i, j]), rtol=1e-12, atol=1e-12)
        logits = torch.stack([small(part) for row in parts for part in row]).mean(0)
        torch.testing.assert_close(large(image), logits, rtol=1e-12, atol=1e-12)


def test_resize_14_to_28() -> None:
    """The paper's case: S and D_S grow by four, the rest of the model is the same tensors."""
    config = {"num_classes": 3, "patch_size": 2, "num_blocks": 1, "embed_dim": 16}
    small = randomize_(FusedMixer(**config, img_size=28))
    resized = convert.resize_tokens(small.state_dict(), (14, 14), (28, 28))
    large = FusedMixer(**config, img_size=56, mlp_ratio=(4 * 0.5, 4.0)).eval()
    large.load_state_dict(resized, strict=True)
    parts = torch.randn(4, 3, 28, 28)
    image = torch.cat([torch.cat([parts[0], parts[1]], 2), torch.cat([parts[2], parts[3]], 2)], 1)[None]
    with torch.no_grad():
        tokens = tokens_of(large, image).view(2, 14, 2, 14, 16).transpose(1, 2).reshape(4, 196, 16)
        expected, wide = tokens_of(small, parts), small.double()
        exact = reference(lambda: tokens_of(wide, parts.double()), torch.float32)
    assert_accurate(tokens, expected, exact, what="tokens of the parts")
    kept = {name for name, tensor in small.state_dict().items() if "mlp_tokens" not in name}
    assert kept and all(torch.equal(resized[name].double(), small.state_dict()[name]) for name in kept)


def test_resize_where_the_weights_are() -> None:
    """On a GPU as well: PyTorch's fake tensors refuse, as GPUs do, to mix devices in one operation."""
    with FakeTensorMode():
        on_gpu = {name: torch.empty(t.shape, device="cuda") for name, t in mixer().state_dict().items()}
        resized = convert.resize_tokens(on_gpu, (3, 2), (6, 4))
    assert {t.device.type for t in resized.values()} == {"cuda"}


@pytest.mark.parametrize("new_grid", [(4, 3), (5, 7), (3, 5), (2, 2), (6, 4)], ids=str)
def test_interpolated_token_mlps_give_interpolated_tokens(new_grid: tuple[int, int]) -> None:
    """The token MLP of interpolated tokens is the interpolated token MLP; on fewer tokens, as far as they tell."""
    small = mixer().double()
    state_dict = convert.resize_tokens(small.state_dict(), (3, 2), new_grid, method="interpolate")
    large = loaded(state_dict, grid=new_grid).double()
    large.load_state_dict(state_dict)
    tokens = torch.randn(2, 5, 3, 2, dtype=torch.float64)  # each channel a picture
    up = lambda t: F.interpolate(t, size=new_grid, mode="bicubic", align_corners=False)  # noqa: E731
    if math.prod(new_grid) < 6:  # a picture that they tell all of
        basis = up(torch.eye(6, dtype=torch.float64).view(6, 1, 3, 2)).flatten(1)
        tokens = (tokens.flatten(2) @ basis @ torch.linalg.pinv(basis)).view_as(tokens)
    for old, new in zip(small.blocks, large.blocks, strict=True):
        with torch.no_grad():
            expected = up(old.mlp_tokens(tokens.flatten(2)).view_as(tokens)).flatten(2)
            torch.testing.assert_close(new.mlp_tokens(up(tokens).flatten(2)), expected, rtol=1e-6, atol=1e-6)
    for name, tensor in small.state_dict().items():
        assert ("mlp_tokens" in name and "fc1.bias" not in name) or torch.equal(state_dict[name], tensor), name


def test_the_method_follows_from_the_grid() -> None:
    state_dict = mixer().state_dict()
    for new_grid, method in (((6, 4), "parts"), ((4, 4), "interpolate"), ((2, 1), "interpolate")):
        auto, asked = (convert.resize_tokens(state_dict, (3, 2), new_grid, m) for m in ("auto", method))
        assert all(torch.equal(auto[name], asked[name]) for name in asked)
    assert convert.resize_tokens(state_dict, (3, 2), (6, 4))["blocks.0.mlp_tokens.fc1.weight"].shape[1] == 24


def test_resize_refuses_grids_that_do_not_fit() -> None:
    state_dict = mixer().state_dict()
    with pytest.raises(ValueError, match=r"built for 6 tokens, but old_grid=\(14, 14\) has 196"):
        convert.resize_tokens(state_dict, (14, 14), (28, 28))
    for grid in ((4, 4), (1, 2)):
        with pytest.raises(ValueError, match=r"new_grid must be multiples of the rows and columns of \(3, 2\)"):
            convert.resize_tokens(state_dict, (3, 2), grid, method="parts")
    for grid in ((6,), (6, 4, 1), (0, 2)):
        with pytest.raises(ValueError, match=r"new_grid must be \(rows, columns\), got"):
            convert.resize_tokens(state_dict, (3, 2), grid)
    with pytest.raises(ValueError, match="method"):
        convert.resize_tokens(state_dict, (3, 2), (6, 4), method="bilinear")
    with pytest.raises(ValueError, match=r"old_grid must be \(rows, columns\)"):
        convert.resize_tokens(state_dict, (6,), (6, 4))


def test_published_sizes_are_the_papers() -> None:
    """A whole Mixer-B/16 of Google's, shapes alone: 59,880,472 parameters, arXiv:2105.01601, table 1."""
    sizes = convert.layout.Sizes(12, 3, (16, 16), S=196, C=768, D_S=384, D_C=3072, num_classes=1000)
    assert sum(map(math.prod, sizes.shapes().values())) == 59_880_472
    with torch.device("meta"):
        model = FusedMixer.from_spec("B/16")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == sizes.shapes()
