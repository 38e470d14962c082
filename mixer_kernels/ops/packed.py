"""Operators for blocks whose weights are promised to stay (``freeze_``): inference on packs that were made before.

What a call needs and does not find among them, for another layout of x or another dtype, it packs itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .. import backends
from ..tracing import constant_while_tracing
from .operator import Operator, define_operator, differentiate_operator, new_like, no_gradient
from .operators import OPERATORS


class NewPacks(dict[str, Tensor]):
    """Given for packs, it collects what the call packs. Each name starts with that of its backend."""


class KeptPacks(dict[str, Tensor]):
    """Those of a frozen block whose parameters are in this call all that they were when ``stamp`` was made: writes that
    PyTorch counts, addresses, dtypes, shapes, strides and devices have been compared."""

    def __init__(self, packs: Iterable[tuple[str, Tensor]], stamp: object) -> None:
        super().__init__(packs)
        self.stamp = stamp


class Packed:
    """``name_packed(x, parameters, options, backend, further, packs, names) -> result`` of ``operator``."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        name, schema = f"{operator.name}_packed", f"({operator.arguments}, Tensor[] packs, str[] names) -> Tensor"
        self._call = define_operator(name, schema, self._forward, lambda x, *_: new_like(x))
        differentiate_operator(name, no_gradient)

    def __call__(self, packs: Mapping[str, Tensor], *arguments: Any) -> Tensor:
        _, _, backend, _ = self._operator.objects(*arguments)
        if isinstance(packs, NewPacks):
            y, made = self._compute({}, *arguments)
            packs.update((f"{backend}/{name}", pack) for name, pack in made.items())
            return y
        own = packs_of(backend, packs)
        return self._call(*arguments, list(own.values()), list(own))

    def _forward(self, *arguments: Any) -> Tensor:
        *arguments, packs, names = arguments
        return self._compute(dict(zip(names, packs, strict=True)), *arguments)[0]

    def _compute(self, kept: dict[str, Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        parameters, options, backend, further = self._operator.objects(x, *arguments)
        run = backends.load(backend)
        packing = run.Packing(options.dtype, kept)
        results = getattr(run, f"{self._operator.name}_forward")(x, *parameters, options, **further, packing=packing)
        return results[0] if self._operator.kept else results, packing.made


_PACKED = {name: Packed(operator) for name, operator in OPERATORS.items()}


def packs_of(backend: str, packs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``backend``, by the names that it gave them."""
    prefix = f"{backend}/"
    return {name.removeprefix(prefix): pack for name, pack in packs.items() if name.startswith(prefix)}


def packed(function: str, packs: Mapping[str, Tensor], *arguments: Any) -> Tensor:
    """The operator ``function`` on its ``arguments`` with these packs; into ``NewPacks`` it puts its own."""
    return _PACKED[function](packs, *arguments)


@constant_while_tracing
def takes_packs(backend: str) -> bool:
    """Whether ``backend`` can keep packs."""
    return backends.load(backend).has("packs")
