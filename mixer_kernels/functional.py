"""The functional API: ``token_mixing``, ``channel_mixing``, ``mixer_block``. Check, choose a backend, call.

Shapes: ``x [B, S, C]`` (batch, tokens, channels); ``w1 [D_S, S]``, ``w2 [S, D_S]`` act on tokens;
``w3 [D_C, C]``, ``w4 [C, D_C]`` act on channels: the layout of ``nn.Linear.weight``. ``gamma``, ``beta`` ``[C]`` are
LayerNorm's weight and bias. ``gamma``, ``beta`` and the biases may be None.

Dtypes: float16, bfloat16, float32 (and float64 on the torch backend), the same for all tensors; under
``torch.autocast`` the products run in autocast's dtype and the result has ``x``'s dtype, as in eager PyTorch.
``x`` may have any strides. The result is a new tensor; nothing is written in place.

Gradients: the kernels have a backward pass, once differentiable; the torch backend any number of times.
``memory`` says what training keeps for it: "fast" the two inputs, the row statistics and the hidden units z of the
channel half; "min" the inputs and statistics only, z is recomputed (the torch backend keeps what autograd keeps).

Dropout and stochastic depth are active where ``dropout_p`` or ``drop_path_p`` is above 0. Both draw from PyTorch's
generator of ``x``'s device. Which elements the kernels drop differs from what ``torch.nn.Dropout`` drops; how many
does not.

Errors, for all functions: ValueError for a wrong shape, device, ``eps``, ``approximate`` or ``backend``; TypeError for
a dtype or layout that is not supported or not the same for all tensors; RuntimeError when a backend that was asked for
by name cannot run here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends, ops
from .backends import torch as torch_backend

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
APPROXIMATIONS = ("none", "tanh")
MEMORY_MODES = ("fast", "min")


def token_mixing(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The token-mixing half of a Mixer block: ``x + W2 . GELU(W1 . LN(x) + b1) + b2`` along tokens.

    Equations (1) to (5) of docs/maths.md. Equivalent to::

        n = F.layer_norm(x, (C,), gamma, beta, eps)
        a = F.gelu(F.linear(n.transpose(1, 2), w1, b1), approximate=approximate)
        u = x + F.linear(a, w2, b2).transpose(1, 2)

    Args:
        x: ``[B, S, C]``, any strides.
        gamma, beta: LayerNorm's weight and bias, ``[C]`` or None.
        w1, b1: ``[D_S, S]`` and ``[D_S]`` or None.
        w2, b2: ``[S, D_S]`` and ``[S]`` or None.
        eps: added to the variance; > 0.
        approximate: "none" for the erf form of GELU (timm), "tanh" for the tanh form (Flax).
        dropout_p: probability of dropping an element after the activation and after the second product, in [0, 1].
        drop_path_p: probability of dropping the whole branch of an image; what is kept is scaled by 1 / (1 - p).
        backend: "auto", "cuda", "triton" or "torch"; None for what ``use_backend`` or ``MIXER_KERNELS_BACKEND`` says.

    Returns:
        ``u [B, S, C]`` in ``x``'s dtype.
    """
    parameters = {"gamma": gamma, "beta": beta, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    x, dtype = _check(x, parameters, (eps,), approximate, dropout_p, drop_path_p)
    _check_token_shapes(x, parameters)
    name = backends.choose(backend, x.device.type, x.device.index, dtype)
    noise = (dropout_p, drop_path_p)
    return _token_mixing(x, (gamma, beta, w1, b1, w2, b2), eps, approximate, dtype, noise, name)


def channel_mixing(
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    memory: str = "fast",
    backend: str | None = None,
) -> Tensor:
    """The channel-mixing half of a Mixer block: ``u + GELU(LN(u) . W3' + b3) . W4' + b4`` along channels.

    Equations (1), (2), (4), (6), (7) of docs/maths.md. Equivalent to::

        n = F.layer_norm(u, (C,), gamma, beta, eps)
        a = F.gelu(F.linear(n, w3, b3), approximate=approximate)
        y = u + F.linear(a, w4, b4)

    Args:
        u: ``[B, S, C]``, any strides.
        gamma, beta: LayerNorm's weight and bias, ``[C]`` or None.
        w3, b3: ``[D_C, C]`` and ``[D_C]`` or None.
        w4, b4: ``[C, D_C]`` and ``[C]`` or None.
        eps, approximate, dropout_p, drop_path_p, backend: as for ``token_mixing``.
        memory: "fast" or "min", what training keeps.

    Returns:
        ``y [B, S, C]`` in ``u``'s dtype.
    """
    parameters = {"gamma": gamma, "beta": beta, "w3": w3, "b3": b3, "w4": w4, "b4": b4}
    u, dtype = _check(u, parameters, (eps,), approximate, dropout_p, drop_path_p, memory)
    _check_channel_shapes(u, parameters)
    name = backends.choose(backend, u.device.type, u.device.index, dtype)
    noise = (dropout_p, drop_path_p)
    return _channel_mixing(u, (gamma, beta, w3, b3, w4, b4), eps, approximate, dtype, noise, name, memory)


def mixer_block(
    x: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    *,
    eps: float | tuple[float, float] = 1e-6,
    approximate: str = "none",
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    memory: str = "fast",
    backend: str | None = None,
) -> Tensor:
    """A whole Mixer block: ``channel_mixing(token_mixing(x, ...), ...)``; as one operator where no gradient is needed.

    Args:
        x: ``[B, S, C]``, any strides.
        gamma1, beta1, w1, b1, w2, b2: as for ``token_mixing``.
        gamma2, beta2, w3, b3, w4, b4: as for ``channel_mixing``.
        eps: of both LayerNorms, or of the first and the second.
        approximate, dropout_p, drop_path_p, memory, backend: as for ``channel_mixing``.

    Returns:
        ``y [B, S, C]`` in ``x``'s dtype.
    """
    eps1, eps2 = eps if isinstance(eps, tuple) else (eps, eps)
    parameters = {
        "gamma1": gamma1, "beta1": beta1, "w1": w1, "b1": b1, "w2": w2, "b2": b2,
        "gamma2": gamma2, "beta2": beta2, "w3": w3, "b3": b3, "w4": w4, "b4": b4,
    }  # fmt: skip
    x, dtype = _check(x, parameters, (eps1, eps2), approximate, dropout_p, drop_path_p, memory)
    _check_token_shapes(x, parameters, norm="1")
    _check_channel_shapes(x, parameters, norm="2")
    name = backends.choose(backend, x.device.type, x.device.index, dtype)
    noise = (dropout_p, drop_path_p)
    tokens, channels = (gamma1, beta1, w1, b1, w2, b2), (gamma2, beta2, w3, b3, w4, b4)
    if name != "torch" and noise == (0, 0) and not _needs_grad(x, *tokens, *channels):
        return ops.mixer_block(x, *tokens, *channels, eps1, eps2, approximate, dtype, name)
    u = _token_mixing(x, tokens, eps1, approximate, dtype, noise, name)
    return _channel_mixing(u, channels, eps2, approximate, dtype, noise, name, memory)


def _token_mixing(x, parameters, eps, approximate, dtype, noise, name) -> Tensor:
    if name == "torch":
        return torch_backend.token_mixing_forward(
            x, *parameters, eps=eps, approximate=approximate, dtype=dtype, dropout_p=noise[0], drop_path_p=noise[1]
        )
    return ops.token_mixing(x, *parameters, eps, approximate, dtype, *noise, _seed(x, noise), name)[0]


def _channel_mixing(u, parameters, eps, approximate, dtype, noise, name, memory) -> Tensor:
    if name == "torch":
        return torch_backend.channel_mixing_forward(
            u, *parameters, eps=eps, approximate=approximate, dtype=dtype, dropout_p=noise[0], drop_path_p=noise[1]
        )
    keep_z = memory == "fast" and _needs_grad(u, *parameters)
    return ops.channel_mixing(u, *parameters, eps, approximate, dtype, *noise, _seed(u, noise), name, keep_z)[0]


def _seed(x: Tensor, noise: tuple[float, float]) -> Tensor | None:
    """A seed for the kernels' own random numbers, drawn as a tensor: a captured CUDA graph draws one a replay."""
    if noise == (0, 0):
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(
    x: Tensor,
    parameters: dict[str, Tensor | None],
    eps: tuple[float, ...],
    approximate: str,
    dropout_p: float,
    drop_path_p: float,
    memory: str = "fast",
) -> tuple[Tensor, torch.dtype]:
    """Check what does not depend on the half; return ``x`` in the result's dtype, and the dtype of the products."""
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x must be a dense strided tensor, got layout {'nested' if x.is_nested else x.layout}")
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, tokens, channels), got shape {tuple(x.shape)}")
    if x.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {x.dtype}")
    for value in eps:
        if not 0 < value < math.inf:
            raise ValueError(f"eps must be > 0 and finite, got {value}")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be one of {', '.join(map(repr, APPROXIMATIONS))}, got {approximate!r}")
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY_MODES))}, got {memory!r}")
    for name, p in (("dropout_p", dropout_p), ("drop_path_p", drop_path_p)):
        if not 0 <= p <= 1:
            raise ValueError(f"{name} must be a probability, from 0 to 1, got {p}")
    present = [(name, parameter) for name, parameter in parameters.items() if parameter is not None]
    for name, parameter in present:
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}, but x is on {x.device}: move one of them")
    # Autocast leaves float64 alone, and does not exist for meta tensors.
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    for name, parameter in present:
        if parameter.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{name} is {parameter.dtype}, but x is {x.dtype}: convert one of them, "
                "or run under torch.autocast for float32 parameters with 16-bit products"
            )
        if parameter.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {parameter.dtype}")
    if not autocast:
        return x, x.dtype
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(torch.promote_types(x.dtype, dtype)), dtype


def _check_token_shapes(x: Tensor, parameters: dict[str, Tensor | None], norm: str = "") -> None:
    tokens, w1 = x.shape[1], parameters["w1"]
    if w1.dim() != 2:
        raise ValueError(f"w1 must be (D_S, tokens), got shape {tuple(w1.shape)}")
    hidden, built_for = w1.shape
    if built_for != tokens:
        raise ValueError(f"built for {built_for} tokens, got {tokens}")
    _check_norm(x, parameters, norm)
    _check_shape("w2", parameters["w2"], (tokens, hidden))
    _check_shape("b1", parameters["b1"], (hidden,))
    _check_shape("b2", parameters["b2"], (tokens,))


def _check_channel_shapes(u: Tensor, parameters: dict[str, Tensor | None], norm: str = "") -> None:
    channels, w3 = u.shape[2], parameters["w3"]
    if w3.dim() != 2:
        raise ValueError(f"w3 must be (D_C, channels), got shape {tuple(w3.shape)}")
    hidden, built_for = w3.shape
    if built_for != channels:
        raise ValueError(f"built for {built_for} channels, got {channels}")
    _check_norm(u, parameters, norm)
    _check_shape("w4", parameters["w4"], (channels, hidden))
    _check_shape("b3", parameters["b3"], (hidden,))
    _check_shape("b4", parameters["b4"], (channels,))


def _check_norm(x: Tensor, parameters: dict[str, Tensor | None], norm: str) -> None:
    for name in (f"gamma{norm}", f"beta{norm}"):
        parameter = parameters[name]
        if parameter is not None and tuple(parameter.shape) != (x.shape[2],):
            raise ValueError(f"{name}: built for {parameter.numel()} channels, got {x.shape[2]}")


def _check_shape(name: str, parameter: Tensor | None, shape: tuple[int, ...]) -> None:
    if parameter is not None and tuple(parameter.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
