"""Train a small MLP-Mixer on real handwritten digits, then measure how fast it is here.

    python examples/train_digits.py

The data are the 1,797 scans of 8x8 pixels that come with scikit-learn: nothing is downloaded. Each scan is cut into 16
patches of 2x2 pixels; a fifth of the scans is held out for the test. It takes well under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from mixer_kernels import FusedMixer, use_backend
from mixer_kernels.backends import CHOICES
from mixer_kernels.bench import compare_model

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_ANGLE, MAX_SCALING, MAX_SHIFT = 0.15, 0.1, 0.1  # in radians, of the size, of half the width
BENCH_BATCH_SIZE = 256


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the products are small: more threads would wait for each other more than they compute
    torch.manual_seed(args.seed)
    train_images, test_images, train_labels, test_labels = load_data(args.seed, args.device)
    model = FusedMixer(num_classes=10, img_size=8, in_chans=1, patch_size=2, num_blocks=4, embed_dim=64)
    model.to(args.device)

    train(model, train_images, train_labels, args.epochs)
    with use_backend(args.backend):
        accuracy = evaluate(model, test_images, test_labels)
    print(f"test accuracy: {100 * accuracy:.1f} %")
    print(f"\nthroughput{' of one thread' if model.head.weight.device.type == 'cpu' else ''}:")
    print(compare_model(model, train_images[:BENCH_BATCH_SIZE], name="digits"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial weights and the batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", choices=CHOICES, default="auto", help="of the test; training takes one that has gradients"
    )
    return parser.parse_args()


def load_data(seed: int, device: str) -> list[Tensor]:
    """Training and test images ``[N, 1, 8, 8]`` from -1 to 1, then training and test labels ``[N]``."""
    digits = load_digits()
    images = digits.images[:, None].astype("float32") / 8 - 1  # pixels are 0 to 16
    split = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)
    return [torch.as_tensor(array, device=device) for array in split]


def train(model: FusedMixer, images: Tensor, labels: Tensor, epochs: int) -> None:
    batches = -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=batches, pct_start=0.1
    )
    start = time.perf_counter()
    model.train()
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images), device=images.device).split(BATCH_SIZE):
            logits = model(distort(images[batch]))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        show_progress(epoch, epochs, f"loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")


def distort(images: Tensor) -> Tensor:
    """Turn, scale and shift each image a little: 1,437 scans are few, and no two people write alike."""

    def random(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), device=images.device) - 1)

    angle, scale = random(MAX_ANGLE), 1 + random(MAX_SCALING)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    transform = torch.stack([cos, -sin, random(MAX_SHIFT), sin, cos, random(MAX_SHIFT)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def evaluate(model: FusedMixer, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def show_progress(epoch: int, epochs: int, text: str) -> None:
    """One line that is rewritten on a terminal, and a line now and then in a log."""
    terminal = sys.stderr.isatty()
    if terminal or epoch == epochs or epoch % max(epochs // 5, 1) == 0:
        start, end = ("\r", "" if epoch < epochs else "\n") if terminal else ("", "\n")
        print(f"{start}epoch {epoch:{len(str(epochs))}}/{epochs}: {text}  ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
