"""Blocks of the Mixer and of each relative as modules, and who writes to their weights without PyTorch counting it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mixer_kernels.functional as F

S, C, D_S, D_C = 20, 24, 16, 40


class OneBlock(nn.Module):
    """A block by functions of ``mixer_kernels.functional``; ``backend`` "torch" is the unfused model."""

    function: Callable[..., Tensor]
    """Of x, the parameters by name, and the options "backend" and "memory"."""
    sizes: dict[str, tuple[int, ...]]
    x_shape: tuple[int, ...] = (2, S, C)

    def __init__(self, backend: str, memory: str = "fast") -> None:
        super().__init__()
        self.options = {"backend": backend, "memory": memory}
        for name, size in self.sizes.items():
            near = 1.0 if name.startswith(("gamma", "alpha", "scale")) else 0.0
            scale = size[-1] ** -0.5 if len(size) == 2 else 0.3
            self.register_parameter(name, nn.Parameter(near + scale * torch.randn(size)))

    def forward(self, x: Tensor) -> Tensor:
        return type(self).function(x, {name: getattr(self, name) for name in self.sizes}, self.options)


def _mlp(first: str, second: str, extent: int, hidden: int, rows: int = 1) -> dict[str, tuple[int, ...]]:
    return {
        f"w{first}": (rows * hidden, extent), f"b{first}": (rows * hidden,),
        f"w{second}": (extent, hidden), f"b{second}": (extent,),
    }  # fmt: skip


def _norm(half: str, channels: int = C) -> dict[str, tuple[int, ...]]:
    return {f"gamma{half}": (channels,), f"beta{half}": (channels,)}


class Mixer(OneBlock):
    sizes = {**_norm("1"), **_mlp("1", "2", S, D_S), **_norm("2"), **_mlp("3", "4", C, D_C)}

    def function(x, parameters, options):
        return F.mixer_block(x, **parameters, **options)


class ManyTokens(Mixer):
    """The path of two products."""

    sizes = {**_norm("1", 8), **_mlp("1", "2", 258, 8), **_norm("2", 8), **_mlp("3", "4", 8, 8)}
    x_shape = (1, 258, 8)


class GMixer(OneBlock):
    sizes = {**_norm("1"), **_mlp("1", "2", S, D_S, rows=2), **_norm("2"), **_mlp("3", "4", C, D_C, rows=2)}

    def function(x, parameters, options):
        return F.mixer_block(x, **parameters, activation="swiglu", **options)


class ResMLP(OneBlock):
    sizes = {
        "alpha": (C,), "beta": (C,), "w": (S, S), "b": (S,), "scale": (C,),
        **_norm("2"), **_mlp("3", "4", C, D_C), "scale2": (C,),
    }  # fmt: skip

    def function(x, p, options):
        u = F.token_linear(x, p["alpha"], p["beta"], p["w"], p["b"], p["scale"], backend=options["backend"])
        w4, b4 = p["scale2"][:, None] * p["w4"], p["scale2"] * p["b4"]
        first = (p["gamma2"], p["beta2"], p["w3"], p["b3"])
        return F.channel_mixing(u, *first, w4, b4, norm="affine", **options)


class GMLP(OneBlock):
    sizes = {
        **_norm(""), "w1": (2 * D_C, C), "b1": (2 * D_C,), **_norm("_gate", D_C), "w_gate": (S, S), "b_gate": (S,),
        "w2": (C, D_C), "b2": (C,),
    }  # fmt: skip

    def function(x, parameters, options):
        return F.gated_channel_mixing(x, *parameters.values(), **options)


class PatchTSMixerLayer(OneBlock):
    PATCHES, FEATURES = 7, 12
    sizes = {
        **_norm("1", FEATURES), **_mlp("1", "2", PATCHES, 14), "w_gate1": (PATCHES, PATCHES), "b_gate1": (PATCHES,),
        **_norm("2", FEATURES), **_mlp("3", "4", FEATURES, 24), "w_gate2": (FEATURES, FEATURES), "b_gate2": (FEATURES,),
    }  # fmt: skip
    x_shape = (2, 3, PATCHES, FEATURES)

    def function(x, parameters, options):
        return F.gated_mixer_layer(x, *parameters.values(), **options)


BLOCKS = {
    "torch": (Mixer, ResMLP),
    "triton": (Mixer, ManyTokens, GMixer, ResMLP, GMLP, PatchTSMixerLayer),
    "cuda": (Mixer, ManyTokens),
}
DTYPES = {"torch": torch.float32, "triton": torch.bfloat16, "cuda": torch.bfloat16}


def images(block: type[OneBlock], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(block.x_shape, device=device).to(dtype)


def on_torch(model: nn.Module) -> nn.Module:
    """A copy with the same weights that no kernel computes."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, OneBlock):
            module.options = module.options | {"backend": "torch"}
    return twin


def alive_bytes() -> int:
    """Of all tensors that Python can reach; each storage once."""
    while gc.collect():  # what a finalizer of earlier tests lets go is garbage of the next round
        pass
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.layout is torch.strided]
    storages = {}
    for t in tensors:
        try:
            storage = t.untyped_storage()
        except (NotImplementedError, RuntimeError):  # distributed tensors: their local ones are listed too
            continue
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------------------ writers


def _values(p: Tensor) -> Tensor:
    return 0.5 * p.detach() + 0.1 * torch.randn_like(p)


def data_copy(model: nn.Module) -> None:
    """EMA's copy_to of diffusers and torch-ema, ema_pytorch: shadow weights are copied in through ``.data``."""
    for p in model.parameters():
        p.data.copy_(_values(p))


def data_lerp(model: nn.Module) -> None:
    """ema_pytorch's update of the averaged model: ``ma.data.lerp_(current.data, 1 - decay)``."""
    for p in model.parameters():
        p.data.lerp_(_values(p).data, 0.5)


def data_add(model: nn.Module) -> None:
    """PEFT's merge: ``weight.data += delta``, of the matrices."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data += 0.2 * torch.randn_like(p)


def swap(model: nn.Module) -> None:
    """Lightning's weight averaging: both models' values change places by way of a clone, for validation."""
    for p in model.parameters():
        average, current = _values(p), p.data.clone()
        p.data.copy_(average.data)
        average.data.copy_(current)


def uncounted(model: nn.Module) -> None:
    """What FSDP2 does when it gathers: a write to the same storage that no version counter sees."""
    for p in model.parameters():
        with torch.autograd._unsafe_preserve_version_counter(p), torch.no_grad():
            p.copy_(_values(p))


def new_storage(model: nn.Module) -> None:
    """``p.data = other``: ``.to()``, and trainers that hand over a shard."""
    for p in model.parameters():
        p.data = _values(p)


def through_another_tensor(model: nn.Module) -> None:
    """Memory written by who never had the parameter: a captured graph's step, a communication library, NumPy."""
    for p in model.parameters():
        other = torch.empty(0, dtype=p.dtype, device=p.device)
        other.set_(p.data.untyped_storage(), p.storage_offset(), p.shape).copy_(_values(p))


WRITERS = (data_copy, data_lerp, data_add, swap, uncounted, new_storage, through_another_tensor)
