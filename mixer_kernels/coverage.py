"""What the kernels cover: why a block, or a part of one, has to be computed by its own modules.

``why_not_*`` give a reason in words, or None; ``*_of`` read from modules what ``functional`` takes. They hold for the
moment, because modes, hooks and submodules may change between two calls; ``snapshot`` sees most of those changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .layers import DropPath, Mlp
from .tracing import transform

PLAIN_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}  # beside GELU, whose modules have forms


def why_not_fused(block: nn.Module) -> str | None:
    """Why ``functional.mixer_block`` does not compute what this ``MixerBlock`` computes right now; None if it does."""
    return why_not_transformed() or why_not_covered(block) or why_not_this_noise(block)


def why_not_covered(block: nn.Module) -> str | None:
    """The reasons that lie in the submodules and their hooks, whatever the mode: of them ``snapshot`` sees all."""
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
        return f"{name} has {type(act).__name__}, not GELU, ReLU or SiLU"
    for part in (mlp, act, norm):
        if is_hooked(part):
            return f"{name} or a part of it has hooks or a replaced forward"
    return why_not_linear(name, fc1, fc2) or why_not_dropout(name, drop1, drop2)


def why_not_linear(name: str, *layers: nn.Module) -> str | None:
    for layer in layers:
        if type(layer) is not nn.Linear:
            return f"{name} has {type(layer).__module__}.{type(layer).__name__}, not torch.nn.Linear"
        reason = _why_not_plain(name, layer)
        if reason:
            return reason
    return None


def why_not_pointwise(name: str, *layers: nn.Module) -> str | None:
    """Of ``Conv1d`` along the tokens, which are linear layers if their kernels have one weight."""
    for layer in layers:
        if type(layer) is not nn.Conv1d:
            return f"{name} has {type(layer).__name__} beside Conv1d"
        if (layer.kernel_size, layer.stride, layer.padding, layer.groups) != ((1,), (1,), (0,), 1):
            return f"{name} has a Conv1d that is not pointwise"
        reason = _why_not_plain(name, layer)
        if reason:
            return reason
    return None


def _why_not_plain(name: str, layer: nn.Module) -> str | None:
    if is_special(layer.weight):
        return f"{name} has weights of a tensor subclass"
    return f"{name} has hooks or a replaced forward on a {type(layer).__name__}" if is_hooked(layer) else None


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
    """``activation`` and ``approximate`` for ``functional``, of an ``Mlp`` or a ``GluMlp``; None if those are others.
    ``GatedMlp`` has GELU alone."""
    act = mlp._modules["act"]
    if is_timm(type(mlp), "mlp", "GluMlp"):
        return {"activation": "swiglu"} if type(act) is nn.SiLU and mlp.gate_last else None
    approximate = approximate_of(act)
    if approximate is not None:
        return {"activation": "gelu", "approximate": approximate}
    if type(act) not in PLAIN_ACTIVATIONS or is_timm(type(mlp), "mlp", "GatedMlp"):
        return None
    return {"activation": PLAIN_ACTIVATIONS[type(act)]}


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


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a Linear, a Conv1d or a LayerNorm."""
    parameters = layer._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:  # DataParallel's replicas and FSDP1 have tensors in their place
        return layer.weight, layer.bias


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


def why_not_tensor(x: Any) -> str | None:
    # A Proxy of torch.fx above all: the modules of the block can be traced, the checks of functional cannot.
    return None if isinstance(x, Tensor) else f"the input is a {type(x).__name__}, not a Tensor"


def why_not_transformed() -> str | None:
    # TorchScript would record the checks of functional, and warn of each.
    return "TorchScript is tracing" if torch.jit.is_tracing() else transform()


def why_not_global_hooks() -> str | None:
    registry = nn.modules.module
    hooked = (
        registry._global_forward_hooks
        or registry._global_forward_pre_hooks
        or registry._global_backward_hooks
        or registry._global_backward_pre_hooks
    )
    return "global module hooks are registered" if hooked else None
