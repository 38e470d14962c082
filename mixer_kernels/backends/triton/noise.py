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
    return dropout_arguments(options) | {"DROP_PATH": options.drop_path_p > 0}


def dropout_arguments(options: Options) -> dict[str, Any]:
    """What a kernel without stochastic depth takes: as ``noise`` the seed and both probabilities with their scales, or
    None, which spares a launch the arguments."""
    noise = None
    if options.noise:
        dropout_p, path_p = options.dropout_p, options.drop_path_p
        noise = (options.seed, dropout_p, _scale(dropout_p), path_p, _scale(path_p))
    return {"noise": noise, "DROPOUT": options.dropout_p > 0}


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
def kept_hidden(noise, d, position, image):
    """Dropout's factor of hidden unit ``d`` of a channel (token mixing) or of a token (channel mixing)."""
    seed_ptr, p, scale, _, _ = noise
    return _kept(seed_ptr, d, position, image, p, scale, SITE_HIDDEN)


@triton.jit
def kept_branch(noise, c, s, image):
    """Dropout's factor of channel ``c`` of token ``s`` in the branch's output."""
    seed_ptr, p, scale, _, _ = noise
    return _kept(seed_ptr, c, s, image, p, scale, SITE_BRANCH)


@triton.jit
def kept_image(noise, image):
    """Stochastic depth's factor of the whole branch of ``image``."""
    seed_ptr, _, _, p, scale = noise
    return _kept(seed_ptr, 0 * image, 0 * image, image, p, scale, SITE_IMAGE)


@triton.jit
def with_next_seed(noise):
    """The noise of a layer's second mixer."""
    seed_ptr, dropout_p, dropout_scale, path_p, path_scale = noise
    return seed_ptr + 1, dropout_p, dropout_scale, path_p, path_scale
