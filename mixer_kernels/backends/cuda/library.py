"""The compiled module ``mixer_kernels._C``: finding it, whether it runs on a device, and what its functions take.

Its functions take addresses, sizes and strides; a tensor is described by what ``pointer`` and ``layout`` return.
Importing this module loads nothing and touches no CUDA.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from ...tuning.target import target_of
from ..arguments import Options
from ..measured import passed_on
from ..remembered import forget

logger = logging.getLogger("mixer_kernels")

MODULE = f"{__package__.rpartition('.backends')[0]}._C"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # mk_type in csrc/mixer_kernels.h
PRODUCT_DTYPES = (torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores, cp.async
SM90 = "cuda:sm90"  # the backend that uses the kernels of csrc/sm90 whether they have run on a GPU or not
SM90_CAPABILITY = (9, 0)
SM90_ARCHITECTURE = "90a"  # with its own instructions: TMA and wgmma
_TORCH = "; use backend='torch'"

_installed: ModuleType | None = None


def install(module: ModuleType | None) -> None:
    """Use ``module`` where else ``mixer_kernels._C`` would be loaded; None undoes that.

    For builds of csrc/ that are not inside the package: another version, or one for the CPU, where ``on_host`` is true
    and tensors are on the CPU.
    """
    global _installed
    _installed = module
    _reason.cache_clear()
    sm90_by_default.cache_clear()
    forget()


def loaded() -> ModuleType:
    """The module; ImportError if there is none that loads."""
    return _installed if _installed is not None else _load()


def has(feature: str) -> bool:
    """Whether there are kernels for ``feature``: those of the Mixer."""
    return feature.removesuffix(" in training") in ("packs", "token_mixing", "channel_mixing", "mixer_block")


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run products in ``dtype`` on ``device``, or None."""
    reason = _reason(device)
    if reason is not None:
        return f"{reason}; use backend='triton' or backend='torch'" if device.type == "cuda" else reason + _TORCH
    if dtype is torch.float32:
        return "the CUDA kernels take 16-bit products; float32 products run on backend='triton' or backend='torch'"
    if dtype not in PRODUCT_DTYPES:
        return f"the CUDA kernels take {', '.join(map(str, PRODUCT_DTYPES))}, got {dtype}{_TORCH}"
    return None


def why_not_sm90(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of csrc/sm90 cannot run products in ``dtype`` on ``device``, or None."""
    reason = why_not(device, dtype)
    if reason is None:
        reason = _sm90_reason(device)
        reason = None if reason is None else f"{reason}; use backend='cuda'"
    return reason


@functools.cache  # a device stays what it is while the process lives
def sm90_by_default(device: torch.device) -> bool:
    """Whether backend "cuda" uses the kernels of csrc/sm90 on ``device``: where they have run on a GPU, as built."""
    module = loaded()
    return not module.on_host and _sm90_reason(device) is None and bool(passed_on(SM90, module.sm90_sources))


def sm90_takes(x: Tensor, dtype: torch.dtype, wanted: bool | None, tokens: bool = False) -> bool:
    """Whether kernels of csrc/sm90 are to compute products in ``dtype`` of ``x [B, S, C]``; ``tokens``: token mixing.

    ``wanted``: whether they may; None for where they do by default. They take 16-bit ``x`` in the dtype of the
    products, channels side by side, a multiple of 8 of them, the address and the other strides multiples of 16 bytes,
    and in token mixing up to 256 tokens.
    """
    return sm90_may(x, wanted) and loaded().sm90_takes(layout(x), x.shape, TYPES[dtype], tokens)


def sm90_may(x: Tensor, wanted: bool | None) -> bool:
    """Whether they may be used on the device of ``x``."""
    return sm90_by_default(x.device) if wanted is None else wanted


def pointer(t: Tensor | None) -> int:
    """The address of ``t``, null for None."""
    return 0 if t is None else t.data_ptr()


def layout(x: Tensor) -> tuple[int, int, int, int, int]:
    """``x [B, S, C]`` as mk_input: address, type, strides."""
    return (x.data_ptr(), TYPES[x.dtype], *x.stride())


def noise_of(options: Options) -> tuple[int, float, float]:
    """As mk_noise."""
    return pointer(options.seed), options.dropout_p, options.drop_path_p


def limits_of(x: Tensor) -> tuple[int, int]:
    """Of the GPU of ``x``, as mk_device."""
    target = target_of(x.device)
    return target.multiprocessors, target.shared_memory


def stream_of(x: Tensor) -> int:
    """The handle of PyTorch's current stream on the device of ``x``."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


@functools.cache  # a module is imported once
def _load() -> ModuleType:
    return importlib.import_module(MODULE)


@functools.cache  # likewise: of a device and the module
def _reason(device: torch.device) -> str | None:
    try:
        module = loaded()
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        return (
            "mixer_kernels was installed without its CUDA kernels (`pip install` builds them where it finds nvcc; with "
            "MIXER_KERNELS_BUILD_CUDA=1 it says why if it does not)"
        )
    except ImportError as error:
        return f"{MODULE} does not load: {error}"
    if module.on_host:
        return None if device.type == "cpu" else f"these kernels were built for the CPU, got a tensor on {device.type}"
    if device.type != "cuda":
        return f"a CUDA kernel needs a CUDA tensor, got one on {device.type}"
    if torch.version.hip:
        return "the CUDA kernels are for NVIDIA GPUs, this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the CUDA kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
    return _driver_reason(module, capability)


def _sm90_reason(device: torch.device) -> str | None:
    """Why not, on a device on which the other kernels run."""
    module = loaded()
    if module.on_host:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability != SM90_CAPABILITY:
        return f"the Hopper kernels need compute capability 9.0, got {capability[0]}.{capability[1]}"
    if SM90_ARCHITECTURE not in module.architectures:
        return (
            f"the CUDA kernels were built for {', '.join(module.architectures)}, the Hopper kernels need "
            f"{SM90_ARCHITECTURE}: build with MIXER_KERNELS_CUDA_ARCHS={SM90_ARCHITECTURE}"
        )
    return None


def _driver_reason(module: ModuleType, capability: tuple[int, int]) -> str | None:
    """Whether the driver runs what was compiled: machine code needs its major version, PTX all of it.

    CUDA Compatibility guide, "Minor Version Compatibility".
    """
    native = any(_runs(architecture, capability) for architecture in module.architectures)
    if not native and not any(_runs(architecture, capability, ptx=True) for architecture in module.ptx):
        return (
            f"the CUDA kernels were built for {', '.join(module.architectures)}, this GPU is "
            f"{_number(capability)}: build with MIXER_KERNELS_CUDA_ARCHS={_number(capability)}"
        )
    driver, runtime = module.driver_version(), module.runtime_version
    if driver // 1000 < runtime // 1000 or (not native and driver < runtime):
        reason = f"the driver is for CUDA {_version(driver)}, the CUDA kernels were built with {_version(runtime)}"
        logger.warning("backend 'cuda' cannot run: %s; update the driver or build with an older CUDA", reason)
        return reason
    return None


def _runs(architecture: str, capability: tuple[int, int], ptx: bool = False) -> bool:
    """Whether code for "80", "90a" or "100f" runs: machine code within a major version upwards, PTX upwards.

    Features of an architecture ("a") bind it to one GPU, those of a family ("f") to a major version.
    CUDA C++ Programming Guide, "Compute Capability and Streaming Multiprocessor Versions".
    """
    number, suffix = int(architecture.rstrip("af")), architecture.lstrip("0123456789")
    if suffix == "a":
        return number == _number(capability)
    if ptx and not suffix:
        return number <= _number(capability)
    return number // 10 == capability[0] and number <= _number(capability)


def _number(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
