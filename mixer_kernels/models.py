"""``FusedMixer``: a whole MLP-Mixer (arXiv:2105.01601) out of ``FusedMixerBlock``, compatible with timm's ``MlpMixer``.

Constructor, methods, state_dict keys and initial weights (bit for bit from the same seed) are those of
``timm.models.mlp_mixer``; timm itself is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .functional import MEMORY_MODES
from .layers import Mlp, factory_kwargs, pair
from .modules import LAYER_NORM, FusedMixerBlock
from .shapes import SPECS
from .words import one_of

GLOBAL_POOLS = ("", "avg")
OUTPUT_FORMATS = ("NCHW", "NLC")


class PatchEmbed(nn.Module):
    """Images ``[B, in_chans, H, W]`` to tokens ``[B, S, C]``, S = (H // patch height) * (W // patch width).

    Equivalent to ``norm(proj(x).flatten(2).transpose(1, 2))`` with ``proj`` a convolution whose stride is its kernel.
    The result is a transposed view for contiguous images, contiguous for channels_last images; the kernels read both.

    Args:
        img_size, patch_size: one number, or (height, width). What is left over at the right and the bottom is dropped.
        norm_layer: called with ``embed_dim``; None for none.

    Raises:
        ValueError: no patch fits into the image; in ``forward``, images of another shape than built for.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = factory_kwargs(device, dtype)
        self.img_size = pair(img_size)
        self.patch_size = pair(patch_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if self.num_patches == 0:
            raise ValueError(f"no patch of {_by(self.patch_size)} pixels fits into an image of {_by(self.img_size)}")
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, **factory)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, torch.fx.Proxy) and not torch.jit.is_tracing():  # they would record the comparison
            self._check(x)
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}")
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels or x.shape[2:] != self.img_size:
            expected = f"(batch, {self.proj.in_channels}, {self.img_size[0]}, {self.img_size[1]})"
            raise ValueError(f"built for images {expected}, got shape {tuple(x.shape)}")

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """By how much the grid of tokens is smaller than the image: the larger of both numbers, or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of (height, width)."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]


class FusedMixer(nn.Module):
    """MLP-Mixer: images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``, with all that timm's ``MlpMixer`` has.

    Args:
        num_classes: classes; 0 for no classifier (the forward pass then returns the pooled features).
        img_size, in_chans, patch_size: the images and their patches; sizes are one number, or (height, width).
        num_blocks, embed_dim: how many blocks, and their channels C.
        mlp_ratio: D_S / C and D_C / C, or one value for both.
        block_layer, mlp_layer, norm_layer, act_layer: classes to build from, as in ``FusedMixerBlock``.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs of the blocks.
        drop_path_rate: stochastic depth, the same in all blocks.
        nlhb: initialise the classifier's bias to -log(num_classes) instead of 0.
        stem_norm: normalise after the patch embedding.
        global_pool: "avg" for the mean over tokens, "" for none (logits ``[B, S, num_classes]``).
        device, dtype: of the parameters.
        memory: what training keeps, "fast" or "min" as in ``FusedMixerBlock``. It is passed to ``block_layer`` only if
            it is not the default, so that other blocks work too.

    Raises:
        ValueError: unknown ``global_pool`` or ``memory``, or an image smaller than a patch.
        TypeError: ``block_layer`` takes no ``memory`` and it is not the default.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 16,
        num_blocks: int = 8,
        embed_dim: int = 512,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        block_layer: Callable[..., nn.Module] = FusedMixerBlock,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        nlhb: bool = False,
        stem_norm: bool = False,
        global_pool: str = "avg",
        device=None,
        dtype=None,
        *,
        memory: str = "fast",
    ) -> None:
        super().__init__()
        factory = factory_kwargs(device, dtype)
        block_options = {} if one_of("memory", memory, MEMORY_MODES) == "fast" else {"memory": memory}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = one_of("global_pool", global_pool, GLOBAL_POOLS)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False

        stem_norm_layer = norm_layer if stem_norm else None
        self.stem = PatchEmbed(img_size, patch_size, in_chans, embed_dim, norm_layer=stem_norm_layer, **factory)
        self.blocks = nn.Sequential(
            *(
                block_layer(
                    embed_dim,
                    self.stem.num_patches,
                    mlp_ratio,
                    mlp_layer=mlp_layer,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    drop=proj_drop_rate,
                    drop_path=drop_path_rate,
                    **block_options,
                    **factory,
                )
                for _ in range(num_blocks)
            )
        )
        reduction = self.stem.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(num_blocks)
        ]
        self.norm = norm_layer(embed_dim, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.init_weights(nlhb=nlhb)

    @classmethod
    def from_spec(cls, name: str, *, img_size: int = 224, num_classes: int = 1000, **kwargs: Any) -> FusedMixer:
        """A model of the paper's Table 1: "S/32", "S/16", "B/32", "B/16", "L/32", "L/16" or "H/14".

        Widths do not depend on the image size, so D_S stays when S changes. ``kwargs`` go to the constructor and win
        over the specification (``num_blocks=2`` for a shallow one).

        Raises:
            ValueError: no such specification.
        """
        spec = SPECS[one_of("spec", name, tuple(SPECS))]
        arguments = {
            "patch_size": spec.patch_size,
            "num_blocks": spec.num_blocks,
            "embed_dim": spec.C,
            "mlp_ratio": (spec.D_S / spec.C, spec.D_C / spec.C),
        }
        return cls(num_classes=num_classes, img_size=img_size, **(arguments | kwargs))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens ``[B, S, C]``: all but pooling and classifier."""
        x = self.stem(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens ``[B, S, C]`` and classify them; with ``pre_logits`` only pool."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """``forward_features``, and what came out of some of the blocks on the way.

        Args:
            x: images.
            indices: the blocks, counted from the end if negative; the last n for an int; None for all. Results come
                in the order of the blocks.
            norm: apply the final norm to the intermediates.
            stop_early: do not run the blocks after the last one asked for. The features are then theirs.
            output_fmt: "NCHW" for ``[B, C, rows, columns]``, "NLC" for ``[B, S, C]``.
            intermediates_only: do not return the features.

        Returns:
            The intermediates, or (features, intermediates).

        Raises:
            ValueError: unknown ``output_fmt``, or a block that the model does not have.
        """
        one_of("output_fmt", output_fmt, OUTPUT_FORMATS)
        take = _block_indices(len(self.blocks), indices)
        x = self.stem(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: max(take) + 1] if stop_early else self.blocks):
            x = self._run(block, x)
            if i in take:
                intermediates.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            grid = self.stem.grid_size
            intermediates = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in intermediates]
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks, and if asked the norm and the head, that these intermediates do not need.

        Returns:
            The indices, counted from the start.
        """
        take = _block_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(take) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer for ``num_classes`` in place (0: none), and optionally another pooling."""
        if global_pool is not None:
            self.global_pool = one_of("global_pool", global_pool, GLOBAL_POOLS)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass, which then runs each block once more."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group the parameters by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def init_weights(self, nlhb: bool = False) -> None:
        """Draw all weights anew, as timm does; ``nlhb``: the classifier's bias becomes -log(num_classes)."""
        head_bias = -math.log(self.num_classes) if nlhb and self.num_classes > 0 else 0.0
        for name, module in _children_first(self):
            _init_weights(module, name, head_bias)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)


def _init_weights(module: nn.Module, name: str, head_bias: float) -> None:
    if isinstance(module, nn.Linear) and name.startswith("head"):
        nn.init.zeros_(module.weight)
        nn.init.constant_(module.bias, head_bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            if "mlp" in name:
                nn.init.normal_(module.bias, std=1e-6)
            else:
                nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        _lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)):
        if module.weight is not None:
            nn.init.ones_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "init_weights"):
        module.init_weights()


@torch.no_grad()
def _lecun_normal_(weight: Tensor) -> None:
    """Flax's ``lecun_normal``: variance 1 / fan_in, from a normal distribution cut off at two of its deviations.

    By the inverse of its distribution function, as in timm. ``nn.init.trunc_normal_`` would do, but draws other numbers
    in other versions of PyTorch.
    """
    fan_in = weight[0].numel()
    bound = math.erf(2 / math.sqrt(2.0))  # P(|z| < 2)
    weight.uniform_(-bound, bound).erfinv_().mul_(math.sqrt(2.0)).clamp_(-2, 2)
    weight.mul_(math.sqrt(1 / fan_in) / 0.87962566103423978)  # the deviation of what is left between -2 and 2


def _children_first(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # A parent's own init_weights may overwrite what its children drew.
    for name, child in module.named_children():
        yield from _children_first(child, f"{prefix}{name}.")
        yield f"{prefix}{name}", child


def _block_indices(num_blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    if indices is None:
        indices = num_blocks
    if isinstance(indices, int):
        if not 0 < indices <= num_blocks:
            raise ValueError(f"indices: the last n blocks, n from 1 to {num_blocks}, got {indices}")
        return list(range(num_blocks - indices, num_blocks))
    if not indices or not all(-num_blocks <= i < num_blocks for i in indices):
        raise ValueError(f"indices must be blocks from {-num_blocks} to {num_blocks - 1}, got {list(indices)}")
    return [i % num_blocks for i in indices]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
