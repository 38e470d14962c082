"""What all functions of the functional API check, and how they choose a backend."""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import Tensor

from .. import backends
from ..tracing import constant_while_tracing

logger = logging.getLogger("mixer_kernels")

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
APPROXIMATIONS = ("none", "tanh")
MEMORY_MODES = ("fast", "min")
ACTIVATIONS = ("gelu", "swiglu")
NORMS = ("layer", "affine")


def choose(
    backend: str | None, x: Tensor, dtype: torch.dtype, relative: str | None = None, unfit: str | None = None
) -> str:
    """The name of the backend that runs products in ``dtype`` on ``x``.

    ``relative``: what is asked for that is not a Mixer's; the cuda backend has nothing of that. ``unfit``: why no
    kernel can take these sizes.
    """
    name = backends.choose(backend, x.device.type, x.device.index, dtype)
    if name == "cpu":
        if not _cpu_has(relative):
            what = "the Mixer" if relative is None else relative
            raise RuntimeError(f"backend='cpu' cannot run: it has no kernels for {what}; use backend='torch'")
        return name
    if name == "torch" or (unfit is None and (relative is None or name.partition(":")[0] != "cuda")):
        return name
    return _choose_for_relative(backend, x.device.type, x.device.index, dtype, relative, unfit)


@constant_while_tracing
def _cpu_has(relative: str | None) -> bool:
    return relative in backends.load("cpu").FUNCTIONS


@constant_while_tracing
def _choose_for_relative(
    backend: str | None,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    relative: str,
    unfit: str | None,
) -> str:
    asked = backends.requested_backend() if backend is None else backend
    lacks = f"it has no kernels for {relative}"
    if asked.partition(":")[0] == "cuda":
        raise RuntimeError(f"backend={asked!r} cannot run: {lacks}; use backend='triton' or backend='torch'")
    if asked == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {unfit}; use backend='torch'")
    reason = unfit or backends.why_not("triton", torch.device(device_type, device_index), dtype)
    if reason is None:
        return "triton"
    _warn_once(f"{relative}: running on 'torch', because {reason}")
    return "torch"


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def seed_for(x: Tensor, noise: tuple[float, float], number: int = 1) -> Tensor | None:
    """Seeds for the kernels' own random numbers, drawn as a tensor: a captured CUDA graph draws new ones a replay."""
    if noise == (0, 0):
        return None
    return torch.randint(2**63 - 1, (number,), dtype=torch.int64, device=x.device)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check(
    x: Tensor,
    parameters: dict[str, Tensor | None],
    eps: tuple[float, ...] = (),
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    memory: str = "fast",
    activation: str = "gelu",
    norm: str = "layer",
    name: str = "x",
    dim: int = 3,
) -> tuple[Tensor, torch.dtype]:
    """Check what does not depend on the function; return ``x`` in the result's dtype, and the dtype of the products."""
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {'nested' if x.is_nested else x.layout}")
    if x.dim() != dim:
        raise ValueError(f"{name} must be (batch, tokens, channels), got shape {tuple(x.shape)}")
    if x.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {x.dtype}")
    for value in eps:
        if not 0 < value < math.inf:
            raise ValueError(f"eps must be > 0 and finite, got {value}")
    _check_choice("approximate", approximate, APPROXIMATIONS)
    _check_choice("memory", memory, MEMORY_MODES)
    _check_choice("activation", activation, ACTIVATIONS)
    _check_choice("norm", norm, NORMS)
    if activation != "gelu" and approximate != "none":
        raise ValueError(f"approximate={approximate!r} is a form of GELU, but activation is {activation!r}")
    for option, p in (("dropout_p", dropout_p), ("drop_path_p", drop_path_p)):
        if not 0 <= p <= 1:
            raise ValueError(f"{option} must be a probability, from 0 to 1, got {p}")
    present = [(label, parameter) for label, parameter in parameters.items() if parameter is not None]
    for label, parameter in present:
        if parameter.device != x.device:
            raise ValueError(f"{label} is on {parameter.device}, but {name} is on {x.device}: move one of them")
    # Autocast leaves float64 alone, and does not exist for meta tensors.
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    for label, parameter in present:
        if parameter.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{label} is {parameter.dtype}, but {name} is {x.dtype}: convert one of them, "
                "or run under torch.autocast for float32 parameters with 16-bit products"
            )
        if parameter.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"{label} must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {parameter.dtype}")
    if not autocast:
        return x, x.dtype
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(torch.promote_types(x.dtype, dtype)), dtype


def check_token_shapes(x: Tensor, parameters: dict[str, Tensor | None], activation: str, half: str = "") -> None:
    """Shapes of the parameters of token mixing, named ``gamma<half>`` and so on."""
    tokens, w1 = x.shape[1], parameters["w1"]
    if w1.dim() != 2:
        raise ValueError(f"w1 must be (D_S, tokens), got shape {tuple(w1.shape)}")
    rows, built_for = w1.shape
    if built_for != tokens:
        raise ValueError(f"built for {built_for} tokens, got {tokens}")
    check_norm(x, parameters, half)
    check_shape("w2", parameters["w2"], (tokens, _hidden_units("w1", rows, activation)))
    check_shape("b1", parameters["b1"], (rows,))
    check_shape("b2", parameters["b2"], (tokens,))


def check_channel_shapes(u: Tensor, parameters: dict[str, Tensor | None], activation: str, half: str = "") -> None:
    """Shapes of the parameters of channel mixing, named ``gamma<half>`` and so on."""
    channels, w3 = u.shape[2], parameters["w3"]
    if w3.dim() != 2:
        raise ValueError(f"w3 must be (D_C, channels), got shape {tuple(w3.shape)}")
    rows, built_for = w3.shape
    if built_for != channels:
        raise ValueError(f"built for {built_for} channels, got {channels}")
    check_norm(u, parameters, half)
    check_shape("w4", parameters["w4"], (channels, _hidden_units("w3", rows, activation)))
    check_shape("b3", parameters["b3"], (rows,))
    check_shape("b4", parameters["b4"], (channels,))


def check_norm(x: Tensor, parameters: dict[str, Tensor | None], half: str = "") -> None:
    """Shapes of gamma and beta."""
    for name in (f"gamma{half}", f"beta{half}"):
        parameter = parameters[name]
        if parameter is not None and tuple(parameter.shape) != (x.shape[-1],):
            raise ValueError(f"{name}: built for {parameter.numel()} channels, got {x.shape[-1]}")


def check_shape(name: str, parameter: Tensor | None, shape: tuple[int, ...]) -> None:
    """``parameter`` has ``shape``, or is None."""
    if parameter is not None and tuple(parameter.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")


def _hidden_units(name: str, rows: int, activation: str) -> int:
    if activation != "swiglu":
        return rows
    if rows % 2 != 0:
        raise ValueError(f"{name} must have an even number of rows for swiglu, values and gates, got {rows}")
    return rows // 2


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
