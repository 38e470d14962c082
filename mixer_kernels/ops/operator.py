"""An operator of this package, its fake, its backward and its gradient, from one declaration.

``torch.library.define`` rather than ``custom_op``: a call costs a third. Backward operators take and return tensors
rather than lists of them: PyTorch then calls them once for each element under ``is_grads_batched`` and ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import backends
from ..backends.arguments import Options, precision_of
from ..backends.backward import Pass, differentiate
from ..backends.new_tensors import new_like
from .packs import NewPacks, packs_of

# That of this package, wherever it is: two copies of it, from the kernel hub, have each their own.
NAMESPACE = __package__.rpartition(".")[0].replace(".", "_")
_defined: set[str] = set()  # by this import of the module: what an earlier one has defined stays

_OPTIONS = (
    "ScalarType dtype, float eps, str activation, str approximate, str norm, str gate, float dropout_p,"
    " float drop_path_p, Tensor? seed, str backend"
)
_SEED = Options._fields.index("seed")
_BACKEND = len(Options().inputs)


@dataclass
class Operator:
    """``name(x, parameters, options, backend, further) -> (result, *kept)`` and
    ``name_backward(dy, *kept, x, parameters, options, backend, further, wanted)``."""

    name: str  # <name>_forward is the function of a backend that computes it
    parameters: Sequence[type]  # named tuples of tensors, whose fields are the inputs behind x
    fake: Callable[..., Sequence[Tensor | None]]  # (x, *parameters, options, **further) -> result, *kept: new tensors
    _: KW_ONLY
    further: str = ""  # schema of what is no option of all operators
    kept: int = 0  # how many tensors the backward pass takes of the forward pass; an empty tensor stands for None
    backward: Callable[..., Sequence[Tensor | None]] | None = None  # as backends.backward.differentiate takes it

    def define(self) -> tuple[Callable, Callable]:
        """The operator and its backward, which raises where there is none."""
        inputs, self.slices = ["Tensor x"], []
        for number, kind in enumerate(self.parameters, start=1):
            self.slices.append(slice(len(inputs), len(inputs) + len(kind._fields)))
            suffix = str(number) if len(self.parameters) > 1 else ""
            hints = get_type_hints(kind)
            inputs += [f"Tensor{'' if hints[field] is Tensor else '?'} {field}{suffix}" for field in kind._fields]
        self.count = len(inputs)
        further = self.further.split(", ") if self.further else []
        self.names = [option.split()[-1] for option in further]
        self.arguments = ", ".join([*inputs, _OPTIONS, *further])
        results = ", ".join(["Tensor"] * (1 + self.kept))
        self._define_packed()
        OPERATORS[self.name] = self
        call = define_operator(self.name, f"({self.arguments}) -> ({results})", self.forward, self._forward_fake)
        if self.backward is None:
            differentiate_operator(self.name, no_gradient)
            return call, no_gradient
        kept = "".join(f"Tensor kept{i}, " for i in range(self.kept))
        gradients = ", ".join(["Tensor"] * self.count)
        schema = f"(Tensor dy, {kept}{self.arguments}, bool[] wanted) -> ({gradients})"
        self.call_backward = define_operator(f"{self.name}_backward", schema, self.backward_of, self._backward_fake)
        differentiate_operator(self.name, self._gradient, self._save)
        differentiate_operator(f"{self.name}_backward", no_gradient)
        return call, self.call_backward

    def _define_packed(self) -> None:
        """``<name>_packed(x, parameters, options, backend, further, packs, names) -> result``: inference on packs that
        were made before. What a call does not find among them, for another layout of x or another dtype, it packs."""
        name, schema = f"{self.name}_packed", f"({self.arguments}, Tensor[] packs, str[] names) -> Tensor"
        self._call_packed = define_operator(name, schema, self._packed, self._packed_fake)
        differentiate_operator(name, no_gradient)

    def packed(self, packs: Mapping[str, Tensor], *arguments: Any) -> Tensor:
        """That operator with those of ``packs`` that are the backend's; into ``NewPacks`` it puts its own."""
        _, _, backend, _ = self.objects(*arguments)
        if isinstance(packs, NewPacks):
            y, made = self._compute_packed({}, *arguments)
            packs.update((f"{backend}/{name}", pack) for name, pack in made.items())
            return y
        own = packs_of(backend, packs)
        return self._call_packed(*arguments, list(own.values()), list(own))

    def _packed(self, *arguments: Any) -> Tensor:
        *arguments, packs, names = arguments
        return self._compute_packed(dict(zip(names, packs, strict=True)), *arguments)[0]

    def _packed_fake(self, *arguments: Any) -> Tensor:
        results = self._forward_fake(*arguments[:-2])
        return results[0] if self.kept else results

    def _compute_packed(self, kept: dict[str, Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        parameters, options, backend, further = self.objects(x, *arguments)
        run = backends.load(backend)
        packing = run.Packing(options.dtype, kept)
        results = getattr(run, f"{self.name}_forward")(x, *parameters, options, **further, packing=packing)
        return results[0] if self.kept else results, packing.made

    def forward(self, x: Tensor, *arguments: Any) -> Any:
        parameters, options, backend, further = self.objects(x, *arguments)
        results = getattr(backends.load(backend), f"{self.name}_forward")(x, *parameters, options, **further)
        return self._without_none(results if self.kept else (results,), x)

    def _forward_fake(self, x: Tensor, *arguments: Any) -> Any:
        parameters, options, _, further = self.objects(x, *arguments)
        return self._without_none(self.fake(x, *parameters, options, **further), x)

    def backward_of(self, dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        kept, (x, *arguments), wanted = arguments[: self.kept], arguments[self.kept : -1], arguments[-1]
        parameters, options, backend, further = self.objects(x, *arguments)
        kept = [None if t.numel() == 0 else t.contiguous() for t in kept]
        given = Pass(backends.load(backend), dy, kept, x, options, wanted)
        gradients = differentiate(self.backward, given, parameters, **further)
        return tuple(_absent(x) if gradient is None else gradient.contiguous() for gradient in gradients)

    def _backward_fake(self, dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, wanted = arguments[self.kept : self.kept + self.count], arguments[-1]
        return tuple(new_like(t) if want else _absent(dy) for t, want in zip(inputs, wanted, strict=True))

    def _save(self, ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.mark_non_differentiable(*self.keep(ctx, inputs, output))

    def keep(self, ctx: Any, inputs: tuple, output: Any) -> tuple[Tensor, ...]:
        """What the backward pass takes, into ``ctx``; returns the results that only it takes."""
        tensors, rest = inputs[: self.count], list(inputs[self.count :])
        kept = output[1:] if self.kept else ()
        saved = (*kept, *tensors, rest[_SEED])
        ctx.save_for_backward(*saved)
        ctx.saved_as = [None if t is None else (t.dtype, t.shape) for t in saved]
        rest[_SEED], ctx.rest = None, rest
        ctx.set_materialize_grads(False)
        return kept

    def _gradient(self, ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return self.gradient(ctx, dy, self.call_backward)

    def gradient(self, ctx: Any, dy: Tensor | None, backward: Callable) -> tuple[Tensor | None, ...]:
        """Of all inputs, by the backward operator or what it runs."""
        of_rest = (None,) * len(ctx.rest)
        if dy is None:
            return (None,) * self.count + of_rest
        *tensors, seed = saved = ctx.saved_tensors
        if [None if t is None else (t.dtype, t.shape) for t in saved] != ctx.saved_as:
            raise RuntimeError("saved tensor hooks returned tensors of another dtype or shape than they got")
        kept, inputs = tensors[: self.kept], tensors[self.kept :]
        rest = (*ctx.rest[:_SEED], seed, *ctx.rest[_SEED + 1 :])
        wanted = ctx.needs_input_grad[: self.count]
        gradients = backward(dy, *kept, *inputs, *rest, wanted)
        return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *of_rest

    def objects(self, *arguments: Any) -> tuple[list, Options, str, dict[str, Any]]:
        """The parameters, the options, the backend's name, the rest by name."""
        parameters = [kind(*arguments[where]) for kind, where in zip(self.parameters, self.slices, strict=True)]
        rest = arguments[self.count :]
        further = dict(zip(self.names, rest[_BACKEND + 1 :], strict=True))
        options = Options(*rest[:_BACKEND])
        return parameters, options._replace(precision=precision_of(options.dtype)), rest[_BACKEND], further

    def _without_none(self, results: Sequence[Tensor | None], x: Tensor) -> Tensor | tuple[Tensor, ...]:
        results = tuple(_absent(x) if result is None else result for result in results)
        return results if self.kept else results[0]


OPERATORS: dict[str, Operator] = {}
"""By name."""


def packed(function: str, packs: Mapping[str, Tensor], *arguments: Any) -> Tensor:
    """The operator ``function`` on its ``arguments`` with these packs."""
    return OPERATORS[function].packed(packs, *arguments)


def define_operator(name: str, schema: str, implementation: Callable, fake: Callable) -> Callable:
    """PyTorch registers a name once, for as long as the process lives, and models may hold the operator when this
    package is removed from ``sys.modules`` and imported again: one that is there stays."""
    qualified = f"{NAMESPACE}::{name}"
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        _defined.discard(name)
    else:
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "default", implementation)
        torch.library.register_fake(qualified, fake)
        _defined.add(name)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if operator._schema != torch._C.parse_schema(qualified + schema):
        raise ImportError(f"{qualified} was registered with another schema by another version: restart Python")
    return operator


def differentiate_operator(name: str, gradient: Callable, save: Callable | None = None) -> None:
    if name in _defined:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", gradient, setup_context=save)


def no_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the fused mixer operators have no gradient here (a second derivative, or mixer_block called as an operator): "
        "use backend='torch', which autograd differentiates any number of times"
    )


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0)
