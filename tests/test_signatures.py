"""Backends have the functions that protocol.Backend says; parameters that belong together travel together."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import mixer_kernels
from mixer_kernels import backends, functional
from mixer_kernels.backends.protocol import Backend

PACKAGE = Path(mixer_kernels.__file__).parent
OPERATORS = [name for name in functional.__all__ if name.islower()]
MIXER = (
    "token_backward_weights", "channel_backward_weights", "branch_gradient", "token_products_backward",
    "weight_gradient", "channel_products_backward", "norm_backward",
)  # fmt: skip
ROWS = ("row_statistics", "channel_hidden", "hidden_gelu", "hidden_gelu_backward")
BACKWARD = {  # what the backward of each operator calls
    "token_mixing": MIXER,
    "channel_mixing": MIXER,
    "token_linear": ("token_linear_data_gradient", "branch_gradient", "weight_gradient"),
    "spatial_gating": ("row_statistics", "spatial_gate_backward", "weight_gradient", "norm_backward"),
    "gated_channel_mixing": ("branch_gradient", "spatial_gate_backward", "weight_gradient", "norm_backward", *ROWS),
    "gated_mixing": ("row_statistics", "gated_mixing_gradients", "norm_backward"),
    "gated_mixer_layer": ("row_statistics", "gated_mixing_gradients", "norm_backward"),
}


@pytest.mark.parametrize("name", ("cuda", "cuda:sm90", "triton"))
def test_a_backend_has_what_it_says(name):
    backend = backends.load(name)
    offered = [operator for operator in OPERATORS if backend.has(operator)]
    assert {"token_mixing", "channel_mixing", "mixer_block"} <= set(offered)
    for operator in offered:
        for function in (f"{operator}_forward", *BACKWARD.get(operator, ())):
            assert hasattr(backend, function), f"{name} lacks {function}, which {operator} needs"
    assert not backend.has("nothing known")


@pytest.mark.parametrize("name", ("cuda", "cuda:sm90", "triton", "cpu"))
def test_signatures_are_those_of_the_protocol(name):
    backend = backends.load(name)
    checked = 0
    for function, promised in inspect.getmembers(Backend, inspect.isfunction):
        if function.startswith("_") or not callable(getattr(backend, function, None)):
            continue
        expected = list(inspect.signature(promised).parameters.values())[1:]
        actual = list(inspect.signature(getattr(backend, function)).parameters.values())
        required = [p.name for p in expected if p.default is p.empty]
        # The first may go by another name; weights are a backend's own business, and so is what it adds.
        known = [a.name for a in actual[: len(required)]]
        assert len(known) == len(required), function
        differing = {(k, r) for k, r in zip(known[1:], required[1:], strict=True) if k != r}
        assert not differing or {r for _, r in differing} == {"weights"}, (function, differing)
        assert all(p.default is not p.empty or p.kind is p.KEYWORD_ONLY for p in actual[len(required) :]), function
        checked += 1
    assert checked >= (6 if name == "cpu" else 11)


@pytest.mark.parametrize("module", ("cuda/__init__.py", "cuda/sm90.py", "triton/__init__.py"))
def test_a_backend_imports_nothing_in_vain(module):
    """What it does not use is what it offers: no linter tells one from the other."""
    tree = ast.parse((PACKAGE / "backends" / module).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    promised = {name for name, _ in inspect.getmembers(Backend, inspect.isfunction)}
    assert imported - used <= promised | {"Packing", "mixer_block_plan"}


def _takes(function: ast.FunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(a.arg not in ("self", "cls") for a in named) + sum(
        a is not None for a in (arguments.vararg, arguments.kwarg)
    )


def _long_functions(source: str, most: int = 10) -> list[str]:
    """Functions that take more than ``most`` parameters; Triton kernels are compiled, and take what they take."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and _takes(node) > most
        and not any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


TIMMS = {"modules.py": ["__init__"], "models.py": ["__init__"]}  # constructors with timm's parameters


def test_parameters_travel_as_objects():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        allowed = functional.__all__ if name.startswith("functional/") else TIMMS.get(name, [])
        found = [function for function in _long_functions(path.read_text()) if function not in allowed]
        assert not found, f"{name}: {', '.join(found)} take more than ten parameters: pass an object"


def test_a_long_list_of_parameters_is_seen():
    names = ", ".join(f"p{i}" for i in range(11))
    assert _long_functions(f"def f({names}): pass") == ["f"]
    assert _long_functions(f"class A:\n    def f(self, {names}): pass") == ["f"]
    assert _long_functions(f"def f(*, {names}): pass") == ["f"]
    assert not _long_functions(f"@triton.jit\ndef f({names}): pass")
