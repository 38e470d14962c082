"""The torch.library operators ``mixer_kernels::{token_mixing, channel_mixing, mixer_block}``.

One operator per call of the functional API, so that ``torch.compile`` and ``torch.export`` see one node whatever the
backend does inside. Operators take tensors that ``functional`` has checked, the dtype of the products and the name of
the backend; they return a new contiguous tensor. ``Library.define`` rather than ``custom_op``: a call costs a third.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends

_library = torch.library.Library("mixer_kernels", "DEF")

_HALF = "Tensor? gamma, Tensor? beta, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"
_OPTIONS = "float eps, str approximate, ScalarType dtype, str backend"


def _define(name: str, schema: str, implementation) -> None:
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixer_kernels::{name}", _fake, lib=_library)
    torch.library.register_autograd(f"mixer_kernels::{name}", _backward, lib=_library)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(ctx, *_: Tensor):
    raise RuntimeError(
        "the fused mixer operators have no backward pass yet: train with backend='torch' "
        "(which backend='auto' chooses when a gradient is needed)"
    )


def _token_mixing(x, gamma, beta, w1, b1, w2, b2, eps, approximate, dtype, backend):
    run = backends.load(backend).token_mixing_forward
    return run(x, gamma, beta, w1, b1, w2, b2, eps=eps, approximate=approximate, dtype=dtype).contiguous()


def _channel_mixing(u, gamma, beta, w3, b3, w4, b4, eps, approximate, dtype, backend):
    run = backends.load(backend).channel_mixing_forward
    return run(u, gamma, beta, w3, b3, w4, b4, eps=eps, approximate=approximate, dtype=dtype).contiguous()


def _mixer_block(
    x, gamma1, beta1, w1, b1, w2, b2, gamma2, beta2, w3, b3, w4, b4, eps1, eps2, approximate, dtype, backend
):
    u = _token_mixing(x, gamma1, beta1, w1, b1, w2, b2, eps1, approximate, dtype, backend)
    return _channel_mixing(u, gamma2, beta2, w3, b3, w4, b4, eps2, approximate, dtype, backend)


_define("token_mixing", f"(Tensor x, {_HALF}, {_OPTIONS}) -> Tensor", _token_mixing)
_define("channel_mixing", f"(Tensor u, {_HALF}, {_OPTIONS}) -> Tensor", _channel_mixing)
_define(
    "mixer_block",
    "(Tensor x, Tensor? gamma1, Tensor? beta1, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2,"
    " Tensor? gamma2, Tensor? beta2, Tensor w3, Tensor? b3, Tensor w4, Tensor? b4,"
    " float eps1, float eps2, str approximate, ScalarType dtype, str backend) -> Tensor",
    _mixer_block,
)

token_mixing = torch.ops.mixer_kernels.token_mixing.default
channel_mixing = torch.ops.mixer_kernels.channel_mixing.default
mixer_block = torch.ops.mixer_kernels.mixer_block.default
