"""What all functions of the functional API check, and how they choose a backend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..backends.arguments import Options
from ..ops.packs import has_packs
from ..tracing import constant_while_tracing, transform
from ..words import one_of, warn_once

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
APPROXIMATIONS = ("none", "tanh")
MEMORY_MODES = ("fast", "min")
ACTIVATIONS = ("gelu", "relu", "silu", "swiglu")
NORMS = ("layer", "affine")
GATES = ("softmax", "sigmoid")


def choose(
    backend: str | None,
    x: Tensor,
    options: Options,
    operator: str,
    *more: str,
    parameters: Iterable[Tensor | None] = (),
) -> str:
    """The name of the backend that runs ``operator`` on ``x``; ``more``: what it has to have besides."""
    features = (operator, *more)
    if options.activation != "gelu":
        features += (f"activation={options.activation!r}",)
    if options.norm != "layer":
        features += (f"norm={options.norm!r}",)
    if options.gate != "softmax":
        features += (f"gate={options.gate!r}",)
    pays = x.is_cpu and pays_on_cpu(operator, options.dtype, x, parameters, options.noise)
    name = backends.choose(backend, x.device.type, x.device.index, options.dtype, features, pays)
    reason = None if name == "torch" else transform()
    return name if reason is None else _choose_torch(backend, reason)


def runs_on_torch(backend: str | None, x: Tensor, operator: str | None = None, block: nn.Module | None = None) -> bool:
    """Whether the torch backend is chosen for a block on ``x``: it computes what the block's own modules compute.

    ``operator``: what computes ``block``, where it is one that a backend may have for CPUs.

    False where another one is asked for by name: the call of it says whether it can run.
    """
    asked = backends.requested_backend() if backend is None else backend
    if asked != "auto":
        return asked == "torch"
    if x.is_cpu:
        dtype = x.dtype
        if operator is None:
            return backends.auto_on_cpu((), dtype, False) == "torch"
        if torch.is_autocast_enabled("cpu"):  # asked here: half the time of product_dtype
            dtype = product_dtype(dtype, "cpu")
        pays = pays_on_cpu(operator, dtype, x, block.parameters(), block.training)
        return backends.auto_on_cpu((operator,), dtype, pays) == "torch"
    device = x.device
    dtype = product_dtype(x.dtype, device.type)
    return backends.choose(asked, device.type, device.index, dtype) == "torch"


def is_left_to_torch(x: Tensor) -> bool:
    """Whether ``pays_on_cpu`` denies all operators of MLP-Mixer, whatever else: a small block has no time to ask it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which would record the comparison
        return True
    return x.dtype is torch.float32 and x.numel() < backends.LEAST_OF_A_MIXER


def is_small_to_train(operator: str, x: Tensor) -> bool:
    """Whether ``pays_on_cpu`` denies ``operator`` in training, whatever else: as for ``is_left_to_torch``."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.dtype is torch.float32 and x.numel() < backends.FASTER_ON_CPU[x.dtype][operator][True]


def pays_on_cpu(
    operator: str, dtype: torch.dtype, x: Tensor, parameters: Iterable[Tensor | None], noise: bool = False
) -> bool:
    """Whether x is large enough for ``auto`` to take the ``cpu`` backend. It trains where autograd will ask for
    gradients, or with ``noise``, of which a call without gradients and its recomputation with them draw the same."""
    least = backends.least_on_cpu(operator, dtype)
    if least is None:
        return False
    trains = noise or (torch.is_grad_enabled() and needs_grad(x, *parameters))
    elements = least[trains]
    if elements == 0 or elements == backends.NEVER:
        return elements == 0
    if torch.jit.is_tracing():  # which would record the comparison
        return True
    # A compiler makes something of PyTorch's operators, and to compare x's size it would fix it.
    if not trains and torch.compiler.is_compiling():
        return False
    return True if x.numel() >= elements else False  # noqa: SIM210  dynamo makes a constant of a branch alone


@constant_while_tracing
def _choose_torch(backend: str | None, reason: str) -> str:
    """ "torch" for ``reason``, unless another one was asked for by name."""
    asked = backends.requested_backend() if backend is None else backend
    if asked != "auto":
        raise RuntimeError(f"backend={asked!r} cannot run: {reason}; use backend='torch'")
    warn_once(f"backend 'auto': running on 'torch', because {reason}")
    return "torch"


def seeded(x: Tensor, options: Options, number: int = 1) -> Options:
    """``options`` with seeds for the kernels' own random numbers, if they draw any: drawn as a tensor, so that a
    captured CUDA graph draws new ones a replay."""
    if options.dropout_p == 0 and options.drop_path_p == 0:
        return options
    seed = torch.randint(2**53, (number,), dtype=torch.int64, device=x.device)  # exact in float64 too
    return options._replace(seed=seed)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def takes_packs(packs: dict[str, Tensor] | None, name: str, options: Options, *tensors: Tensor | None) -> bool:
    """Whether a call on backend ``name`` can take the packs of a frozen block: without gradients, without noise."""
    return (
        has_packs(packs) and name != "torch" and not options.noise and not needs_grad(*tensors) and _keeps_packs(name)
    )


@constant_while_tracing
def _keeps_packs(name: str) -> bool:
    return backends.load(name).has("packs")


def check(
    x: Tensor,
    parameters: dict[str, Tensor | None],
    options: Options,
    memory: str | None = "fast",
    eps2: float | None = None,
    name: str = "x",
    dim: int = 3,
) -> tuple[Tensor, Options]:
    """Check what does not depend on the function; return ``x`` in the result's dtype, and ``options`` with the dtype of
    the products."""
    check_is_tensor(name, x)
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {'nested' if x.is_nested else x.layout}")
    if x.dim() != dim:
        raise ValueError(f"{name} must be (batch, tokens, channels), got shape {tuple(x.shape)}")
    if x.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {x.dtype}")
    activation, approximate = options.activation, options.approximate
    for value in (options.eps, options.eps if eps2 is None else eps2):
        if not 0 < value < math.inf:
            raise ValueError(f"eps must be > 0 and finite, got {value}")
    one_of("approximate", approximate, APPROXIMATIONS)
    if memory is not None:
        one_of("memory", memory, MEMORY_MODES)
    one_of("activation", activation, ACTIVATIONS)
    one_of("norm", options.norm, NORMS)
    one_of("gate", options.gate, GATES)
    if activation != "gelu" and approximate != "none":
        raise ValueError(f"approximate={approximate!r} is a form of GELU, but activation is {activation!r}")
    for option, p in (("dropout_p", options.dropout_p), ("drop_path_p", options.drop_path_p)):
        if not 0 <= p <= 1:
            raise ValueError(f"{option} must be a probability, from 0 to 1, got {p}")
    present = [(label, parameter) for label, parameter in parameters.items() if parameter is not None]
    for label, parameter in present:
        check_is_tensor(label, parameter)
        if parameter.device != x.device:
            raise ValueError(f"{label} is on {parameter.device}, but {name} is on {x.device}: move one of them")
    autocast = is_autocast_enabled(x.device.type) and x.dtype is not torch.float64  # which autocast leaves alone
    for label, parameter in present:
        if parameter.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{label} is {parameter.dtype}, but {name} is {x.dtype}: convert one of them, "
                "or run under torch.autocast for float32 parameters with 16-bit products"
            )
        if parameter.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"{label} must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {parameter.dtype}")
    if not autocast:
        return x, options._replace(dtype=x.dtype)
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(torch.promote_types(x.dtype, dtype)), options._replace(dtype=dtype)


def check_is_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__module__}.{type(value).__qualname__}")


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of products with a tensor of ``dtype``: its own or autocast's, which leaves float64 alone."""
    if dtype is torch.float64 or not is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for that type of device; it does not exist for meta tensors."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_half(x: Tensor, parameters: dict[str, Tensor | None], along: str, activation: str, x_name: str = "x") -> None:
    """Shapes of the parameters of the half that mixes ``along`` "tokens" or "channels": gamma, beta, and both layers'
    weights and biases, in this order, by their names."""
    axis, units = (1, "D_S") if along == "tokens" else (2, "D_C")
    _, _, w_in, b_in, w_out, b_out = parameters
    check_columns(w_in, parameters[w_in], (units, along), x, x_name, parameters[w_out])
    rows, extent = parameters[w_in].shape[0], x.shape[axis]
    check_norm(x, parameters, x_name)
    check_shape(w_out, parameters[w_out], (extent, _hidden_units(w_in, rows, activation)))
    check_shape(b_in, parameters[b_in], (rows,))
    check_shape(b_out, parameters[b_out], (extent,))


def check_columns(
    name: str, weight: Tensor, axes: tuple[str, str], x: Tensor, x_name: str = "x", second: Tensor | None = None
) -> None:
    """``weight`` multiplies along ``axes[1]``, "tokens" or "channels", of ``x``. ``second`` is the weight behind it,
    whose shape is the other way round: it may have been given in its place."""
    if weight.dim() != 2:
        raise ValueError(f"{name} must be ({axes[0]}, {axes[1]}), got shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    extent = x.shape[1 if axes[1] == "tokens" else 2]
    if columns == extent:
        return
    hint = ""
    if rows == extent:
        hint = f"; expected ({axes[0]}, {extent}): is it transposed"
        swapped = second is not None and second.dim() == 2 and second.shape[1] == extent
        hint += ", or swapped with the weight behind it?" if swapped else "?"
    raise ValueError(
        f"{name} has shape {tuple(weight.shape)}: built for {columns} {axes[1]}, {x_name} has {extent}{hint}"
    )


def check_norm(x: Tensor, parameters: dict[str, Tensor | None], x_name: str = "x") -> None:
    """Shapes of gamma and beta, the first two."""
    for name, parameter in [*parameters.items()][:2]:
        if parameter is not None and tuple(parameter.shape) != (x.shape[-1],):
            shape, channels = tuple(parameter.shape), x.shape[-1]
            raise ValueError(f"{name} has shape {shape}, expected ({channels},): {x_name} has {channels} channels")


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
