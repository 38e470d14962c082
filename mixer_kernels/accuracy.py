"""The accuracy rule, the only one: a kernel may be off by at most twice what eager PyTorch is off, in gradients thrice.

Errors are measured against the same computation in float64, as the largest and as the root mean square (RMS) over a
tensor. One evaluation of eager is no measure: over a few sums it may be exact by luck, and its luck depends on the CPU.
So ``reference`` evaluates the float64 computation again, several times, with roundings that are drawn at random: each
operation's result moves by up to half a unit in the last place of the dtype, and each sum by up to one unit in the last
place of its terms' magnitudes in float32, which is what a float32 accumulator may lose in any order over some hundred
terms (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 4.2, for independent errors). GELU(z)
moves by up to eps |z| of float32 and its slope by eps: PyTorch's own on a CPU, oneDNN's polynomial, is off by up to
3 eps |z|, by 0.4 eps |z| in the RMS, and by next to nothing in many a single evaluation. Then

    error <= factor * max(eager's error, the draws' error) + SPREAD * the draws' standard deviation

for the largest and for the RMS error alike. Over many elements the draws agree, and the last term vanishes; over one
it is what chance decides. ``tools/accuracy_by_chance.py`` counts how often a right kernel misses the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
SPREAD = 6.0
FEW = 4096  # elements; a larger result has many of everything, and its draws agree
DRAWS, DRAWS_OF_MANY = 16, 4
UNIT = 0.75  # of eps: a unit in the last place is eps / 2 to eps of the value, in the RMS this

aten = torch.ops.aten


@dataclass(frozen=True)
class Errors:
    """Difference of two tensors, the largest and the RMS."""

    max: float
    rms: float

    @classmethod
    def of(cls, difference: Tensor) -> Errors:
        return cls(difference.abs().max().item(), difference.square().mean().sqrt().item())


@dataclass(frozen=True)
class Reference:
    """A result in float64, and the errors of the evaluations whose roundings were drawn."""

    value: Tensor
    draws: tuple[Errors, ...]

    def allowed(self, eager: Errors, factor: float) -> Errors:
        """The largest errors that the rule lets pass where eager has the errors ``eager``."""

        def most(of_eager: float, draws: list[float]) -> float:
            return factor * max(of_eager, _rms(draws)) + SPREAD * _standard_deviation(draws)

        return Errors(
            most(eager.max, [draw.max for draw in self.draws]), most(eager.rms, [draw.rms for draw in self.draws])
        )


def reference(
    compute: Callable[[], Any], dtype: torch.dtype, products: torch.dtype | None = None, draws: int | None = None
) -> Any:
    """What ``compute`` returns, each tensor in it as a ``Reference`` for results in ``dtype``.

    Args:
        compute: the computation, forward and backward, in float64: a tensor, or a list, tuple or dict of them.
        dtype: the dtype of what is judged.
        products: the dtype of the matrix products, where autocast has another than ``dtype``.
        draws: how many evaluations with drawn roundings, two or more; by default it depends on the size of the result.
    """
    value = compute()
    if draws is None:
        draws = DRAWS if max(t.numel() for t in tree_leaves(value)) <= FEW else DRAWS_OF_MANY
    drawn = []
    for seed in range(draws):
        with _Roundings(dtype, products or dtype, seed):
            drawn.append(compute())
    return tree_map(_reference, value, *drawn)


def why_inaccurate(actual: Tensor, eager: Tensor, exact: Reference, factor: float = FORWARD_FACTOR) -> str | None:
    """Why ``actual`` misses the rule, or None. ``eager`` is eager PyTorch's result in the same dtype."""
    if not actual.shape == exact.value.shape == eager.shape:
        return f"shape {tuple(actual.shape)} where eager has {tuple(eager.shape)}"
    if actual.dtype is not eager.dtype:
        return f"{actual.dtype} where eager has {eager.dtype}"
    if not torch.equal(actual.isfinite(), eager.isfinite()):
        return "not finite where eager's is, or the reverse"
    finite = exact.value.isfinite() & eager.isfinite()
    if not finite.any():
        return None
    ours, theirs = (Errors.of(t.double()[finite] - exact.value[finite]) for t in (actual, eager))
    allowed = exact.allowed(theirs, factor)
    for name in ("max", "rms"):
        error, most = getattr(ours, name), getattr(allowed, name)
        if not error <= most:
            return f"{name} error {error:.3g}, allowed {most:.3g} (eager's {getattr(theirs, name):.3g})"
    return None


class _Roundings(TorchDispatchMode):
    """float64 operations, their results moved as roundings to ``dtype`` may move them."""

    def __init__(self, dtype: torch.dtype, products: torch.dtype, seed: int) -> None:
        super().__init__()
        self._dtype, self._products = dtype, products
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in DECOMPOSED:
            return self._in_float32(DECOMPOSED[packet][func], args, kwargs)
        if packet in _SUMS:
            return self._sum(func, args, kwargs)
        result = func(*args, **kwargs)
        if packet in _GELU and _is_float64(result):
            result.add_(self._noise(args[0], torch.float32).mul_(2 / UNIT))
        return self._rounded(result, self._dtype) if packet in _ROUNDED else result

    def _in_float32(self, decomposition: Callable, args, kwargs):
        """One kernel of eager's: float32 inside, its results rounded."""
        dtype, self._dtype = self._dtype, torch.float32
        try:
            with self:
                results = decomposition(*args, **kwargs)
        finally:
            self._dtype = dtype
        return tree_map(lambda t: self._rounded(t, dtype) if isinstance(t, Tensor) else t, results)

    def _sum(self, func, args, kwargs):
        """A sum in float32, of terms with these magnitudes."""
        is_product = func.overloadpacket in _PRODUCTS
        if is_product and self._products is not self._dtype:
            args = tree_map(lambda t: t + self._noise(t, self._products) if _is_float64(t) else t, args)
        result = func(*args, **kwargs)
        if not _is_float64(result):
            return result
        magnitudes = func(*tree_map(lambda t: t.abs() if _is_float64(t) else t, args), **kwargs)
        result = result + self._noise(2 * magnitudes, torch.float32)
        return self._rounded(result, self._products if is_product else self._dtype)

    def _rounded(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.add_(self._noise(t, dtype)) if _is_float64(t) else t

    def _noise(self, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
        """Up to half a unit in the last place, of float16's subnormals too."""
        generator = self._generators.get(magnitudes.device)
        if generator is None:
            generator = self._generators[magnitudes.device] = torch.Generator(magnitudes.device)
            generator.manual_seed(self._seed)
        limits = torch.finfo(dtype)
        unit = magnitudes.abs().clamp_(min=limits.smallest_normal).mul_(UNIT * limits.eps)
        return unit.mul_(torch.empty_like(unit).uniform_(-0.5, 0.5, generator=generator))


_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution}
_SUMS = _PRODUCTS | {aten.sum, aten.mean}
_GELU = {aten.gelu, aten.gelu_backward}  # of z, and of the gradient and z
_ROUNDED = {
    aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub, aten.mul, aten.mul_, aten.div, aten.div_, aten.addcmul,
    aten.square, aten.pow, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.exp, aten.log, aten.erf, aten.tanh,
    aten.sigmoid, aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten.tanh_backward,
    aten.sigmoid_backward,
}  # fmt: skip
DECOMPOSED = {
    packet: get_decompositions([packet])
    for packet in (
        aten.native_layer_norm, aten.native_layer_norm_backward, aten._softmax, aten._softmax_backward_data,
        aten._log_softmax, aten._log_softmax_backward_data, aten.var_mean,
        aten.native_batch_norm_backward,
    )
}  # fmt: skip


def _is_float64(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float64


def _reference(value: Tensor, *drawn: Tensor) -> Reference:
    assert value.dtype is torch.float64, f"the reference must be float64, got {value.dtype}"
    value = value.detach()
    finite = value.isfinite()
    if not finite.any():
        return Reference(value, (Errors(0.0, 0.0),) * len(drawn))
    return Reference(value, tuple(Errors.of(draw.detach()[finite] - value[finite]) for draw in drawn))


def _rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


def _standard_deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
