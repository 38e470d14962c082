"""One run of a user's own block beside what was declared of it: a copy, on random inputs and weights, in float64.

Random weights tell apart what is alike in a new model: two LayerNorms of ones and zeros, a scale of one, a last layer
of zeros. Dropout and stochastic depth become factors, which show where they are called. Half of x has rows of large and
small numbers and of zeros: there a mask or a bound shows.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional

LIMIT = 1e-10  # of the largest value: roundings in float64 stay far below, another eps of a norm lies far above
ACTIVATIONS = (("gelu", "none"), ("gelu", "tanh"), ("relu", "none"), ("silu", "none"))
PARTS = ("norm1", "fc1", "fc2", "norm2", "fc3", "fc4")
FACTORS = (1.5, 0.75, 1.25, 0.625, 1.75, 0.875)
SCALES = (1e6, 0.0, 1e-3)  # of the second image's rows, in turn


def run(block: nn.Module, original: type[nn.Module], declared: Any, shape: tuple[int, ...], name: str) -> bool:
    """Raise ValueError unless ``block``, of class ``original`` and called ``name`` in its model, computes what the
    class ``declared`` says for images of ``shape``, values and gradients. Returns whether it does so in training too,
    but for the noise of declared parts."""
    parts = declared.declaration
    block_name = f"block {name!r}" if name else "the block"
    described = f"blocks[{original.__name__}] does not describe {block_name}"
    with _without_traces(block) as device:
        twin = _twin(block, original, device, block_name)
        factors, calls = _noise_as_factors(twin, parts), _noted_calls(twin, parts)
        parameters, arguments = declared.parameters_in_order(twin), declared.arguments(twin)
        halves = [parameters[first : first + 6] for first in range(0, len(parameters), 6)]
        scaled = [_scaled(half, *by) for half, by in zip(halves, factors, strict=True)]
        x = _images(shape, device).requires_grad_()
        own = _own_forward(twin, original, x, described)

        def expected(function: str = parts.function, **other: Any) -> Tensor:
            taken = scaled[:1] if function == "token_mixing" else scaled
            return getattr(functional, function)(x, *sum(taken, ()), **arguments | other, backend="torch")

        try:
            ours = expected()
        except ValueError as error:  # about shapes
            raise ValueError(f"{described}: {error}") from error
        if _difference_of_images(own, ours) is not None:
            what_differs = _what_differs(own, expected, twin, parts, calls)
            raise ValueError(f"{described}: on random inputs and weights {what_differs}")
        _check_gradients(own, ours, {"x": x, **dict(twin.named_parameters())}, described)
        return _is_the_same_in_training(twin, original, x, own, described)


@contextmanager
def _without_traces(block: nn.Module) -> Iterator[torch.device]:
    """Plain autograd and no autocast, whatever is on outside; afterwards generators of random numbers are as before.
    Gives a device for float64: the block's own, if that has it."""
    device = next(block.parameters()).device
    device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    generators = _generators(device)
    states = [get() for get, _ in generators]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            yield device
        finally:
            for (_, put), state in zip(generators, states, strict=True):
                put(state)


def _generators(device: torch.device) -> list[tuple[Callable, Callable]]:
    """What reads and what sets the state of each generator that a forward may draw from."""
    generators = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    if device.type == "cuda":
        cuda = torch.cuda
        generators.append((partial(cuda.get_rng_state, device), partial(cuda.set_rng_state, device=device)))
    if "numpy" in sys.modules:
        generators.append((sys.modules["numpy"].random.get_state, sys.modules["numpy"].random.set_state))
    return generators


def _twin(block: nn.Module, original: type[nn.Module], device: torch.device, block_name: str) -> nn.Module:
    """A copy of ``block`` in float64 with random weights and buffers, in evaluation mode."""
    try:
        twin = copy.deepcopy(block)
    except Exception as error:
        raise ValueError(
            f"blocks[{original.__name__}]: fuse_ checks a copy of {block_name}, but copy.deepcopy raised "
            f"{type(error).__name__}: {error}. Call fuse_ before the block holds what cannot be copied, give its class "
            "a __deepcopy__, or leave it out of blocks"
        ) from error
    twin.__class__ = original
    twin.to(device, torch.float64).eval()
    with torch.no_grad():
        for seed, tensor in enumerate((*twin.parameters(), *twin.buffers()), start=2):
            if tensor.is_floating_point():
                columns = tensor[0].numel() if tensor.dim() > 1 else 1
                tensor.copy_(_randn(tensor.shape, device, seed) * columns**-0.5)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _images(shape: Sequence[int], device: torch.device) -> Tensor:
    """Two: one of standard normal numbers, and one whose rows are scaled by ``SCALES``."""
    x = _randn((2, *shape), device, seed=1)
    for row in range(shape[0]):
        x[1, row] *= SCALES[row % len(SCALES)]
    return x


def _randn(shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), dtype=torch.float64, device=device, generator=generator)


class _Factor(nn.Module):
    """What the copy has in the place of dropout and stochastic depth."""

    factor: float

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def _noise_as_factors(twin: nn.Module, parts: Any) -> list[tuple[float, float]]:
    """Make a factor of all declared noise; of each half the one behind the activation and the one of the branch."""
    factors = {None: 1.0}
    names = (("drop1", "drop2", "drop_path1"), ("drop3", "drop4", "drop_path2"))
    for path in [getattr(parts, name) for half in names for name in half]:
        if path not in factors:
            module = twin.get_submodule(path)
            if type(module) is not _Factor:
                module.__class__, module.factor = _Factor, FACTORS[len(factors) - 1]
            factors[path] = module.factor
    halves = [[factors[getattr(parts, name)] for name in half] for half in names]
    there = [parts.fc1 is not None, parts.fc3 is not None]
    return [(drop, end * path) for is_there, (drop, end, path) in zip(there, halves, strict=True) if is_there]


def _scaled(half: Sequence[Tensor | None], drop: float, branch: float) -> tuple[Tensor | None, ...]:
    """The parameters of a half whose hidden units are multiplied by ``drop``, and whose result by ``branch``."""
    *first, weight, bias = half
    return *first, weight * (drop * branch), None if bias is None else bias * branch


def _noted_calls(twin: nn.Module, parts: Any) -> dict[str, list[Tensor]]:
    """By path of a part: what it is called with, call by call."""
    calls = {path: [] for _, path in parts.paths(*PARTS)}
    for path, inputs in calls.items():
        note = lambda _, arguments, inputs=inputs: inputs.append(arguments[0].detach())  # noqa: E731
        twin.get_submodule(path).register_forward_pre_hook(note)
    return calls


def _what_differs(
    own: Tensor, expected: Callable[..., Tensor], twin: nn.Module, parts: Any, calls: dict[str, list[Tensor]]
) -> str:
    """Which half, by how much, and what may be the cause."""
    of_what, difference = "its result", _difference_of_images(own, expected())
    modules = [twin.get_submodule(path) for _, path in parts.paths(*PARTS)]
    if parts.function == "mixer_block":
        is_shared = modules[0] is modules[3]
        between = calls[parts.norm2][is_shared:]  # what the channel half begins with
        if between and between[0].shape == own.shape:
            halfway = expected("token_mixing", eps=twin.get_submodule(parts.norm1).eps)
            of_tokens = _difference_of_images(between[0], halfway)
            of_what, difference = ("its token half", of_tokens) if of_tokens else ("its channel half", difference)
    said = [f"{of_what} {difference}"]
    for path, inputs in calls.items():
        uses = modules.count(twin.get_submodule(path))
        if len(inputs) != uses:
            said.append(f"its forward calls {path} {_times(len(inputs))}, not {_times(uses)}")
    for activation, approximate in ACTIVATIONS if parts.activation != "swiglu" else ():
        if _difference_of_images(own, expected(activation=activation, approximate=approximate)) is None:
            said.append(f"with activation={activation!r} and approximate={approximate!r} it agrees")
    return "; ".join(said)


def _times(number: int) -> str:
    return ("never", "once", "twice")[number] if number < 3 else f"{number} times"


def _own_forward(twin: nn.Module, original: type[nn.Module], x: Tensor, described: str) -> Tensor:
    try:
        y = original.forward(twin, x.clone())  # which may be written to
    except Exception as error:
        raise ValueError(
            f"{described}: its forward raised {type(error).__name__} on a random float64 x {tuple(x.shape)}, "
            f"whose sizes are those of the declared parts: {error}"
        ) from error
    got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
    if not isinstance(y, Tensor) or y.dtype is not x.dtype or y.shape != x.shape:
        raise ValueError(f"{described}: of an x {x.dtype} {tuple(x.shape)} it returns a {got}")
    return y


def _difference(own: Tensor, ours: Tensor) -> str | None:
    """By how much two results differ, in words; None if they are the same."""
    difference, largest = (own - ours).abs().max().item(), ours.abs().max().item()
    if difference <= LIMIT * largest:
        return None
    return f"differs by up to {difference:.3g} from what was declared, whose largest value is {largest:.3g}"


def _difference_of_images(own: Tensor, ours: Tensor) -> str | None:
    """The same of two images: of the second row by row, whose sizes differ."""
    difference = _difference(own[0], ours[0])
    if difference is not None:
        return difference
    row = ((own[1] - ours[1]).abs().amax(-1) / ours[1].abs().amax(-1)).argmax().item()
    difference, scale = _difference(own[1, row], ours[1, row]), SCALES[row % len(SCALES)]
    if difference is None:
        return None
    of_x = f"numbers around {scale:g}" if scale else "zeros"
    return f"{difference}, where x has a row of {of_x}, so that it depends on their size, as a mask or a bound does"


def _check_gradients(own: Tensor, ours: Tensor, tensors: dict[str, Tensor], described: str) -> None:
    """Raise ValueError if the two have other gradients with respect to one of ``tensors``."""
    if not own.requires_grad:
        raise ValueError(f"{described}: its forward gives no gradients")
    upstream = _randn(own.shape, own.device, seed=0)
    gradients = [torch.autograd.grad(y, [*tensors.values()], upstream, allow_unused=True) for y in (own, ours)]
    for name, *both in zip(tensors, *gradients, strict=True):
        both = [torch.zeros_like(tensors[name]) if gradient is None else gradient for gradient in both]
        difference = (_difference_of_images if name == "x" else _difference)(*both)
        if difference is not None:
            raise ValueError(f"{described}: on random inputs and weights the gradient of {name} {difference}")


def _is_the_same_in_training(
    twin: nn.Module, original: type[nn.Module], x: Tensor, in_evaluation: Tensor, described: str
) -> bool:
    """Whether the mode changes nothing, and nothing is drawn: what is drawn may by chance change nothing."""
    generators = _generators(x.device)
    before = [get() for get, _ in generators]
    twin.train()
    in_training = _own_forward(twin, original, x, described)
    return _difference_of_images(in_training, in_evaluation) is None and all(
        _is_same_state(state, get()) for state, (get, _) in zip(before, generators, strict=True)
    )


def _is_same_state(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, now)
    return all(
        a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b for a, b in zip(before, now, strict=True)
    )
