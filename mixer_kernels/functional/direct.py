"""How a checked call reaches its kernels: through an operator, or in plain PyTorch straight.

What the checks of a call find, which backend runs it and how it is laid out follow from metadata: ``key_of`` is all of
that, and ``backends.remembered`` says why nothing can be stale. Where anything else has a part in the call (a compiler,
a tracer, a transform, a mode, a profiler, tensors that are not plain) there is no key: the operator runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..backends.arguments import Options, precision_of
from ..backends.remembered import recall, remember
from ..environment import asked_instruction_set
from ..metadata import described
from ..ops.operator import OPERATORS, packed
from ..ops.packs import KeptPacks, has_packs, packs_of
from ..tracing import is_watched
from .checks import needs_grad, seeded, takes_packs

_PLAIN_TENSORS = frozenset({Tensor, nn.Parameter, type(None)})
_PLAIN_ARGUMENTS = frozenset({float, int, bool, str, type(None)})
Packs = Mapping[str, Tensor] | None
Parameters = Sequence[Tensor | None]


def key_of(
    function: str, x: Tensor, parameters: Parameters, arguments: tuple, backend: str | None, packs: Packs
) -> Hashable | None:
    """All that ``function`` on these depends on but for the numbers in the tensors; None if its operator must run."""
    if not (is_plain(x) and _PLAIN_ARGUMENTS.issuperset(map(type, arguments))):
        return None
    if not _PLAIN_TENSORS.issuperset(map(type, parameters)):
        return None
    around = surroundings(x, backend)
    if around is None:
        return None
    kept: tuple = ()
    if has_packs(packs):
        if not isinstance(packs, KeptPacks):
            return None
        kept = tuple(packs), *[pack.data_ptr() for pack in packs.values()], packs.stamp
    try:  # an address says on which device a parameter is
        return function, around, arguments, needs_grad(x, *parameters), kept, described(list(parameters))
    except RuntimeError:  # a sparse or a nested tensor has no address or no strides
        return None


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a plain tensor, and nothing has a part in a call on it but plain autograd."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and (x.is_cuda or x.is_cpu)
        and not is_watched()
        and not torch.jit.is_tracing()
        and not x._is_zerotensor()
    )


def surroundings(x: Tensor, backend: str | None = None) -> Hashable | None:
    """Of the plain tensor ``x`` all but its numbers, of its address whether it is aligned; the backend that is asked
    for; the dtypes of products. None where the result does not have the dtype of ``x``."""
    kind, autocast = "cuda" if x.is_cuda else "cpu", None
    isa = "" if x.is_cuda else asked_instruction_set()
    if torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
        if torch.promote_types(x.dtype, autocast) is not x.dtype:
            return None
    try:
        layout = (x.data_ptr() % 16, x.dtype, x.shape, x.stride(), x.device, x.is_neg())
    except RuntimeError:  # as in key_of
        return None
    asked = backends.requested_backend() if backend is None else backend
    return layout, asked, isa, autocast, torch.get_float32_matmul_precision()


def known_call(key: Hashable | None, packs: Packs = None) -> Callable[[Tensor, Parameters, Packs], Tensor] | None:
    """What ``run`` has found for ``key``: a call on x, the parameters and the packs."""
    return None if key is None else _noted(recall(key), packs)


def _noted(call: Callable | None, packs: Packs) -> Callable | None:
    """``call``; the owner of ``packs`` may repeat it if it takes nothing but x."""
    if isinstance(packs, KeptPacks) and hasattr(call, "copies"):
        packs.call = call
    return call


def run(
    function: str,
    key: Hashable | None,
    backend: str,
    x: Tensor,
    halves: Sequence[tuple],
    options: Options,
    packs: Packs = None,
    **further: Any,
) -> Tensor:
    """The first result of ``function`` on ``x`` and ``halves`` by ``backend``, which has kernels; all is checked."""
    parameters = [t for half in halves for t in half]
    arguments = (x, *parameters, *options.inputs, backend, *further.values())
    if not (torch.compiler.is_compiling() or _has_lazy(x, *parameters)):
        differentiated, operator = needs_grad(x, *parameters), OPERATORS[function]
        if key is not None and not (differentiated or options.noise):
            return _first_call(function, key, backend, x, halves, options, packs, further)
        if (
            differentiated
            and operator.backward is not None
            and is_plain(x)
            and _PLAIN_TENSORS.issuperset(map(type, parameters))
        ):
            remember_call(key, _differentiated(operator, backend, options, further))
            return _Differentiated.apply(*arguments, operator)
    if takes_packs(packs, backend, options, x, *parameters):
        return packed(function, packs, *arguments)
    return _first(getattr(ops, function)(*arguments))


def remember_call(key: Hashable | None, call: Callable[[Tensor, Parameters, Packs], Tensor]) -> None:
    """That ``call`` is all that a call with ``key`` comes to."""
    if key is not None:
        remember(key, call)


def _differentiated(operator: Any, backend: str, options: Options, further: dict[str, Any]) -> Callable:
    """A call with gradients, which draws seeds of its own."""
    numbers = 0 if options.seed is None else options.seed.numel()
    options = options._replace(seed=None)

    def call(x: Tensor, parameters: Parameters, packs: Packs) -> Tensor:
        inputs = (seeded(x, options, numbers) if numbers else options).inputs
        return _Differentiated.apply(x, *parameters, *inputs, backend, *further.values(), operator)

    return call


class _Differentiated(torch.autograd.Function):
    """An operator and its backward as autograd's own, without the dispatcher; the last input is the operator. In the
    backward pass the operator itself runs where somebody looks on, and for what is no tensor in memory as it is."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *inputs, ctx.operator = inputs
        output = ctx.operator.forward(*inputs)
        ctx.operator.keep(ctx, tuple(inputs), output)
        return _first(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        operator = ctx.operator
        straight = not torch.is_grad_enabled() and not is_watched() and _is_in_memory(dy)
        return *operator.gradient(ctx, dy, operator.backward_of if straight else operator.call_backward), None


def _is_in_memory(t: Tensor | None) -> bool:
    """As it is: not negated or zero by a bit, not several in a batch of gradients, not of a subclass."""
    try:
        return type(t) is Tensor and (t.data_ptr() > 0 or t.numel() == 0) and not t.is_neg()
    except RuntimeError:
        return False


def _has_lazy(*tensors: Tensor | None) -> bool:
    """Whether PyTorch negates one, or fills it with zeros, before it calls an operator."""
    return any([t is not None and (t.is_neg() or t._is_zerotensor()) for t in tensors])


def _first_call(
    function: str,
    key: Hashable,
    backend: str,
    x: Tensor,
    halves: Sequence[tuple],
    options: Options,
    packs: Packs,
    further: dict[str, Any],
) -> Tensor:
    """The call, and what calls with the same ``key`` will do. That has tensors from its arguments alone."""
    module, parameters = backends.load(backend), [t for half in halves for t in half]
    options = options._replace(precision=precision_of(options.dtype))
    plan = getattr(module, f"{function}_plan", None)
    if plan is not None and x.numel() > 0:
        planned = plan(x, *halves, options, packing=_packing(module, backend, options, packs), **further)
        if not planned.copies:
            remember(key, _noted(planned, packs))
            return planned(x, parameters, packs)
    ends = [0, *itertools.accumulate(map(len, halves))]
    kinds = [(type(half), slice(*where)) for half, where in zip(halves, itertools.pairwise(ends), strict=True)]

    def call(x: Tensor, parameters: Parameters, packs: Packs) -> Tensor:
        own = [kind(*parameters[where]) for kind, where in kinds]
        packing = _packing(module, backend, options, packs)
        more = further if packing is None else further | {"packing": packing}
        return _first(getattr(module, f"{function}_forward")(x, *own, options, **more))

    remember(key, call)
    return call(x, parameters, packs)


def _packing(module: Any, backend: str, options: Options, packs: Packs) -> Any:
    """Packs of a frozen block as a backend takes them, if it does."""
    return module.Packing(options.dtype, packs_of(backend, packs)) if packs and module.has("packs") else None


def _first(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]
