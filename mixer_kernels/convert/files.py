"""State_dicts in files: safetensors, and what ``torch.save`` writes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin", ".tar")  # timm names its training checkpoints .pth.tar


def load_state_dict(path: str | os.PathLike) -> dict[str, Any]:
    """What a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.pth.tar`` file holds, on the CPU.

    ``torch.load`` with ``weights_only=True``: nothing in the file is executed.

    Raises:
        ValueError: another suffix, or the file is not what its suffix says.
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if _suffix(path) in SAFETENSORS:
        safetensors = _safetensors()
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py saves its arguments
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any kind, where bytes that are no pickle are read as one
        raise ValueError(f"{path} is not a file of weights that torch.load takes: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return dict(loaded)


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write tensors to a file that ``load_state_dict`` reads; its suffix says of which kind.

    Raises:
        ValueError: another suffix.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    if _suffix(path) in SAFETENSORS:
        _safetensors().torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def _suffix(path: Path) -> str:
    if path.suffix not in SAFETENSORS + TORCH:
        raise ValueError(f"{path} must end in one of {', '.join(SAFETENSORS + TORCH)}")
    return path.suffix


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need safetensors: pip install safetensors, or use a .pth file") from error
    return safetensors
