"""What kernels need around them: the device of their tensors as the current one, and no autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, whatever device their arguments are on."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The plain products of backward have their dtypes already, also where backward is called under autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know that device
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
