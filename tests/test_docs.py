"""The documentation's code runs: Python blocks of a page one after the other, commands of this package's own.

What a page leaves out is made here: files that a reader has, weights that the hub has (nothing is downloaded).
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import neuralforecast_stub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import tsfm_stub
from sktime.libs import granite_ttm

import mixer_kernels
from mixer_kernels import __main__ as program
from mixer_kernels import convert, functional

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",  # of torch's exporter, in itself
    "ignore::UserWarning:(pytorch_lightning|lightning_fabric|torch.utils.data)",  # of darts' short fit
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DATA = Path(__file__).parent / "data"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def offline(monkeypatch) -> None:
    """``pretrained=True`` gives random weights."""
    create: Callable = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: create(*args, **{**options, "pretrained": False})
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks(page, offline, capsys) -> None:
    namespace = READERS.get(page.stem, dict)()
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    CHECKS.get(page.stem, lambda namespace: None)(namespace)


def readers_block() -> dict:
    """What the README's plain PyTorch takes."""
    S, C, D_S, D_C = 4, 6, 5, 7
    sizes = {
        "x": (2, S, C), "gamma1": (C,), "beta1": (C,), "w1": (D_S, S), "b1": (D_S,), "w2": (S, D_S), "b2": (S,),
        "gamma2": (C,), "beta2": (C,), "w3": (D_C, C), "b3": (D_C,), "w4": (C, D_C), "b4": (C,),
    }  # fmt: skip
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    return {**tensors, "input": tensors["x"], "F": F, "C": C, "eps": 1e-6}


def the_block_is_what_the_readme_says(names: dict) -> None:
    weights = [names[name] for name in "gamma1 beta1 w1 b1 w2 b2 gamma2 beta2 w3 b3 w4 b4".split()]
    expected = functional.mixer_block(names["input"], *weights, eps=1e-6, backend="torch")
    torch.testing.assert_close(names["x"], expected, rtol=0, atol=1e-12)


def readers_checkpoint() -> dict:
    """The fixture with 4 of its 6 tokens: a square."""
    with np.load(DATA / "google_mixer.npz") as arrays:
        cut = {name: a[tuple(slice(4 if n == 6 else None) for n in a.shape)] for name, a in arrays.items()}
    np.savez("Mixer-B_16.npz", **cut)
    return {}


def readers_granite() -> dict:
    tsfm_stub.define_packages()
    return {}


def readers_forecaster() -> dict:
    """Of sktime's forecaster, once it is fitted, its model."""
    config = granite_ttm.TinyTimeMixerConfig(
        context_length=32, prediction_length=8, patch_length=8, patch_stride=8, num_input_channels=1, d_model=8
    )
    return {"forecaster": SimpleNamespace(model_=granite_ttm.TinyTimeMixerForPrediction(config))}


def readers_tsmixer() -> dict:
    """Of neuralforecast a model."""
    neuralforecast_stub.define_packages()
    return {"model": importlib.import_module("neuralforecast.models.tsmixerx").TSMixerx(12, 24, n_series=7)}


READERS: dict[str, Callable[[], dict]] = {
    "README": readers_block,
    "convert_weights": readers_checkpoint,
    "huggingface": readers_granite,
    "neuralforecast": readers_tsmixer,
    "sktime": readers_forecaster,
}
CHECKS = {"README": the_block_is_what_the_readme_says}


# ------------------------------------------------------------------------------------------------------------ commands


def own_commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    commands = [line.removeprefix("$ ").partition("#")[0].strip() for line in lines]
    return sorted({command for command in commands if command.startswith("python -m mixer_kernels ")})


@pytest.mark.parametrize("command", own_commands())
def test_commands(command, monkeypatch, capsys) -> None:
    """They run; those that measure, compile or need another program's scripts are parsed alone."""
    name, *arguments = shlex.split(command)[3:]
    if name == "timm":
        script = Path(arguments[0])
        script.write_text("import timm, sys\nassert sys.argv[1:] and timm.is_model('fused_mixer_b16_224')\n")
    elif name == "convert":
        readers_file(arguments[-2], arguments[arguments.index("--from") + 1])
    elif name == "cost" or (name == "bench" and "--saved-bytes" not in arguments):
        importlib.import_module(f"mixer_kernels.{name}.cli")._parser().parse_args(arguments)
        return
    assert program.main([name, *arguments]) == 0


def readers_file(name: str, origin: str) -> None:
    if origin == "google":
        shutil.copy(DATA / "google_mixer.npz", name)
        return
    if origin == "timm":
        model = timm.create_model("mixer_s32_224", img_size=64, num_classes=3)
    else:
        from mlp_mixer_pytorch import MLPMixer

        model = MLPMixer(image_size=32, channels=3, patch_size=16, dim=8, depth=1, num_classes=3)
    torch.save(model.state_dict(), name)


def test_every_page_is_linked() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES[1:]]
    missing = [page for page in pages if page not in readme or page.removeprefix("docs/") not in site]
    assert not missing, f"README.md or mkdocs.yml does not link to {', '.join(missing)}"


def test_everything_public_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = [*mixer_kernels.__all__, *convert.__all__, *filter(str.islower, functional.__all__)]
    missing = [name for name in names if not re.search(rf"\b{name}\b", reference) and name != "__version__"]
    assert not missing, f"docs/reference.md lacks {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {', '.join(missing)}"
