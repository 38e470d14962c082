"""Google's MLP-Mixer checkpoints: NumPy archives of the parameters of a Flax model.

gs://mixer_models (the paper's models), gs://vit_models/gsam and sam (the same architecture, other optimizers), and what
vision_transformer and big_vision save. There are two generations of names, the second since Flax's Linen API::

    embedding/kernel                                             stem/kernel                     [P, P, 3, C]
    Mixer/encoderblock_0/LayerNorm_0/scale                       MixerBlock_0/LayerNorm_0/scale  [C]
    Mixer/encoderblock_0/token_mixing_phase_0/kernel1            MixerBlock_0/token_mixing/Dense_0/kernel  [S, D_S]
    Mixer/encoderblock_0/channel_mixing_phase_0/kernel2          MixerBlock_0/channel_mixing/Dense_1/kernel  [D_C, C]
    Mixer/encoder_norm/scale                                     pre_head_layer_norm/scale       [C]
    head/kernel                                                  head/kernel                     [C, classes]

The first generation has axes of length 1 in its MLPs, and counted the LayerNorms of a block together with its other
layers.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .files import check_is_file
from .layout import Rename, StateDict, layer, rename

# Training checkpoints hold more than the parameters: those are under one of these.
PREFIXES = ("opt/target/", "params/")
_BLOCK = re.compile(r"MixerBlock_(\d+)/")
_OLDER_BLOCK = re.compile(r"Mixer/encoderblock_(\d+)/(.*)")
_OLDER_NORM = re.compile(r"LayerNorm_(\d+)/(scale|bias)")
_OLDER_MLP = re.compile(r"(token_mixing|channel_mixing)_phase_\d+/(kernel|bias)([12])")
_OLDER = {"embedding": "stem", "Mixer/encoder_norm": "pre_head_layer_norm"}


def from_google_npz(file: str | os.PathLike | IO[bytes]) -> StateDict:
    """The weights of a Google Mixer checkpoint in timm's keys, in the file's dtype.

    Google's models use the tanh form of GELU: build the model with ``act_layer=partial(nn.GELU, approximate="tanh")``,
    or by ``model_arguments(state_dict, origin="google")``.

    Args:
        file: path or open binary file of an ``.npz``, of either generation of names. From a training checkpoint only
            the parameters (``opt/target/`` or ``params/``) are read. Pickled objects are never loaded.

    Raises:
        ValueError: not such a file; keys are missing or left over, or shapes do not fit; the message names them.
        TypeError: something is not a tensor of floating-point numbers.
        OSError: the file cannot be read.
    """
    arrays = _read(file)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in arrays):
            arrays = {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}
            break
    tensors = {name: _tensor(name, array) for name, array in arrays.items()}
    if any(name.startswith("Mixer/") for name in tensors):
        tensors = _newer_names(tensors)
    blocks = [int(match[1]) for match in map(_BLOCK.match, tensors) if match]
    return rename("Google Mixer", _table(max(blocks, default=0) + 1, "head/kernel" in tensors), tensors)


def _table(num_blocks: int, head: bool) -> list[Rename]:
    table = [*_affine("stem", "stem.proj", 4, lambda w: w.permute(3, 2, 0, 1))]  # [P, P, 3, C] to [C, 3, P, P]
    for i in range(num_blocks):
        theirs, ours = f"MixerBlock_{i}", f"blocks.{i}"
        table += _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1") + _norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2")
        for their_mlp, our_mlp in (("token_mixing", "mlp_tokens"), ("channel_mixing", "mlp_channels")):
            table += _dense(f"{theirs}/{their_mlp}/Dense_0", f"{ours}.{our_mlp}.fc1")
            table += _dense(f"{theirs}/{their_mlp}/Dense_1", f"{ours}.{our_mlp}.fc2")
    table += _norm("pre_head_layer_norm", "norm")
    return table + (_dense("head", "head") if head else [])


_affine = partial(layer, names=("/kernel", "/bias"))
_dense = partial(_affine, dims=2, change=lambda w: w.T)
_norm = partial(layer, dims=1, names=("/scale", "/bias"))


def _newer_names(tensors: Mapping[str, Tensor]) -> StateDict:
    """First generation to second; what is not known keeps its name, and is then not expected."""
    norms: dict[str, list[int]] = {}
    for name in tensors:
        block = _OLDER_BLOCK.fullmatch(name)
        norm = block and _OLDER_NORM.fullmatch(block[2])
        if norm:
            norms.setdefault(block[1], []).append(int(norm[1]))
    newer = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition("/")
        if module in _OLDER:
            name = f"{_OLDER[module]}/{leaf}"
        elif block := _OLDER_BLOCK.fullmatch(name):
            if norm := _OLDER_NORM.fullmatch(block[2]):
                number = sorted(set(norms[block[1]])).index(int(norm[1]))
                name = f"MixerBlock_{block[1]}/LayerNorm_{number}/{norm[2]}"
            elif mlp := _OLDER_MLP.fullmatch(block[2]):
                name = f"MixerBlock_{block[1]}/{mlp[1]}/Dense_{int(mlp[3]) - 1}/{mlp[2]}"
                tensor = _without_unit_axes(tensor, 2 if mlp[2] == "kernel" else 1)
        newer[name] = tensor
    return newer


def _without_unit_axes(tensor: Tensor, dims: int) -> Tensor:
    # Not squeeze(): a model may have one token or one channel.
    for axis in reversed(range(tensor.dim())):
        if tensor.dim() > dims and tensor.shape[axis] == 1:
            tensor = tensor.squeeze(axis)
    return tensor


def _read(file: str | os.PathLike | IO[bytes]) -> dict[str, np.ndarray]:
    what = getattr(file, "name", "the file") if hasattr(file, "read") else os.fspath(file)
    if not hasattr(file, "read"):
        check_is_file(Path(file))
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{what} is not an .npz archive of NumPy: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{what} is a single array (.npy), not an .npz archive of NumPy")
    arrays = {}
    with archive:
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except (ValueError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(f"{what}: {name} cannot be read: {error}") from error
    return arrays


def _tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # NumPy has no bfloat16, and saves it so
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must hold floating-point numbers, got {array.dtype}") from error
