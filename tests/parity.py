"""A model before, while and after it is fused: outputs and gradients by the accuracy rule, and back to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, assert_accurate, reference
from torch import Tensor, nn

from mixer_kernels import Report, fuse_, unfuse_


def run(model: nn.Module, x: Tensor, output: Callable = lambda y: y) -> list[Tensor]:
    """Output and the gradients of x and of all parameters that have one, for the same upstream gradient every time."""
    x = x.detach().requires_grad_()
    y = output(model(x))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(y, [x, *parameters], upstream, allow_unused=True)
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


def check_fused(model: nn.Module, x: Tensor, output: Callable = lambda y: y, **options) -> Report:
    """Fuse ``model`` and unfuse it; ``output`` picks the tensor out of what it returns. Returns fuse_'s report."""
    model.to(x.device, x.dtype).eval()
    eager = run(model, x, output)
    wide = copy.deepcopy(model).double()
    exact = reference(lambda: run(wide, x.double(), output), x.dtype)
    report = fuse_(model, **options)
    fused = run(model, x, output)
    assert_accurate(fused[0], eager[0], exact[0], FORWARD_FACTOR)
    for i, gradients in enumerate(zip(fused[1:], eager[1:], exact[1:], strict=True)):
        assert_accurate(*gradients, GRADIENT_FACTOR, f"gradient {i}")
    with torch.no_grad():
        assert_accurate(output(model(x)), eager[0], exact[0], FORWARD_FACTOR, "inference")
    assert len(unfuse_(model)) == len(report)
    assert all(torch.equal(before, after) for before, after in zip(eager, run(model, x, output), strict=True))
    return report
