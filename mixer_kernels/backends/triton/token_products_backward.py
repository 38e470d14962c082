"""Token mixing backward over any number of tokens: the product that has an epilogue, equations (14) and (15).

The path for more than 256 tokens; z ``[B, D_S, C]`` was recomputed by ``token_products``::

    da[b] = W2' . g[b]                     [D_S, C]
    dz[b] = da[b] * GELU'(z[b])            written over z, with a[b] = GELU(z[b]) beside it

dn[b] = W1' . dz[b] is a plain product: PyTorch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tuning.configs import token_gelu_backward_config
from ...tuning.target import target_of
from ..arguments import Half, Norm, Options
from ..rounding import cdiv
from .activation import activation_of
from .launch import launch, needs_int64
from .noise import kept_hidden, noise_arguments
from .pack import Packing
from .prepack import first_token_weights, transposed_weight
from .token_products import padded_sizes, token_hidden


@triton.jit
def _token_gelu_bwd_kernel(
    w_ptr,  # [D_PAD, S_PAD], zero-padded: W2'
    g_ptr,  # [B, S, C] contiguous
    z_ptr,  # [B, D_S, C] contiguous; GLU: [B, 2 * D_S, C], values and gates
    a_ptr,  # [B, D_S, C] contiguous
    dz_ptr,  # contiguous, like z
    S,
    C,
    D_S,
    S_PAD,
    noise,  # noise.noise_arguments
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SLOPE: tl.constexpr,
    GLU: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr,
    INT64: tl.constexpr,
):
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    d_tiles = tl.cdiv(D_S, BLOCK_M)
    c_tiles = tl.cdiv(C, BLOCK_C)
    offs_d = (tl.program_id(0) % d_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = (tl.program_id(0) // d_tiles % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = (tl.program_id(0) // d_tiles // c_tiles).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    w_tile_ptr = w_ptr + offs_d[:, None] * S_PAD + offs_k[None, :]
    if INT64:
        offs_d = offs_d.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    g_ptr += image * S * C

    da = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k0 in tl.range(0, S, BLOCK_K, num_stages=STAGES):
        mask = (k0 + offs_k < S)[:, None] & (offs_c < C)[None, :]
        g = tl.load(g_ptr + (k0 + offs_k)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        da = tl.dot(tl.load(w_tile_ptr + k0), g, da, input_precision=PRECISION)

    mask = (offs_d < D_S)[:, None] & (offs_c < C)[None, :]
    offs = image * D_S * C + offs_d[:, None] * C + offs_c[None, :]
    if GLU:
        offs_z = offs + image * D_S * C
        offs_gate = offs_z + D_S * C
        a, slope, gate_slope = SLOPE(
            tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(tl.float32),
            tl.load(z_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32),
        )
    else:
        a, slope = SLOPE(tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    if DROPOUT:
        kept = kept_hidden(noise, offs_d[:, None], offs_c[None, :], image)
        a *= kept
        da *= kept
    tl.store(a_ptr + offs, a.to(DTYPE), mask=mask)
    if GLU:
        tl.store(dz_ptr + offs_z, (da * slope).to(DTYPE), mask=mask)
        tl.store(dz_ptr + offs_gate, (da * gate_slope).to(DTYPE), mask=mask)
    else:
        tl.store(dz_ptr + offs, (da * slope).to(DTYPE), mask=mask)


def token_gradients_by_products(
    g: Tensor, x: Tensor, norm: Norm, half: Half, options: Options
) -> tuple[Tensor, Tensor]:
    """``a [B, D_S, C]`` and dz ``[B, rows of w1, C]`` from ``g [B, S, C]``, any S; z is recomputed."""
    (batch_size, tokens, channels), hidden = g.shape, half.w_out.shape[1]
    packing = Packing(options.dtype)
    sizes = padded_sizes(tokens, hidden, x.device, options.without_noise())
    weights = first_token_weights(packing, half, *sizes)
    w2 = transposed_weight(packing, "w2", half.w_out)
    packing.run()
    z = token_hidden(x, norm, *weights, hidden, options)
    config = token_gelu_backward_config(target_of(g.device), options.dtype, options.exact, glu=options.glu)
    a = torch.empty(batch_size, hidden, channels, dtype=z.dtype, device=z.device)
    launch(
        _token_gelu_bwd_kernel, batch_size * cdiv(hidden, config.block_m) * cdiv(channels, config.block_n),
        w2, g, z, a, z, tokens, channels, hidden, w2.shape[1],
        **noise_arguments(options), **config.launch_options("MCK"), STAGES=config.num_stages,
        SLOPE=activation_of(options).and_slope, GLU=options.glu, PRECISION=options.precision,
        INT64=needs_int64((max(tokens, hidden), channels), (channels, 1)),
    )  # fmt: skip
    return a, z
