"""What is measured: one function or model, at one shape, dtype and batch size, and what it costs at least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..shapes import SPECS, MixerShape, MixerSpec

LEVELS = ("token", "channel", "block", "model")
MODES = ("infer", "train")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One group of rows: every provider computes this.

    In mode "train" a half or a block is run forward and backward, a model for a training step. ``flops`` are the useful
    ones of the matrix products, padding and what is computed twice not counted; ``bytes`` are the least that the
    launches of ``MixerShape`` move, and None in mode "train", of which it has no count. Both for the whole batch.
    """

    level: str  # one of LEVELS
    name: str  # "B/16"
    shape: MixerShape
    dtype: torch.dtype
    batch_size: int
    flops: int
    bytes: int | None
    mode: str = "infer"  # one of MODES

    @property
    def passes(self) -> int:
        """How often the FLOPs of a forward pass are spent: backward, a product with its weights becomes two."""
        return 3 if self.mode == "train" else 1

    def dtype_name(self, device: torch.device) -> str:
        """The dtype of the products as the table shows it; float32 products are "tf32" where PyTorch is told so."""
        if self.dtype is torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            return "tf32"
        return next((name for name, dtype in DTYPES.items() if dtype is self.dtype), str(self.dtype)[len("torch.") :])


def function_case(
    level: str, name: str, dtype: torch.dtype, batch_size: int, img_size: int = 224, mode: str = "infer"
) -> Case:
    """The token half, the channel half or the whole block of the paper's model ``name``."""
    shape = SPECS[name].block_shape(img_size)
    flops = {"token": shape.token_flops, "channel": shape.channel_flops, "block": shape.block_flops}[level]
    least = {"token": shape.token_bytes, "channel": shape.channel_bytes, "block": shape.block_bytes}[level]
    case = Case(level, name, shape, dtype, batch_size, flops(batch_size), least(batch_size, dtype.itemsize))
    return _training(case) if mode == "train" else case


def model_case(name: str, model: nn.Module, images: Tensor, mode: str = "infer") -> Case:
    """A whole model with timm's ``MlpMixer`` submodules on ``images [B, in_chans, H, W]``.

    Its least bytes are those of the blocks, the images read once, and the weights of the patch embedding and of the
    classifier read once. FLOPs as ``MixerSpec.flops`` counts them, with the sizes read off the weights; the images of a
    training step need no gradient.
    """
    block, patch = model.blocks[0], model.stem.proj.weight
    (hidden_s, tokens), (hidden_c, channels) = block.mlp_tokens.fc1.weight.shape, block.mlp_channels.fc1.weight.shape
    shape = MixerShape(tokens, channels, hidden_s, hidden_c)
    head = getattr(model.head, "weight", None)
    head_size = 0 if head is None else head.numel()
    batch_size, num_blocks, itemsize = images.shape[0], len(model.blocks), images.dtype.itemsize
    stem = 2 * batch_size * tokens * patch.numel()
    flops = num_blocks * shape.block_flops(batch_size) + stem + 2 * batch_size * head_size
    least = num_blocks * shape.block_bytes(batch_size, itemsize)
    least += itemsize * (images.numel() + patch.numel() + head_size)
    case = Case("model", name, shape, images.dtype, batch_size, flops, least)
    return _training(case, saved=stem) if mode == "train" else case


def _training(case: Case, saved: int = 0) -> Case:
    """``case`` forward and backward, but for ``saved`` FLOPs."""
    case = replace(case, mode="train", bytes=None)
    return replace(case, flops=case.passes * case.flops - saved)


def check_img_size(spec: MixerSpec, img_size: int) -> None:
    """Raise ValueError unless ``img_size`` is a positive multiple of the patch size."""
    if img_size < 1 or img_size % spec.patch_size:
        raise ValueError(f"the image size must be a multiple of the patch size {spec.patch_size}, got {img_size}")
