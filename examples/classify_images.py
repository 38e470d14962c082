"""Classify images with a timm checkpoint, its blocks computed by the fused kernels.

    python examples/classify_images.py --pretrained photo.jpg another.jpg
    python examples/classify_images.py                        # offline: two photographs of scikit-learn, random weights

Any MLP-Mixer, gMixer, ResMLP or gMLP of timm will do: ``--model gmlp_s16_224.ra3_in1k``. Without ``--pretrained``
nothing is downloaded, and the classes mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

from mixer_kernels import fuse_, unfuse_
from mixer_kernels.backends import CHOICES


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(args.device)
    if not args.pretrained:
        torch.nn.init.normal_(model.get_classifier().weight, std=0.1)  # timm's is zero: all classes would be alike
    images = load_images(args.images)
    transform = create_transform(**resolve_model_data_config(model))
    batch = torch.stack([transform(image) for image in images.values()]).to(args.device)

    print(fuse_(model, backend=args.backend))
    probabilities = classify(model, batch)
    unfuse_(model)
    difference = (classify(model, batch) - probabilities).abs().max().item()
    print(f"probabilities differ from the unfused model's by at most {difference:.1g}")

    subset = infer_imagenet_subset(model)
    labels = ImageNetInfo(subset) if subset else None
    for name, row in zip(images, probabilities, strict=True):
        print(f"\n{Path(name).name}" + ("" if args.pretrained else " (random weights: see --pretrained)"))
        top = row.topk(min(args.top, len(row)))
        for probability, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            label = labels.index_to_description(i) if labels else f"class {i}"
            print(f"  {100 * probability:5.1f} %  {label}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", help="files; by default two photographs that come with scikit-learn")
    parser.add_argument("--model", default="mixer_b16_224.goog_in21k_ft_in1k", help="of timm, with or without a tag")
    parser.add_argument("--pretrained", action="store_true", help="download the checkpoint")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=CHOICES, default=None, help="of the fused blocks")
    return parser.parse_args()


def load_images(paths: list[str]) -> dict[str, Image.Image]:
    """Images by name."""
    if paths:
        return {path: Image.open(path).convert("RGB") for path in paths}
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    return {name: Image.fromarray(image) for name, image in zip(samples.filenames, samples.images, strict=True)}


@torch.inference_mode()
def classify(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes, ``[images, classes]``."""
    return model(batch).softmax(-1)


if __name__ == "__main__":
    main()
