"""Activations as values: kernels take a function of a tile, and the function that gives its derivative with it.

To add one: its two functions and a line of ``ACTIVATIONS``. Of z a plain one gives a, and (a, slope); one of the GLU
family gives a of values and gates, and (a, slope by the value, slope by the gate). All in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..arguments import Options
from .gelu import gelu_erf, gelu_erf_and_slope, gelu_fit, gelu_fit_and_slope, gelu_tanh, gelu_tanh_and_slope


class Activation(NamedTuple):
    """Constants of kernels, ``ACT`` and ``SLOPE``."""

    function: triton.JITFunction
    and_slope: triton.JITFunction


def activation_of(options: Options) -> Activation:
    """The activation, for the dtype of the products: float32's GELU is exact."""
    if options.activation != "gelu":
        return ACTIVATIONS[options.activation]
    if options.tanh:
        return Activation(gelu_tanh, gelu_tanh_and_slope)
    exact = options.dtype is torch.float32
    return Activation(gelu_erf, gelu_erf_and_slope) if exact else Activation(gelu_fit, gelu_fit_and_slope)


@triton.jit
def relu(z):
    return tl.where(z <= 0, 0.0, z)  # NaN stays


@triton.jit
def relu_and_slope(z):
    return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)


@triton.jit
def silu(z):  # by exp2, as GELU
    return z / (1.0 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def silu_and_slope(z):
    sigmoid = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))
    return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def swiglu(value, gate):
    """value * SiLU(gate), equation (22) of docs/maths.md."""
    return value * gate / (1.0 + tl.exp2(-1.4426950408889634 * gate))


@triton.jit
def swiglu_and_slopes(value, gate):
    """The same, and its derivatives by value and by gate, equation (23)."""
    sigmoid = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * gate))
    silu = gate * sigmoid
    return value * silu, silu, value * sigmoid * (1.0 + gate * (1.0 - sigmoid))


ACTIVATIONS = {  # beside the forms of GELU
    "relu": Activation(relu, relu_and_slope),
    "silu": Activation(silu, silu_and_slope),
    "swiglu": Activation(swiglu, swiglu_and_slopes),
}
