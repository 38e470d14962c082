"""Train a small MLP-Mixer at a low resolution, grow it and fine-tune it at twice the resolution.

    python examples/finetune_higher_resolution.py

Appendix C of Tolstikhin et al. 2021 (arXiv:2105.01601). An image of K x K times the pixels has S' = K^2 S tokens, since
the patches stay as large as they are. The token MLP's weights grow from W1 [D_S, S] and W2 [S, D_S] to

    W1' = diag(W1, ..., W1) [K^2 D_S, K^2 S],    W2' = diag(W2, ..., W2) [K^2 S, K^2 D_S],

a copy for each of the K x K parts of the image; all other weights stay. Until it is fine-tuned, the larger model takes
each part for an image of its own: it classifies four copies of a small digit as before, and a large digit, of which
each part is a quarter, hardly better than by chance. The other way is to interpolate: the token MLP stays as it is, and
sees a large digit as a small one.

The data are the 1,797 scans of 8x8 pixels that come with scikit-learn: nothing is downloaded. Their means over 2x2
pixels are the low resolution. Patches are single pixels: 16 tokens become 64. A fifth of the scans is held out for the
test. It takes well under a minute on a CPU. Needs: pip install scikit-learn tqdm
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from mixer_kernels import FusedMixer, use_backend
from mixer_kernels.backends import CHOICES
from mixer_kernels.convert import model_arguments, resize_tokens

BATCH_SIZE = 64
LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the products are small: more threads would wait for each other more than they compute
    torch.manual_seed(args.seed)
    train_images, test_images, train_labels, test_labels = load_data(args.seed, args.device)

    def fit(model: FusedMixer, images: Tensor, epochs: int, title: str) -> None:
        train(model.to(args.device), images, train_labels, epochs, title)

    def accuracy(model: FusedMixer, images: Tensor) -> float:
        with use_backend(args.backend):
            return evaluate(model.to(args.device), images, test_labels)

    small = FusedMixer(num_classes=10, img_size=4, in_chans=1, patch_size=1, num_blocks=4, embed_dim=32)
    fit(small, halve(train_images), args.epochs, "pre-training")
    pretrained = accuracy(small, halve(test_images))

    rows, columns = small.stem.grid_size
    grid = (2 * rows, 2 * columns)
    resized = resize_tokens(small.state_dict(), (rows, columns), grid)
    arguments = model_arguments(resized, grid=grid)
    large = FusedMixer(**arguments)
    large.load_state_dict(resized)
    of_copies, of_quarters = accuracy(large, halve(test_images).repeat(1, 1, 2, 2)), accuracy(large, test_images)
    fit(large, train_images, args.finetune_epochs, "fine-tuning")
    finetuned = accuracy(large, test_images)

    resized = resize_tokens(small.state_dict(), (rows, columns), grid, method="interpolate")
    interpolated = FusedMixer(**model_arguments(resized, grid=grid))
    interpolated.load_state_dict(resized)
    of_interpolation = accuracy(interpolated, test_images)
    fit(interpolated, train_images, args.finetune_epochs, "fine-tuning")

    scratch = FusedMixer(**arguments)
    fit(scratch, train_images, args.finetune_epochs, "from scratch")

    batches = -(-len(train_images) // BATCH_SIZE)
    print(f"{'':33}  tokens  steps  test accuracy")
    for name, model, epochs, value in (
        ("pre-trained at 4x4 pixels", small, args.epochs, pretrained),
        ("grown, four copies of 4x4 pixels", large, 0, of_copies),
        ("grown, 8x8 pixels", large, 0, of_quarters),
        ("fine-tuned at 8x8 pixels", large, args.finetune_epochs, finetuned),
        ("interpolated, 8x8 pixels", interpolated, 0, of_interpolation),
        ("interpolated, fine-tuned", interpolated, args.finetune_epochs, accuracy(interpolated, test_images)),
        ("from scratch at 8x8 pixels", scratch, args.finetune_epochs, accuracy(scratch, test_images)),
    ):
        print(f"{name:33}  {model.stem.num_patches:6}  {epochs * batches:5}  {100 * value:11.1f} %")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="at the low resolution")
    parser.add_argument(
        "--finetune-epochs", type=int, default=4, help="at the high resolution, also of the model trained from scratch"
    )
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


def halve(images: Tensor) -> Tensor:
    """Half the resolution: the means over squares of 2x2 pixels."""
    return F.avg_pool2d(images, 2)


def train(model: FusedMixer, images: Tensor, labels: Tensor, epochs: int, title: str) -> None:
    steps = epochs * -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc=title, leave=False, disable=None) as progress:  # None: only on a terminal
        for _ in range(epochs):
            for batch in torch.randperm(len(images), device=images.device).split(BATCH_SIZE):
                loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()


@torch.inference_mode()
def evaluate(model: FusedMixer, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
