"""An operator of this package, its fake, its backward and its gradient, from one declaration.

``torch.library.define`` rather than ``custom_op``: a call costs a third. Backward operators take and return tensors
rather than lists of them: PyTorch then calls them once for each element under ``is_grads_batched`` and ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends

_defined: set[str] = set()  # by this import of the module: what an earlier one has defined stays


@dataclass
class Operator:
    """``name(inputs, options) -> (result, *kept)`` and ``name_backward(dy, *kept, inputs, options, wanted)``."""

    name: str  # <name>_forward is the function of a backend that computes it
    inputs: str  # schema of the tensors that have gradients, x first
    options: str  # schema of the rest; "str backend" among them
    fake: Callable[..., Sequence[Tensor | None]]  # (*inputs, **options) -> result, *kept: new tensors of their shapes
    _: KW_ONLY
    forward: Callable[..., Any] | None = None  # (backend, *inputs, **options), in place of the backend's function
    kept: int = 0  # how many tensors the backward pass takes of the forward pass; an empty tensor stands for None
    backward: Callable[..., Sequence[Tensor | None]] | None = None  # (kernels, dy, x, *kept, *parameters, **options)
    kernels: str = "backward_kernels"  # the function of a backend that gives the kernels
    forward_only: Sequence[str] = ()  # the options that the backward pass does not take

    def define(self) -> tuple[Callable, Callable]:
        """The operator and its backward, which raises where there is none."""
        self.count = len(self.inputs.split(", "))
        schemas = {option.partition("=")[0].split()[-1]: option for option in self.options.split(", ")}
        self.names = tuple(schemas)
        self.backward_names = tuple(name for name in schemas if name not in self.forward_only)
        results = ", ".join(["Tensor"] * (1 + self.kept))
        call = _define(self.name, f"({self.inputs}, {self.options}) -> ({results})", self._forward, self._forward_fake)
        if self.backward is None:
            _differentiate(self.name, _no_gradient)
            return call, _no_gradient
        options = ", ".join(schemas[name].partition("=")[0] for name in self.backward_names)
        kept = "".join(f"Tensor kept{i}, " for i in range(self.kept))
        gradients = ", ".join(["Tensor"] * self.count)
        schema = f"(Tensor dy, {kept}{self.inputs}, {options}, bool[] wanted) -> ({gradients})"
        self.call_backward = _define(f"{self.name}_backward", schema, self._backward, self._backward_fake)
        _differentiate(self.name, self._differentiate, self._save)
        _differentiate(f"{self.name}_backward", _no_gradient)
        return call, self.call_backward

    def _forward(self, *arguments: Any) -> Any:
        inputs, options = self._split(arguments)
        backend = backends.load(options.pop("backend"))
        if self.forward is not None:
            results = self.forward(backend, *inputs, **options)
        else:
            results = getattr(backend, f"{self.name}_forward")(*inputs, **options)
        return self._without_none(results if self.kept else (results,), inputs[0])

    def _forward_fake(self, *arguments: Any) -> Any:
        inputs, options = self._split(arguments)
        return self._without_none(self.fake(*inputs, **options), inputs[0])

    def _backward(self, dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        kept, arguments = arguments[: self.kept], arguments[self.kept :]
        (x, *parameters), options = self._split(arguments[:-1], self.backward_names)
        kernels = getattr(backends.load(options.pop("backend")), self.kernels)(options["dtype"])
        kept = (None if t.numel() == 0 else t for t in kept)
        gradients = self.backward(kernels, dy, x, *kept, *parameters, **options, wanted=arguments[-1])
        return tuple(_absent(x) if gradient is None else gradient.contiguous() for gradient in gradients)

    def _backward_fake(self, dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, wanted = arguments[self.kept : self.kept + self.count], arguments[-1]
        return tuple(new_like(t) if want else _absent(dy) for t, want in zip(inputs, wanted, strict=True))

    def _save(self, ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, options = self._split(inputs)
        kept = output[1:] if self.kept else ()
        ctx.save_for_backward(*kept, *tensors, options.get("seed"))
        ctx.options = {name: None if name == "seed" else options[name] for name in self.backward_names}
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        not_inputs = (None,) * len(self.names)
        if dy is None:
            return (None,) * self.count + not_inputs
        *tensors, seed = ctx.saved_tensors
        kept, inputs = tensors[: self.kept], tensors[self.kept :]
        options = ctx.options if seed is None else {**ctx.options, "seed": seed}
        wanted = ctx.needs_input_grad[: self.count]
        gradients = self.call_backward(dy, *kept, *inputs, *options.values(), wanted)
        return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *not_inputs

    def _split(self, arguments: Sequence[Any], names: Iterable[str] | None = None) -> tuple[Sequence, dict[str, Any]]:
        """The inputs and the options by name. PyTorch leaves out the last ones where they have their default."""
        return arguments[: self.count], dict(zip(names or self.names, arguments[self.count :], strict=False))

    def _without_none(self, results: Iterable[Tensor | None], x: Tensor) -> Tensor | tuple[Tensor, ...]:
        results = tuple(_absent(x) if result is None else result for result in results)
        return results if self.kept else results[0]


def new_like(x: Tensor) -> Tensor:
    """A new contiguous tensor of ``x``'s shape."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _define(name: str, schema: str, implementation: Callable, fake: Callable) -> Callable:
    """PyTorch registers a name once, for as long as the process lives, and models may hold the operator when this
    package is removed from ``sys.modules`` and imported again: one that is there stays."""
    qualified = f"mixer_kernels::{name}"
    if hasattr(torch.ops.mixer_kernels, name):
        _defined.discard(name)
    else:
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "default", implementation)
        torch.library.register_fake(qualified, fake)
        _defined.add(name)
    operator = getattr(torch.ops.mixer_kernels, name).default
    if operator._schema != torch._C.parse_schema(qualified + schema):
        raise ImportError(f"{qualified} was registered with another schema by another version: start Python anew")
    return operator


def _differentiate(name: str, gradient: Callable, save: Callable | None = None) -> None:
    if name in _defined:
        torch.library.register_autograd(f"mixer_kernels::{name}", gradient, setup_context=save)


def _no_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the fused mixer operators have no gradient here (a second derivative, or mixer_block called as an operator): "
        "use backend='torch', which autograd differentiates any number of times"
    )


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0)
