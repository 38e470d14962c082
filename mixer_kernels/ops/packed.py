"""One operator for blocks whose weights are promised to stay (``freeze_``): inference on packs that were made before.

``packs`` and their ``names`` are what a backend's ``Packing`` made; each name starts with that of its backend. What a
call needs and does not find, for another layout of x or another dtype, it packs itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import backends
from ..tracing import constant_while_tracing
from .operator import Operator, new_like


class NewPacks(dict[str, Tensor]):
    """Given for packs, it collects what the call packs."""


def _mixer_block(run, x, parameters, o):
    eps = {"eps1": o["eps"][0], "eps2": o["eps"][1]}
    return run.mixer_block_forward(x, *parameters, **eps, **_given(o, "approximate", "dtype", "activation", "packing"))


def _token_mixing(run, x, parameters, o):
    given = _given(o, "approximate", "dtype", "activation", "packing")
    return run.token_mixing_forward(x, *parameters, eps=o["eps"][0], **given)[0]


def _channel_mixing(run, x, parameters, o):
    given = _given(o, "approximate", "dtype", "activation", "norm", "packing")
    return run.channel_mixing_forward(x, *parameters, eps=o["eps"][0], **given)[0]


def _token_linear(run, x, parameters, o):
    return run.token_linear_forward(x, *parameters, **_given(o, "dtype", "packing"))


def _gated_channel_mixing(run, x, parameters, o):
    eps = {"eps": o["eps"][0], "gate_eps": o["eps"][1]}
    return run.gated_channel_mixing_forward(x, *parameters, **eps, **_given(o, "approximate", "dtype", "packing"))[0]


def _gated_mixing(run, x, parameters, o):
    given = _given(o, "axis", "gate_first", "approximate", "dtype", "packing")
    return run.gated_mixing_forward(x, *parameters, eps=o["eps"][0], **given)


def _gated_mixer_layer(run, x, parameters, o):
    mixers = (parameters[:8], parameters[8:])
    given = _given(o, "approximate", "dtype", "packing")
    return run.gated_mixer_layer_forward(x, *mixers, eps=tuple(o["eps"]), **given)[0]


FUNCTIONS = {
    "mixer_block": _mixer_block,
    "token_mixing": _token_mixing,
    "channel_mixing": _channel_mixing,
    "token_linear": _token_linear,
    "gated_channel_mixing": _gated_channel_mixing,
    "gated_mixing": _gated_mixing,
    "gated_mixer_layer": _gated_mixer_layer,
}


def _packed(run, x, *, function, parameters, packs, names, dtype, **options):
    options["packing"] = run.Packing(dtype, dict(zip(names, packs, strict=True)))
    return FUNCTIONS[function](run, x, parameters, {**options, "dtype": dtype})


_operator, _ = Operator(
    "packed",
    "Tensor x",
    "str function, Tensor?[] parameters, Tensor[] packs, str[] names, float[] eps, str approximate, ScalarType dtype,"
    " str activation, str norm, int axis, bool gate_first, str backend",
    lambda x, **_: (new_like(x),),
    forward=_packed,
).define()


def packed(
    function: str,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    packs: dict[str, Tensor],
    dtype: Any,
    backend: str,
    eps: Sequence[float] = (),
    approximate: str = "none",
    activation: str = "gelu",
    norm: str = "layer",
    axis: int = 0,
    gate_first: bool = False,
) -> Tensor:
    """``function`` of ``mixer_kernels.functional`` on ``x`` with these packs; into ``NewPacks`` it puts its own."""
    prefix = f"{backend}/"
    if isinstance(packs, NewPacks):
        run = backends.load(backend)
        packing = run.Packing(dtype)
        options = {
            "eps": eps, "approximate": approximate, "dtype": dtype, "activation": activation, "norm": norm,
            "axis": axis, "gate_first": gate_first, "packing": packing,
        }  # fmt: skip
        y = FUNCTIONS[function](run, x, parameters, options)
        packs.update((f"{prefix}{name}", pack) for name, pack in packing.made.items())
        return y
    own = {name.removeprefix(prefix): pack for name, pack in packs.items() if name.startswith(prefix)}
    return _operator(
        x, function, list(parameters), list(own.values()), list(own), list(eps), approximate, dtype, activation, norm,
        axis, gate_first, backend,
    )  # fmt: skip


@constant_while_tracing
def takes_packs(backend: str) -> bool:
    """Whether ``backend`` can keep packs."""
    return hasattr(backends.load(backend), "Packing")


def _given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}
