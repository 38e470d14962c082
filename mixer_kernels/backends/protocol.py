"""What a backend is: a module with these functions, of which it may lack those of features that it does not have.

``torch`` has the forward functions alone, each of which returns its first result alone: autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .arguments import (
    AffineLinear,
    FeatureMixer,
    GatedHalf,
    GatedMixingGradients,
    Half,
    Norm,
    NormGradients,
    Options,
    Parts,
    SpatialGate,
    TimeMixer,
)


class Backend(Protocol):
    """Forward functions return new contiguous tensors; of an empty x empty ones. A float32 ``rows`` is B * S."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why products in ``dtype`` cannot run on ``device``, or None."""

    def has(self, feature: str) -> bool:
        """Whether there are kernels for ``feature``: an operator's name, the same with " in training" behind it (with
        gradients or noise), "activation='swiglu'", "norm='affine'", "gate='sigmoid'"."""

    # ------------------------------------------------------------------------------------------------------- forward

    def token_mixing_forward(self, x: Tensor, half: Half, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        """``u [B, S, C]`` and mean and rstd ``[rows]`` of ``x [B, S, C]``."""

    def channel_mixing_forward(
        self, x: Tensor, half: Half, options: Options, keep_z: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``y [B, S, C]``, mean and rstd ``[rows]``, None for the affine norm, and z if kept, ``[rows, D_C]``, with
        SwiGLU ``[rows, 2, D_C]``."""

    def mixer_block_forward(self, x: Tensor, tokens: Half, channels: Half, options: Options, eps2: float) -> Tensor:
        """``y [B, S, C]`` of a whole block without noise; ``eps2`` is the second norm's eps."""

    def token_linear_forward(self, x: Tensor, linear: AffineLinear, options: Options) -> Tensor:
        """``u [B, S, C]`` from ``x [B, S, C]``, ``w [S, S]``."""

    def spatial_gating_forward(self, x: Tensor, gate: SpatialGate, options: Options) -> Tensor:
        """``s [B, S, C]`` from ``x [B, S, 2 * C]``, ``w [S, S]``."""

    def gated_channel_mixing_forward(
        self, x: Tensor, half: Half, gate: SpatialGate, options: Options, gate_eps: float, keep_z: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``y [B, S, C]``, mean and rstd ``[rows]``, and z ``[rows, F]`` if kept."""

    def gated_mixing_forward(self, x: Tensor, half: GatedHalf, options: Options, axis: int, gate_first: bool) -> Tensor:
        """``y`` of ``x [B, channels, patches, features]``, mixed along ``axis``: 1, 2 or 3."""

    def gated_mixer_layer_forward(
        self,
        x: Tensor,
        patches: GatedHalf,
        features: GatedHalf,
        options: Options,
        eps2: float,
        keep_u: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``y`` of ``x [B, channels, patches, features]``, and u, what the patches' mixer gives, if kept."""

    def time_mixing_forward(
        self, x: Tensor, mixer: TimeMixer, options: Options, norm_first: bool, keep_z: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``y`` of ``x [B, S, C]``, mixed along S, and z ``[B, S, C]`` in float32 if kept."""

    def feature_mixing_forward(
        self, x: Tensor, mixer: FeatureMixer, options: Options, norm_first: bool, keep_z: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``y [B, S, O]`` of ``x [B, S, C]``, mixed along C, and if kept z ``[B, S, H]`` and, where the norm is last,
        what it takes, ``[B, S, O]``, in float32."""

    def tsmixer_layer_forward(
        self,
        x: Tensor,
        time: TimeMixer,
        features: FeatureMixer,
        options: Options,
        eps2: float,
        norm_first: bool,
        keep_z: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``y [B, S, O]`` of ``x [B, S, C]``, and if kept u, what mixes features takes, and what both mixers keep."""

    # ------------------------------------------------------------------------------------------------ backward: Mixer
    # Kernels take ``norm`` and ``weights`` as the two functions here make them: all packs of a half at once.

    def token_backward_weights(
        self, x: Tensor, g: Tensor, norm: Norm, half: Half, options: Options
    ) -> tuple[Tensor, Norm, Any]:
        """w1 for the plain product, the norm, and what token_products_backward takes, to be held until the last kernel
        that takes the norm."""

    def channel_backward_weights(
        self, u: Tensor, z: Tensor | None, norm: Norm, half: Half, options: Options, want_n: bool
    ) -> tuple[Tensor, Norm, Any]:
        """w3 for the plain product, the norm, and what channel_products_backward takes, to be held as above."""

    def branch_gradient(self, dy: Tensor, options: Options) -> Tensor:
        """The gradient of the branch in the dtype of the products; ``dy`` itself where it is just that."""

    def token_products_backward(
        self, g: Tensor, x: Tensor, norm: Norm, weights: Any, options: Options, want_a: bool, want_dz: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``dn [B, S, C]``, or None where it is w1' . dz; a ``[B, D_S, C]`` and dz, with SwiGLU ``[B, 2 * D_S, C]``,
        rows padded or not."""

    def weight_gradient(
        self, left: Tensor, right: Tensor, norm: Norm | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """A weight's and its bias's gradient, float32: ``(dW1 [D_S, S], db1 [D_S])`` from ``left`` dz, ``right`` x and
        ``norm``; ``(dW2' [D_S, S], db2 [S])`` from ``left`` a, ``right`` g and no ``norm``."""

    def token_weight_gradients(
        self, dz: Tensor | None, n: Tensor | None, a: Tensor | None, g: Tensor, options: Options
    ) -> tuple[Tensor | Parts | None, Tensor | Parts | None, Tensor | Parts | None, Tensor | Parts | None]:
        """In place of it in ``token_mixing``, of a backend that has "token_weight_gradients": dW1 and db1 from dz and
        ``n [B, S, C]``, db1 alone without n; ``dW2 [S, D_S]`` and db2 from a and g. None where an operand is None."""

    def channel_products_backward(
        self, g: Tensor, u: Tensor, z: Tensor | None, norm: Norm, weights: Any, options: Options, want_a: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | Parts]:
        """``(dz [rows, rows of w3], a [rows, D_C] or None, db3 in float32)``; ``z`` None: recompute it."""

    def norm_backward(
        self,
        x: Tensor,
        dn: Tensor,
        dy: Tensor | None,
        norm: Norm,
        n_dtype: torch.dtype | None = None,
        dx: Tensor | None = None,
    ) -> NormGradients:
        """``dx = dy + LayerNorm'(dn)``, the parameters' gradients, and n in ``n_dtype`` if one is given. ``dx``, if
        given, is where it goes: contiguous but for its rows' stride."""

    def sum_parts(self, sums: Sequence[Parts], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """What the functions here give as ``Parts``, of a backend that does: each added, in its dtype."""

    # -------------------------------------------------------------------------------------------- backward: relatives

    def row_statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and rstd ``[rows]`` of ``x [B, S, C]``."""

    def channel_hidden(self, x: Tensor, norm: Norm, half: Half, options: Options) -> Tensor:
        """z ``[rows, D_C]``, recomputed."""

    def hidden_gelu(self, z: Tensor, tokens: int, options: Options) -> Tensor:
        """``a [rows, F]`` with dropout, contiguous, from z, of whose rows ``tokens`` are an image's."""

    def hidden_gelu_backward(
        self, da: Tensor, z: Tensor, tokens: int, options: Options
    ) -> tuple[Tensor, Tensor | Parts]:
        """``dz [rows, F]``, contiguous, and its column sums ``[F]`` in float32."""

    def token_linear_data_gradient(
        self, du: Tensor, x: Tensor, w: Tensor, factor: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dx = du + factor * v`` for ``v = w' . du``, and the sums ``[C]`` of v * x and of v."""

    def spatial_gate_backward(
        self, ds: Tensor, h: Tensor, norm: Norm, gate: SpatialGate, dh1: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Write the gradient of h1; return the gradient of ``v = w . LN(h2) + b``, and ``h1 * v``, both contiguous."""

    def gated_mixing_gradients(
        self,
        dy: Tensor,
        x: Tensor,
        norm: Norm,
        half: GatedHalf,
        options: Options,
        axis: int,
        gate_first: bool,
        of_weights: bool,
    ) -> GatedMixingGradients:
        """The gradient of n from ``dy``, contiguous, and, ``of_weights``, the operands of the weights' gradients."""

    # In place of those, of a backend that has "gated_mixing_backward" and "gated_mixer_layer_backward": as one call.

    def gated_mixing_backward(
        self,
        dy: Tensor,
        x: Tensor,
        half: GatedHalf,
        options: Options,
        wanted: Sequence[bool],
        axis: int,
        gate_first: bool,
    ) -> Sequence[Tensor | None]:
        """Gradients of x and the eight parameters."""

    def gated_mixer_layer_backward(
        self,
        dy: Tensor,
        u: Tensor | None,
        x: Tensor,
        patches: GatedHalf,
        features: GatedHalf,
        options: Options,
        wanted: Sequence[bool],
        eps2: float,
    ) -> Sequence[Tensor | None]:
        """Gradients of x and the parameters of both mixers; ``u`` None: recompute it."""

    # ---------------------------------------------------------------------------------------------- backward: TSMixer

    def time_mixing_backward(
        self,
        dy: Tensor,
        z: Tensor | None,
        x: Tensor,
        mixer: TimeMixer,
        options: Options,
        wanted: Sequence[bool],
        norm_first: bool,
    ) -> Sequence[Tensor | None]:
        """Gradients of x and the four parameters from ``dy``, contiguous; ``z`` None: recompute it."""

    def feature_mixing_backward(
        self,
        dy: Tensor,
        kept: tuple[Tensor | None, Tensor | None],
        x: Tensor,
        mixer: FeatureMixer,
        options: Options,
        wanted: Sequence[bool],
        norm_first: bool,
    ) -> Sequence[Tensor | None]:
        """Gradients of x and the eight parameters from ``dy``, contiguous; what is None of ``kept`` is recomputed."""
