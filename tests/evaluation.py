"""A function of the functional API on x and its parameters: results by name, beside eager's, by the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from accuracy import assert_all_accurate, reference
from test_kernels import on_target
from torch import Tensor

Parameters = Mapping[str, Tensor | None]
Results = dict[str, Tensor]


def evaluate(
    function: Callable[..., Tensor],
    x: Tensor,
    parameters: Parameters,
    dy: Tensor | None = None,
    frozen: Collection[str] = (),
    **options: Any,
) -> Results:
    """The output, and with ``dy`` the gradients of x and of every parameter that is there and not ``frozen``."""
    trains = dy is not None
    leaves = {
        name: None if t is None else t.detach().requires_grad_(trains and name not in frozen)
        for name, t in {"x": x, **parameters}.items()
    }
    y = function(*leaves.values(), **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(y, [*wanted.values()], dy) if wanted else ()
    return {"output": y.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)
    }


def wide(parameters: Parameters) -> dict[str, Tensor | None]:
    """In float64."""
    return {name: None if t is None else t.double() for name, t in parameters.items()}


def assert_matches_eager(
    run: Callable[..., Results],
    x: Tensor,
    parameters: Parameters,
    backend: str = "triton",
    target: str = "sm_80",
    besides: Mapping[str, Any] | None = None,
    backward: bool = True,
    **options: Any,
) -> None:
    """``run(x, parameters, backend, dy, **options)`` on a backend, there with ``besides`` too, on the torch backend and
    in float64."""
    dy = wide_dy = None
    if backward:
        outputs = run(x, parameters, "torch", **options)["output"]
        dy = torch.randn(outputs.shape, device=x.device).to(outputs.dtype)
        wide_dy = dy.double()
    with on_target(target, x.device.type):
        actual = run(x, parameters, backend, dy, **options, **besides or {})
    eager = run(x, parameters, "torch", dy, **options)
    exact = reference(lambda: run(x.double(), wide(parameters), "torch", wide_dy, **options), x.dtype)
    assert_all_accurate(actual, eager, exact)
