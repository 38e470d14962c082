"""SwiGLU on tiles and its derivatives, equations (22) and (23) of docs/maths.md."""

import triton
import triton.language as tl


@triton.jit
def swiglu(value, gate):
    """value * SiLU(gate), all float32."""
    return value * gate / (1.0 + tl.exp(-gate))


@triton.jit
def swiglu_and_slopes(value, gate):
    """value * SiLU(gate), and its derivatives by value and by gate."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return value * silu, silu, value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
