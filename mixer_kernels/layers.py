"""The small modules that a Mixer block is made of, by timm's names and signatures: ``DropPath`` and ``Mlp``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


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
