"""Dropout and stochastic depth in kernels: factors of 0 or 1 / (1 - p), equations (11) and (12) of docs/maths.md.

A random number is a function of the seed and of where it is used (hidden unit or output, its coordinates, the image),
so that forward, backward and a replay by activation checkpointing agree without a mask in memory. All kernels draw the
same numbers, by Philox 4x32-10 counted by (coordinate, coordinate, image, site). The seed is a tensor drawn from
PyTorch's generator: a captured CUDA graph draws a new one on every replay. The numbers, and so the masks, are not
those that ``torch.nn.Dropout`` would draw.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..arguments import Options

SITE_HIDDEN = tl.constexpr(0)
SITE_BRANCH = tl.constexpr(1)
SITE_IMAGE = tl.constexpr(2)


def noise_arguments(options: Options) -> dict[str, Any]:
    """What a kernel with both takes."""
    return dropout_arguments(options) | {
        "path_p": options.drop_path_p,
        "path_scale": _scale(options.drop_path_p),
        "DROP_PATH": options.drop_path_p > 0,
    }


def dropout_arguments(options: Options) -> dict[str, Any]:
    """What a kernel without stochastic depth takes."""
    return {
        "seed_ptr": options.seed,
        "dropout_p": options.dropout_p,
        "dropout_scale": _scale(options.dropout_p),
        "DROPOUT": options.dropout_p > 0,
    }


def _scale(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0  # with p = 1 nothing is kept


@triton.jit
def _kept(seed_ptr, i, j, image, p, scale, SITE: tl.constexpr):
    """``scale`` with probability 1 - p, else 0; Philox 4x32-10 (Salmon et al. 2011) counted by (i, j, image, SITE)."""
    i = i.to(tl.uint32) + 0 * j.to(tl.uint32)
    j = j.to(tl.uint32) + 0 * i
    image = image.to(tl.uint32) + 0 * i
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), i, j, image, tl.zeros_like(i) + SITE)
    return tl.where(tl.uint_to_uniform_float(bits) >= p, scale, 0.0)


@triton.jit
def kept_hidden(seed_ptr, d, position, image, p, scale):
    """Dropout's factor of hidden unit ``d`` of a channel (token mixing) or of a token (channel mixing)."""
    return _kept(seed_ptr, d, position, image, p, scale, SITE_HIDDEN)


@triton.jit
def kept_branch(seed_ptr, c, s, image, p, scale):
    """Dropout's factor of channel ``c`` of token ``s`` in the branch's output."""
    return _kept(seed_ptr, c, s, image, p, scale, SITE_BRANCH)


@triton.jit
def kept_image(seed_ptr, image, p, scale):
    """Stochastic depth's factor of the whole branch of ``image``."""
    return _kept(seed_ptr, 0 * image, 0 * image, image, p, scale, SITE_IMAGE)
