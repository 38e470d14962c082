"""State_dicts in files: safetensors, and what ``torch.save`` writes."""

from __future__ import annotations

import argparse
import enum
import importlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".bin", ".tar", ".ckpt")  # .pth.tar is timm's, .ckpt Lightning's
# Of whole models that torch.save has pickled, the modules of these packages are loaded.
PACKAGES = ("torch.nn", "timm", "mlp_mixer_pytorch", "einops.layers.torch", "mixer_kernels")


def load_state_dict(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.pth.tar`` or ``.ckpt`` file, on the CPU.

    It is read by ``torch.load`` with ``weights_only=True``: no code from the file is executed. For a whole model made
    of modules of PyTorch, timm, lucidrains and this package, its state_dict is returned.

    Raises:
        ValueError: another suffix, or the file is not what its suffix says.
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
    """
    path = Path(path)
    suffix = _suffix(path)
    check_is_file(path)
    if suffix in SAFETENSORS:
        safetensors = _safetensors()
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        # timm's train.py saves its arguments
        with torch.serialization.safe_globals([argparse.Namespace, *_modules_of(path)]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise ValueError(f"{path} is not a file of weights that torch.load takes: {error}") from error
        raise ValueError(
            f"{path} is not a file of weights that torch.load takes: it holds objects of other kinds, which are not "
            "loaded, as that runs code of theirs. Save model.state_dict() alone"
        ) from error
    except Exception as error:  # of any kind, where bytes that are no pickle are read as one
        raise ValueError(f"{path} is not a file of weights that torch.load takes: {error}") from error
    if isinstance(loaded, nn.Module):
        return loaded.state_dict()
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return dict(loaded)


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write tensors to a file that ``load_state_dict`` reads. Its suffix decides the format.

    Raises:
        ValueError: another suffix.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} to")
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    if _suffix(path) in SAFETENSORS:
        _safetensors().torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def check_is_file(path: Path) -> None:
    """Raise an OSError that says so unless there is a file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file of weights")
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")


def _modules_of(path: Path) -> list[type]:
    """What the file names of ``PACKAGES``: classes of modules and their options, as far as they are there."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of any kind, as in load_state_dict, which says what is wrong
        return []
    found = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        if f"{module}.".startswith(tuple(f"{package}." for package in PACKAGES)):
            try:
                value = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError):  # of another version: the error of load_state_dict says enough
                continue
            if isinstance(value, type) and issubclass(value, (nn.Module, enum.Enum)):
                found.append(value)
    return found


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
