"""Dropout and stochastic depth as backends with kernels take them, equations (11) and (12) of docs/maths.md.

A random number is a function of the seed and of where it is used (hidden unit or output, its coordinates, the image),
so that forward, backward and a replay by activation checkpointing agree without a mask in memory. All kernels draw the
same numbers, by Philox 4x32-10 counted by (coordinate, coordinate, image, site). The seed is a tensor drawn from
PyTorch's generator: a captured CUDA graph draws a new one on every replay. The numbers, and so the masks, are not
those that ``torch.nn.Dropout`` would draw.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Dropout and stochastic depth of one half of a block. Probability 0 is none, and exact."""

    dropout_p: float = 0.0
    drop_path_p: float = 0.0
    seed: Tensor | None = None  # [1] int64 on the device of the kernels; None if both probabilities are 0

    @property
    def on_branch(self) -> bool:
        """Whether the gradient of the branch differs from that of the output."""
        return self.dropout_p > 0 or self.drop_path_p > 0
