"""What every backend takes and gives: parameters as one object, options as another.

The fields of the parameters and of ``Options`` are the operators' inputs, in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Half(NamedTuple):
    """Norm and MLP of a half of a block. ``w_in, b_in, w_out, b_out`` are w1, b1, w2, b2 or w3, b3, w4, b4."""

    gamma: Tensor | None
    beta: Tensor | None
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None


class GatedHalf(NamedTuple):
    """The same of a PatchTSMixer, and its gate."""

    gamma: Tensor | None
    beta: Tensor | None
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None


class SpatialGate(NamedTuple):
    """Norm and linear layer of gMLP's spatial gating unit."""

    gamma: Tensor | None
    beta: Tensor | None
    w: Tensor
    b: Tensor | None


class AffineLinear(NamedTuple):
    """Affine map, linear layer and LayerScale: the token half of a ResMLP block."""

    alpha: Tensor | None
    beta: Tensor | None
    w: Tensor
    b: Tensor | None
    scale: Tensor | None


class TimeMixer(NamedTuple):
    """Norm and linear layer of TSMixer's time mixing."""

    gamma: Tensor | None  # [S, C], as in the other one
    beta: Tensor | None
    w: Tensor
    b: Tensor | None


class FeatureMixer(NamedTuple):
    """Norm, MLP and projected residual of TSMixer's feature mixing."""

    gamma: Tensor | None
    beta: Tensor | None
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    w_skip: Tensor | None
    b_skip: Tensor | None


class Norm(NamedTuple):
    """LayerNorm on rows whose statistics are known; without statistics the affine map alone."""

    mean: Tensor | None = None  # [rows] float32
    rstd: Tensor | None = None  # [rows] float32
    gamma: Tensor | None = None
    beta: Tensor | None = None


class Options(NamedTuple):
    """How a half is computed. All but ``precision`` are inputs of every operator."""

    dtype: torch.dtype = torch.float32  # of the products
    eps: float = 1e-6
    activation: str = "gelu"
    approximate: str = "none"  # the form of GELU
    norm: str = "layer"
    gate: str = "softmax"  # of a GatedHalf
    dropout_p: float = 0.0
    drop_path_p: float = 0.0
    seed: Tensor | None = None  # int64, one to a half, on the device of x; None without noise
    precision: str = "ieee"  # of float32 products: tl.dot's input_precision

    @property
    def inputs(self) -> tuple:
        """What an operator takes."""
        return self[:-1]

    @property
    def noise(self) -> bool:
        """Whether there is dropout or stochastic depth: the branch's gradient differs from the output's."""
        return self.dropout_p > 0 or self.drop_path_p > 0

    @property
    def glu(self) -> bool:
        """Whether the activation is of the GLU family: ``w_in`` has values and gates, twice the rows, and so has z."""
        return self.activation == "swiglu"

    @property
    def tanh(self) -> bool:
        return self.approximate == "tanh"

    @property
    def exact(self) -> bool:
        """Whether float32 products are IEEE's."""
        return self.precision == "ieee"

    def without_noise(self) -> Options:
        return self._replace(dropout_p=0.0, drop_path_p=0.0, seed=None)


def precision_of(dtype: torch.dtype) -> str:
    """What products in ``dtype`` run in right now: float32's follow ``torch.get_float32_matmul_precision()``."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


class Parts(NamedTuple):
    """A sum that is still to be added: over the first axis. ``differentiate`` has a half's added at once."""

    parts: Tensor  # [any number, *shape of the sum] float32, contiguous but for the first axis


class NormGradients(NamedTuple):
    """What a LayerNorm backward kernel returns; sums in float32."""

    dx: Tensor  # [B, S, C]
    n: Tensor | None  # [B, S, C]
    dgamma: Tensor | Parts  # [C]
    dbeta: Tensor | Parts  # [C]
    dy_sum: Tensor | Parts  # [C]


class GatedMixingGradients(NamedTuple):
    """Of ``gated_mixing``: the gradient of n, operands of the weights' gradients by rows, those of the biases.

    The operands and ``b1, b2`` are None if no parameter of the MLP or the gate has a gradient; those of the gate if
    there is none.
    """

    n: Tensor  # in the shape of x
    v: Tensor | None  # [rows, K] fc1's input
    a: Tensor | None  # [rows, H] fc2's input
    z: Tensor | None  # [rows, H] the gradient of fc1's output
    out: Tensor | None  # [rows, K] the gradient of fc2's output
    gated: Tensor | None  # [rows, K] the gate's input
    logits: Tensor | None  # [rows, K] the gradient of the gate's logits
    b1: Tensor | Parts | None  # [H] float32
    b2: Tensor | Parts | None  # [K] float32
    b_gate: Tensor | Parts | None  # [K] float32
