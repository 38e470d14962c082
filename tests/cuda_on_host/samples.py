"""How tests call the launchers of samples.cu, hopper_samples.cu and hopper_probes.cu."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from . import build

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # mk_type
DTYPES = {FLOAT32: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def load(name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.build_samples(name=name)))
    library.mk_error_string.restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray | torch.Tensor | None) -> ctypes.c_void_p:
    if array is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)


def failure(library: ctypes.CDLL, error: int) -> str:
    """What a launcher that returned ``error`` has to say."""
    assert error != 0
    return library.mk_error_string(error).decode()
