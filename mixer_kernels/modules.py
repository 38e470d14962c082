"""``FusedMixerBlock``, a drop-in for timm's ``MixerBlock``, and the small modules that it is made of.

Signatures, submodule names, state_dict keys and random number consumption are timm's (``timm.models.mlp_mixer``), so
weights travel both ways; timm itself is not needed. A block runs through ``functional.mixer_block`` when that computes
what its submodules would compute, and calls the submodules one by one when not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import functional
from .freeze import Freezable
from .tracing import constant_while_tracing

logger = logging.getLogger("mixer_kernels")

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # timm's and Flax's default; PyTorch's own eps is 1e-5


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the whole branch of an image with probability ``drop_prob``.

    What is kept is scaled by ``1 / (1 - drop_prob)`` (``scale_by_keep``), so that the expectation stays. timm's
    ``DropPath``, draw for draw. ``x [B, ...]``, any dtype.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            keep.div_(keep_prob)
        return x * keep

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:0.3f}"


class Mlp(nn.Module):
    """``fc2(norm(drop1(act(fc1(x)))))`` and a last dropout, along the last dimension: timm's ``Mlp``.

    Args:
        in_features: size of the last dimension of ``x``.
        hidden_features, out_features: default to ``in_features``.
        act_layer: called without arguments.
        norm_layer: called with ``hidden_features``; None for none.
        bias, drop: one value, or one for each of the two linear layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = factory_kwargs(device, dtype)
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        bias1, bias2 = pair(bias)
        drop1, drop2 = pair(drop)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden_features, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)
        self.drop2 = nn.Dropout(drop2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class FusedMixerBlock(Freezable, nn.Module):
    """One MLP-Mixer block, ``x [B, S, C] -> [B, S, C]``: timm's ``MixerBlock`` through the fused kernels.

    Equivalent to::

        x = x + drop_path(mlp_tokens(norm1(x).transpose(1, 2)).transpose(1, 2))
        x = x + drop_path(mlp_channels(norm2(x)))

    and computed just so, with one warning for each reason on the logger "mixer_kernels", where the kernels do not
    cover the submodules (``why_not_fused`` says why): norms other than LayerNorm over C, MLPs other than ``Mlp`` with
    GELU (erf or tanh) and timm's ``GluMlp`` with SiLU, active dropouts that differ, stochastic depth that does not
    rescale, hooks on a submodule. On the ``torch`` backend a seed gives timm's dropout masks; on the kernels it gives
    others.

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: D_S / C and D_C / C, or one value for both. Both are relative to C, as in timm and in the paper's
            models. A product is rounded down; 0 stands for the width of the MLP's input.
        mlp_layer: called as ``mlp_layer(in_features, hidden_features, act_layer=, drop=)``; ``Mlp``, or timm's ``Mlp``
            or ``GluMlp`` to be fused.
        norm_layer: called as ``norm_layer(dim)``; by default LayerNorm with eps 1e-6.
        act_layer: ``nn.GELU``, ``partial(nn.GELU, approximate="tanh")``, timm's ``GELU`` or ``GELUTanh`` to be fused;
            ``nn.SiLU`` with ``GluMlp``.
        drop: dropout probability after the activation and after the second product of both MLPs.
        drop_path: stochastic depth probability of both branches.
        device, dtype: of the parameters; passed on to the layers if given.
        memory: what training keeps for the backward pass of the kernels, "fast" or "min" as in ``functional``.

    Raises:
        ValueError: unknown ``memory``, or three values for a pair.
        ValueError, TypeError, RuntimeError (from ``forward``): as ``functional.mixer_block``.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        mlp_layer: Callable[..., nn.Module] = Mlp,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        *,
        memory: str = "fast",
    ) -> None:
        super().__init__()
        factory = factory_kwargs(device, dtype)
        self.memory = one_of("memory", memory, functional.MEMORY_MODES)
        tokens_dim, channels_dim = (int(ratio * dim) for ratio in pair(mlp_ratio))
        self.norm1 = norm_layer(dim, **factory)
        self.mlp_tokens = mlp_layer(seq_len, tokens_dim, act_layer=act_layer, drop=drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp_channels = mlp_layer(dim, channels_dim, act_layer=act_layer, drop=drop, **factory)

    def example(self) -> Tensor:
        weight = self.mlp_tokens.fc1.weight
        return torch.zeros(1, *image_shape(self), dtype=weight.dtype, device=weight.device)

    def why_not_kernels(self, x: Tensor) -> str | None:
        return why_not_fused(self)

    def forward(self, x: Tensor) -> Tensor:
        packs = None
        if isinstance(self, Freezable):
            self.check_frozen()
            packs = self.packs()
        # Needs nothing but timm's submodules, so that it serves a stock MixerBlock just as well.
        reason = why_not_fused(self)
        if reason is not None:
            warn_once("FusedMixerBlock", reason)
            x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
            return x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return fused(self, x, memory=getattr(self, "memory", "fast"), packs=packs)


def image_shape(block: nn.Module) -> tuple[int, int]:
    """Tokens and channels of what a ``MixerBlock`` takes."""
    return block.mlp_tokens.fc1.in_features, block.mlp_channels.fc1.in_features


def fused(
    block: nn.Module,
    x: Tensor,
    *,
    memory: str,
    backend: str | None = None,
    packs: dict[str, Tensor] | None = None,
) -> Tensor:
    """A ``MixerBlock`` through ``functional.mixer_block``; right if ``why_not_fused(block)`` is None."""
    norm1, tokens, norm2, channels = block.norm1, block.mlp_tokens, block.norm2, block.mlp_channels
    w1, w2, w3, w4 = tokens.fc1, tokens.fc2, channels.fc1, channels.fc2
    return functional.mixer_block(
        x,
        *(norm1.weight, norm1.bias, w1.weight, w1.bias, w2.weight, w2.bias),
        *(norm2.weight, norm2.bias, w3.weight, w3.bias, w4.weight, w4.bias),
        eps=(norm1.eps, norm2.eps),
        **activation_of(tokens),
        dropout_p=dropout_p_of(tokens.drop1),
        drop_path_p=drop_path_p_of(block.drop_path),
        memory=memory,
        backend=backend,
        packs=packs,
    )


def why_not_fused(block: nn.Module) -> str | None:
    """Why ``functional.mixer_block`` does not compute what this ``MixerBlock`` computes right now; None if it does.

    Runs on every forward, because modes, hooks and submodules may change between two calls.
    """
    return why_not_traced() or why_not_covered(block) or why_not_this_noise(block)


def why_not_covered(block: nn.Module) -> str | None:
    """The reasons that lie in the submodules and their hooks, whatever the mode."""
    parts = block._modules  # plain dictionary look-ups: a third of the time of attribute access
    tokens, channels = parts["mlp_tokens"], parts["mlp_channels"]
    return (
        why_not_global_hooks()
        or why_not_mlp("mlp_tokens", tokens)
        or why_not_mlp("mlp_channels", channels)
        or why_not_norm("norm1", parts["norm1"], channels._modules["fc1"].in_features)
        or why_not_norm("norm2", parts["norm2"], channels._modules["fc1"].in_features)
        or why_not_drop_path(parts["drop_path"])
        or why_not_same_activation(tokens, channels)
    )


def why_not_this_noise(block: nn.Module) -> str | None:
    """The reasons that lie in dropout and stochastic depth as they are active right now."""
    parts = block._modules
    tokens, channels = parts["mlp_tokens"]._modules, parts["mlp_channels"]._modules
    return why_not_same_dropout(
        tokens["drop1"], tokens["drop2"], channels["drop1"], channels["drop2"]
    ) or why_not_rescaled(parts["drop_path"])


def why_not_mlp(name: str, mlp: nn.Module) -> str | None:
    cls = type(mlp)
    if cls is not Mlp and not is_timm(cls, "mlp", "Mlp") and not is_timm(cls, "mlp", "GluMlp"):
        return f"{name} is {cls.__name__}, not Mlp or GluMlp"
    return why_not_layers(name, mlp)


def why_not_layers(name: str, mlp: nn.Module) -> str | None:
    """Of ``Mlp``, ``GluMlp`` and ``GatedMlp``, which have the same parts; the last one's gate is not looked at."""
    parts = mlp._modules
    fc1, act, drop1, norm, fc2, drop2 = (
        parts["fc1"], parts["act"], parts["drop1"], parts["norm"], parts["fc2"], parts["drop2"],
    )  # fmt: skip
    if type(norm) is not nn.Identity:
        return f"{name} has {type(norm).__name__} between its products"
    if activation_of(mlp) is None:
        if is_timm(type(mlp), "mlp", "GluMlp"):
            return f"{name} is GluMlp with {type(act).__name__} and gate_last={mlp.gate_last}, not SiLU and True"
        return f"{name} has {type(act).__name__}, not GELU"
    for part in (mlp, act, norm):
        if is_hooked(part):
            return f"{name} or a part of it has hooks or a replaced forward"
    return why_not_linear(name, fc1, fc2) or why_not_dropout(name, drop1, drop2)


def why_not_linear(name: str, *layers: nn.Module) -> str | None:
    for layer in layers:
        if type(layer) is not nn.Linear:
            return f"{name} has {type(layer).__module__}.{type(layer).__name__}, not torch.nn.Linear"
        if is_special(layer.weight):
            return f"{name} has weights of a tensor subclass"
        if is_hooked(layer):
            return f"{name} has hooks or a replaced forward on a Linear"
    return None


def why_not_dropout(name: str, *layers: nn.Module) -> str | None:
    for layer in layers:
        if type(layer) is not nn.Dropout and type(layer) is not nn.Identity:
            return f"{name} has {type(layer).__name__}, not Dropout"
        if is_hooked(layer):
            return f"{name} has hooks or a replaced forward on a Dropout"
    return None


def why_not_norm(name: str, norm: nn.Module, channels: int) -> str | None:
    cls = type(norm)
    # timm's LayerNorm is the plain one unless timm's global "fast norm" was on when it was made.
    if cls is not nn.LayerNorm and not (is_timm(cls, "norm", "LayerNorm") and not norm._fast_norm):
        return f"{name} is {cls.__name__}, not a plain LayerNorm"
    if norm.normalized_shape != (channels,):
        return f"{name} normalises {norm.normalized_shape}, not ({channels},)"
    if not norm.eps > 0:
        return f"{name} has eps {norm.eps}"
    if is_hooked(norm):
        return f"{name} has hooks or a replaced forward"
    return None


def why_not_same_dropout(first: nn.Module, *others: nn.Module) -> str | None:
    p = dropout_p_of(first)
    for drop in others:
        if dropout_p_of(drop) != p:
            return "the dropouts have different probabilities or modes"
    return None


def why_not_drop_path(drop_path: nn.Module) -> str | None:
    cls = type(drop_path)
    if cls is not nn.Identity and cls is not DropPath and not is_timm(cls, "drop", "DropPath"):
        return f"drop_path is {cls.__name__}, not DropPath"
    return "drop_path has hooks or a replaced forward" if is_hooked(drop_path) else None


def why_not_rescaled(drop_path: nn.Module) -> str | None:
    if drop_path_p_of(drop_path) and not drop_path.scale_by_keep:
        return "stochastic depth does not rescale (scale_by_keep=False)"
    return None


def why_not_same_activation(mlp1: nn.Module, mlp2: nn.Module) -> str | None:
    same = activation_of(mlp1) == activation_of(mlp2)
    return None if same else "the two MLPs have different activations, or different forms of GELU"


def activation_of(mlp: nn.Module) -> dict[str, str] | None:
    """``activation`` and ``approximate`` for ``functional``, of an ``Mlp`` or a ``GluMlp``; None if it has neither."""
    act = mlp._modules["act"]
    if is_timm(type(mlp), "mlp", "GluMlp"):
        return {"activation": "swiglu"} if type(act) is nn.SiLU and mlp.gate_last else None
    approximate = approximate_of(act)
    return None if approximate is None else {"activation": "gelu", "approximate": approximate}


def approximate_of(act: nn.Module) -> str | None:
    """``F.gelu``'s ``approximate`` for an activation module, or None if it is no GELU."""
    cls = type(act)
    if cls is nn.GELU:
        return act.approximate
    if is_timm(cls, "activations", "GELU"):
        return "none"
    if is_timm(cls, "activations", "GELUTanh"):
        return "tanh"
    return None


def dropout_p_of(drop: nn.Module) -> float:
    """With what probability this nn.Dropout or nn.Identity drops right now."""
    return drop.p if drop.training and type(drop) is nn.Dropout else 0.0


def drop_path_p_of(drop_path: nn.Module) -> float:
    """With what probability this DropPath or nn.Identity drops right now."""
    return drop_path.drop_prob if drop_path.training and type(drop_path) is not nn.Identity else 0.0


def is_timm(cls: type, module: str, name: str) -> bool:
    # By name: timm need not be installed, and importing it takes seconds.
    return cls.__name__ == name and cls.__module__ == f"timm.layers.{module}"


def is_special(weight: Tensor) -> bool:
    # Quantised and distributed tensors have their own F.linear; the kernels would read their storage.
    return type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight)


def is_hooked(module: nn.Module) -> bool:
    # Tools that stream weights in (accelerate) replace `forward` on the instance.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not_traced() -> str | None:
    # It would record the checks of functional, and warn of each.
    return "TorchScript is tracing" if torch.jit.is_tracing() else None


def why_not_global_hooks() -> str | None:
    registry = nn.modules.module
    hooked = (
        registry._global_forward_hooks
        or registry._global_forward_pre_hooks
        or registry._global_backward_hooks
        or registry._global_backward_pre_hooks
    )
    return "global module hooks are registered" if hooked else None


@constant_while_tracing
def warn_once(block: str, reason: str) -> None:
    """Say, once in this process, that a class of blocks computes without the kernels, and why."""
    _warn_once_per_process(block, reason)


@functools.cache  # only what has been said
def _warn_once_per_process(block: str, reason: str) -> None:
    logger.warning("%s: computing eagerly, because %s", block, reason)


def factory_kwargs(device, dtype) -> dict:
    """``device`` and ``dtype`` as far as they are given: layers of older timm versions may take neither."""
    return {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}


def pair(value):
    """``value`` as a pair: itself if it is one, twice itself if it is a single value."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"expected one value or two, got {value}")
    return tuple(value)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is allowed; else a ValueError that names the argument."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
