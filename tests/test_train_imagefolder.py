"""``examples/train_imagefolder.py`` as people run it: in one process, under torchrun (DDP, FSDP2), killed and resumed.

On the CPU with gloo, on small images of three classes: noise that is a little redder, greener or bluer.
"""

from __future__ import annotations

import itertools
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mixer_kernels import FusedMixer

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "train_imagefolder.py"
CLASSES = ("blue", "green", "red")
TRAIN, VAL = 43, 11  # of each class: odd in total, so neither the batches nor the processes come out even
ONE_IMAGE = 1.01 / (VAL * len(CLASSES))  # of the accuracy
SHIFT = 16  # of the class's channel; the noise has a range of 240
OPTIONS = [
    *("--img-size", "16", "--patch-size", "4", "--num-blocks", "2", "--embed-dim", "32", "--mlp-ratio", "0.5", "2"),
    *("--epochs", "3", "--warmup-epochs", "1", "--batch-size", "16", "--accumulate", "2", "--lr", "1e-2"),
    *("--ema", "0.7", "--device", "cpu", "--workers", "0"),
]
# torchvision has to import in the processes that torchrun starts as well: see timm_stub. And a machine that fails is
# one process that ends without a word, at the worst moment: with half of the second checkpoint on the disk. A thread of
# gloo that is left at the end aborts the process now and then, on a busy machine: there must be none.
LAUNCHER = """
import os, runpy, signal, sys
from pathlib import Path
import timm_stub
timm_stub.define_torchvision_operators()
import torch

def save_or_die(state, file, save=torch.save, **options):
    if not isinstance(state, dict) or state["epoch"] < 2:
        return save(state, file, **options)
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "kill":
    torch.save = save_or_die
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert threads and not any("gloo" in thread for thread in threads), threads
"""


def write_images(folder: Path, classes: tuple[str, ...], number: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = random.integers(0, 256 - SHIFT, (20, 20, 3))
            pixels[..., ("red", "green", "blue").index(name)] += SHIFT
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", CLASSES, TRAIN, seed=0)
    write_images(folder / "val", CLASSES, VAL, seed=1)
    return folder


@pytest.fixture(scope="module")
def train(data, tmp_path_factory):
    """``train(*options, processes=1, output=None, kill=False)``: the checkpoint that the run leaves, and its lines."""
    launcher = tmp_path_factory.mktemp("launcher") / "launch.py"
    launcher.write_text(LAUNCHER)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def run(*options: str, processes: int = 1, output: Path | None = None, kill: bool = False):
        output = output or tmp_path_factory.mktemp("output")
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(launcher), "kill" if kill else "", str(PROGRAM), str(data), "--output", str(output)]
        result = subprocess.run(
            [*command, *OPTIONS, *options], capture_output=True, text=True, timeout=120, env=environment
        )
        assert (result.returncode != 0) == (output / "checkpoint.partial").exists() == kill, result.stderr
        return torch.load(output / "checkpoint.pt", weights_only=True), result.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def one_process(train):
    return train()


@pytest.fixture(scope="module")
def two_sharded(train):
    return train("--parallel", "fsdp", processes=2)


def test_learns(one_process, data) -> None:
    """And the checkpoint is used as the example says it is: its weights have the accuracy that it reports."""
    checkpoint, lines = one_process
    losses = [row["loss"] for row in checkpoint["history"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0], losses
    assert [line.split(":")[0] for line in lines[1:]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]

    model = FusedMixer.from_spec(**checkpoint["sizes"]).eval()
    model.load_state_dict(checkpoint["ema"])
    transform = [transforms.Resize(18), transforms.CenterCrop(16), transforms.ToTensor()]
    images = ImageFolder(data / "val", transforms.Compose([*transform, transforms.Normalize([0.5] * 3, [0.5] * 3)]))
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in images]))
    accuracy = (logits.argmax(dim=1) == torch.tensor(images.targets)).double().mean().item()
    assert accuracy == pytest.approx(checkpoint["history"][-1]["accuracy"], abs=ONE_IMAGE) and accuracy >= 0.9


def test_two_processes_draw_the_loss_curve_of_one(train, one_process, two_sharded) -> None:
    expected, lines_of_one = one_process
    for got, lines in (train(processes=2), two_sharded):
        assert lines[0].startswith("2 x cpu: ") and len(lines) == len(lines_of_one)  # the second process says nothing
        assert_same_curve(got, expected)
        for name in ("model", "ema"):  # whole parameters, under the names that FusedMixer has
            assert shapes(got[name]) == shapes(expected[name])


def test_killed_and_resumed_ends_with_the_same_bits(train, tmp_path) -> None:
    """Weights, averages, optimizer, schedule, fp16's scale, random numbers (here of the drop path), losses."""
    options = ("--drop-path", "0.2", "--amp", "fp16")
    expected, _ = train(*options)
    killed, _ = train(*options, output=tmp_path, kill=True)
    assert killed["epoch"] == 1
    # Images are augmented alike whoever loads them, so the number of workers may change.
    got, lines = train(*options, "--resume", "--workers", "1", output=tmp_path)
    assert lines[0].endswith("after epoch 1")
    assert differences(got, expected) == []


def test_killed_and_resumed_in_shards(train, one_process, two_sharded, tmp_path) -> None:
    """By as many processes: the same bits. By one, from the same checkpoint: the same curve."""
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    expected, _ = two_sharded
    killed, _ = train("--parallel", "fsdp", processes=2, output=tmp_path / "two", kill=True)
    assert killed["epoch"] == 1
    shutil.copy(tmp_path / "two" / "checkpoint.pt", tmp_path / "one")
    got, _ = train("--parallel", "fsdp", "--resume", processes=2, output=tmp_path / "two")
    assert differences(got, expected) == []
    got, lines = train("--resume", output=tmp_path / "one")
    assert lines[1] == "written by 2 processes: drop path draws other random numbers from here on"
    assert_same_curve(got, one_process[0])


def assert_same_curve(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last digits of float32, which may decide one image: sums over images are taken in another order."""
    for ours, theirs in zip(got["history"], expected["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=ONE_IMAGE)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def differences(got: Any, expected: Any, where: str = "checkpoint") -> list[str]:
    """Where two checkpoints are not the same to the last bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(got, expected) else [where]
    if isinstance(expected, dict) and got.keys() == expected.keys():
        return [entry for key in expected for entry in differences(got[key], expected[key], f"{where}[{key!r}]")]
    if isinstance(expected, (list, tuple)) and len(got) == len(expected):
        return [entry for i in range(len(expected)) for entry in differences(got[i], expected[i], f"{where}[{i}]")]
    return [] if got == expected else [where]


@pytest.fixture
def train_here(data, tmp_path, monkeypatch):
    """``train_here(*options, data=data, processes=1)``: the program in this process."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*options: str, data: Path = data, processes: int = 1) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), str(data), "--output", str(tmp_path), *OPTIONS, *options])
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def test_each_epoch_has_an_order_and_an_augmentation_of_its_own(train_here, monkeypatch) -> None:
    seen = []
    load = ImageFolder.__getitem__

    def load_and_record(self, index):
        image, label = load(self, index)
        if Path(self.root).name == "train":
            seen.append((index, image))
        return image, label

    monkeypatch.setattr(ImageFolder, "__getitem__", load_and_record)
    train_here()
    epochs = [dict(seen[i : i + 128]) for i in range(0, len(seen), 128)]  # 8 batches of the 129 images
    assert [len(epoch) for epoch in epochs] == [128, 128, 128]
    for first, second in itertools.combinations(epochs, 2):
        assert list(first) != list(second)
        same = [index for index in first.keys() & second.keys() if torch.equal(first[index], second[index])]
        assert len(same) < 10  # images are so small that some crops are drawn again


@pytest.fixture
def fails(train_here, capsys):
    """``fails(...)``: the message with which ``train_here(...)`` gives up."""

    def run(*options: str, **more: Any) -> str:
        with pytest.raises(SystemExit) as exit:
            train_here(*options, **more)
        return capsys.readouterr().err if exit.value.code == 2 else exit.value.code

    return run


def test_wrong_options(fails) -> None:
    message = fails("--batch-size", "100", "--accumulate", "4", processes=8)
    assert "--batch-size must be a multiple of processes x --accumulate = 32, got 100" in message
    assert "--img-size must be a multiple of the patch size, 4, got 18" in fails("--img-size", "18")
    assert "--warmup-epochs must be from 0 to less than --epochs 3, got 5" in fails("--warmup-epochs", "5")
    assert "--epochs must be at least 1, got 0" in fails("--epochs", "0")


def test_wrong_folders(fails, data, tmp_path) -> None:
    assert f"expected {tmp_path}/nothing/train/CLASS/*.jpg" in fails(data=tmp_path / "nothing")

    (tmp_path / "images").mkdir()
    shutil.copytree(data / "train", tmp_path / "images" / "train")
    (tmp_path / "images" / "val" / "red").mkdir(parents=True)
    assert "no images" in fails(data=tmp_path / "images")

    (tmp_path / "images" / "val" / "red").rmdir()
    write_images(tmp_path / "images" / "val", ("red", "blue"), 1, seed=0)
    shutil.move(tmp_path / "images" / "val" / "blue", tmp_path / "images" / "val" / "violet")
    message = fails(data=tmp_path / "images")
    assert message.endswith("train and val must have the same classes, only one has blue, green, violet")

    assert "--batch-size 256 is more than the 129 training images" in fails("--batch-size", "256")


def test_an_earlier_checkpoint_is_safe(fails, one_process, tmp_path) -> None:
    checkpoint, _ = one_process
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt exists: --resume to go on from it, or another --output" in fails()
    message = fails("--resume", "--lr", "1e-3", "--epochs", "4")
    assert "is of another run: epochs was 3, is 4; lr was 0.01, is 0.001." in message
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 3


def test_a_loss_that_is_not_finite_ends_the_run(fails) -> None:
    assert "the loss of epoch 1 is nan" in fails("--lr", "1e30", "--clip-grad", "0")
