"""More tokens for a trained Mixer: fine-tuning at a higher resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layout import StateDict, checked_grid, sizes_of


def resize_tokens(state_dict: Mapping[str, Tensor], old_grid: Sequence[int], new_grid: Sequence[int]) -> StateDict:
    """Weights for an image of K x K times the patches: the token MLPs grow by K^2 copies of themselves.

    The construction of arXiv:2105.01601, appendix C: the image is split into K x K parts of the old size, and W1 and W2
    become block-diagonal, a copy for each part, so that the larger model computes for each part what the model computed
    for an image: the same tokens, before they are pooled. S and D_S both grow by K^2, hence these weights by K^4; all
    others stay. Build the model by ``model_arguments(resized, grid=new_grid)``, whose ``mlp_ratio`` has the new D_S.

    Rows and columns may grow by different factors.

    Args:
        state_dict: in timm's keys, as the functions of this package return it.
        old_grid: rows and columns of tokens that the weights are for; (14, 14) for 224 pixels in patches of 16.
        new_grid: rows and columns wanted, multiples of the old ones.

    Returns:
        A new dictionary: new tensors for the token MLPs, the same tensors for everything else.

    Raises:
        ValueError: a grid does not fit, or the state_dict is not a Mixer's.
    """
    sizes = sizes_of(state_dict)
    rows, columns = checked_grid(old_grid, sizes.S, "old_grid")
    if len(new_grid) != 2 or any(new < old or new % old for new, old in zip(new_grid, (rows, columns), strict=True)):
        raise ValueError(f"new_grid must be multiples of the rows and columns of {(rows, columns)}, got {new_grid}")
    order = _tokens_by_part((rows, columns), new_grid)
    copies = order.numel() // sizes.S
    resized = dict(state_dict)
    for i in range(sizes.num_blocks):
        fc1, fc2 = f"blocks.{i}.mlp_tokens.fc1", f"blocks.{i}.mlp_tokens.fc2"
        w1 = torch.block_diag(*[state_dict[f"{fc1}.weight"]] * copies)
        order = order.to(w1.device)
        w2 = torch.block_diag(*[state_dict[f"{fc2}.weight"]] * copies)
        # From the order of the parts to that of the image, row by row.
        resized[f"{fc1}.weight"] = torch.empty_like(w1).index_copy_(1, order, w1)
        resized[f"{fc1}.bias"] = state_dict[f"{fc1}.bias"].repeat(copies)
        resized[f"{fc2}.weight"] = torch.empty_like(w2).index_copy_(0, order, w2)
        b2 = state_dict[f"{fc2}.bias"].repeat(copies)
        resized[f"{fc2}.bias"] = torch.empty_like(b2).index_copy_(0, order, b2)
    return resized


def _tokens_by_part(old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """The tokens of the new grid, part by part, each part row by row."""
    (rows, columns), (new_rows, new_columns) = old_grid, new_grid
    tokens = torch.arange(new_rows * new_columns)
    parts = tokens.view(new_rows // rows, rows, new_columns // columns, columns)
    return parts.transpose(1, 2).flatten()
