"""TSMixer's mixers: what the compiled module takes for them (csrc/cpu/tsmixer.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import FeatureMixer, Options, TimeMixer
from ..relatives import halves_of_layer
from .library import instruction_set, loaded
from .plan import Packing, address, dense, in_float32

Mixer = TimeMixer | FeatureMixer

_ACTIVATIONS = ("gelu", "tanh", "relu", "silu")  # numbers of the C++ enumeration
_PARAMETERS = len(FeatureMixer._fields)


class MixingPlan:
    """The forward pass on every ``x`` of this layout, all but the addresses of x and y; parameters are read where they
    are."""

    def __init__(self, x: Tensor, mixer: Mixer, options: Options, norm_first: bool) -> None:
        taken = in_float32(mixer)
        self.copies = [copy for copy, given in zip(taken, mixer, strict=True) if copy is not given]
        """Of parameters: a plan that has some must not outlive its call."""
        self._shape, self._dtype, self._is_readable = _shape_of(x, mixer), x.dtype, dense(x) is x
        self._forward = loaded().TsmixerForward(
            instruction_set(), _form_of(x, mixer, options, norm_first), _addresses(taken)
        )

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor, z: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """``y``; writes ``z`` and ``v``, what backward takes, in float32."""
        y = torch.empty(self._shape, dtype=torch.float32, device="cpu")
        if y.numel() > 0:
            x = x if self._is_readable else dense(x)
            self._forward(address(x), y.data_ptr(), address(z), address(v), torch.get_num_threads())
        return y if self._dtype is torch.float32 else y.to(self._dtype)


class LayerPlan:
    """The same of a layer: two calls."""

    def __init__(
        self, x: Tensor, mixers: tuple[TimeMixer, FeatureMixer], options: Options, eps2: float, norm_first: bool
    ) -> None:
        both = zip(mixers, halves_of_layer(options, eps2), strict=True)
        self.time, self.features = (MixingPlan(x, mixer, of_mixer, norm_first) for mixer, of_mixer in both)
        self.copies = self.time.copies + self.features.copies

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        return self.features.run(self.time.run(x))


def time_mixing_plan(
    x: Tensor,
    mixer: TimeMixer,
    options: Options,
    norm_first: bool,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> MixingPlan:
    """``time_mixing_forward``'s y on every ``x`` of this layout, parameters where they are now; nothing of them is kept
    for a frozen block."""
    return MixingPlan(x, mixer, options, norm_first)


def feature_mixing_plan(
    x: Tensor,
    mixer: FeatureMixer,
    options: Options,
    norm_first: bool,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> MixingPlan:
    """The same of ``feature_mixing_forward``."""
    return MixingPlan(x, mixer, options, norm_first)


def time_mixing_forward(
    x: Tensor,
    mixer: TimeMixer,
    options: Options,
    norm_first: bool,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y``, contiguous, of ``x [B, S, C]``, mixed along S, and z ``[B, S, C]`` in float32 if kept."""
    z = torch.empty(x.shape, dtype=torch.float32, device="cpu") if keep_z else None
    return MixingPlan(x, mixer, options, norm_first).run(x, z), z


def feature_mixing_forward(
    x: Tensor,
    mixer: FeatureMixer,
    options: Options,
    norm_first: bool,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y [B, S, O]``, contiguous, of ``x [B, S, C]``, mixed along C, and if kept z ``[B, S, H]`` and what a last norm
    takes, ``[B, S, O]``, in float32."""
    widths = mixer.w_in.shape[0], None if norm_first else mixer.w_out.shape[0]
    z, v = (
        torch.empty(*x.shape[:2], width, dtype=torch.float32, device="cpu") if keep_z and width is not None else None
        for width in widths
    )
    return MixingPlan(x, mixer, options, norm_first).run(x, z, v), z, v


def tsmixer_layer_plan(
    x: Tensor,
    time: TimeMixer,
    features: FeatureMixer,
    options: Options,
    eps2: float,
    norm_first: bool,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> LayerPlan:
    """The same of ``tsmixer_layer_forward``."""
    return LayerPlan(x, (time, features), options, eps2, norm_first)


def tsmixer_layer_forward(
    x: Tensor,
    time: TimeMixer,
    features: FeatureMixer,
    options: Options,
    eps2: float,
    norm_first: bool,
    keep_z: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``y [B, S, O]``, contiguous, of ``x [B, S, C]``, and if kept u and what both mixers keep."""
    first, second = halves_of_layer(options, eps2)
    u, z = time_mixing_forward(x, time, first, norm_first, keep_z)
    y, *kept = feature_mixing_forward(u, features, second, norm_first, keep_z)
    return y, u if keep_z else None, z, *kept


def time_mixing_backward(
    dy: Tensor,
    z: Tensor | None,
    x: Tensor,
    mixer: TimeMixer,
    options: Options,
    wanted: Sequence[bool],
    norm_first: bool,
) -> list[Tensor | None]:
    """Gradients of x and the four parameters in order from ``dy``; what is None is computed again from x."""
    return _backward(dy, (z, None), x, mixer, options, wanted, norm_first)


def feature_mixing_backward(
    dy: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    mixer: FeatureMixer,
    options: Options,
    wanted: Sequence[bool],
    norm_first: bool,
) -> list[Tensor | None]:
    """Gradients of x and the eight parameters in order from ``dy``; what is None is computed again from x."""
    return _backward(dy, kept, x, mixer, options, wanted, norm_first)


def _backward(dy, kept, x, mixer, options, wanted, norm_first) -> list[Tensor | None]:
    dx, *gradients = [
        torch.empty(t.shape, dtype=torch.float32, device="cpu") if t is x or (want and t is not None) else None
        for want, t in zip(wanted, (x, *mixer), strict=True)
    ]
    taken, dense_x, dense_dy = in_float32(mixer), dense(x), dense(dy)
    loaded().tsmixer_backward(
        instruction_set(), address(dense_dy), address(dense_x), _form_of(x, mixer, options, norm_first),
        _addresses(taken), *map(address, kept), address(dx), _addresses(gradients), torch.get_num_threads(),
    )  # fmt: skip
    return [dx if wanted[0] else None, *gradients]


def _shape_of(x: Tensor, mixer: Mixer) -> tuple[int, ...]:
    return (*x.shape[:2], mixer.w_out.shape[0]) if isinstance(mixer, FeatureMixer) else tuple(x.shape)


def _form_of(x: Tensor, mixer: Mixer, options: Options, norm_first: bool) -> tuple:
    is_features = isinstance(mixer, FeatureMixer)
    hidden = mixer.w_in.shape[0] if is_features else x.shape[1]
    activation = _ACTIVATIONS.index("tanh" if options.tanh else options.activation)
    return (
        *x.shape, hidden, _shape_of(x, mixer)[2], is_features, norm_first, options.norm == "affine", activation,
        options.eps, options.dropout_p, address(options.seed),
    )  # fmt: skip


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Those that time mixing lacks are absent."""
    return tuple(map(address, tensors)) + (0,) * (_PARAMETERS - len(tensors))
