"""What importing mixer_kernels may do, and which of its modules may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mixer_kernels

PACKAGE = Path(mixer_kernels.__file__).parent

# From the bottom up: a module imports from its own group and from groups below it.
GROUPS = (
    {"accuracy", "environment", "machine_model", "shapes", "tracing", "words"},
    {"tuning", "metadata"},
    {"backends"},
    {"ops"},
    {"functional"},
    {"report", "freeze", "repeat", "layers", "coverage", "snapshot", "modules", "models", "adapters", "patch", "timm"},
    {"bench", "compile_check", "cost", "info", "__main__", "__init__"},
)
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}
# Modules off that line, with everything of the package that they may import.
ONLY = {"convert": {"convert", "shapes", "words"}}
# Imported when a module is; what is optional is imported where it is used.
AT_IMPORT = {
    "torch": None,
    "numpy": None,
    "triton": {"backends.triton", "compile_check"},
    "timm": {
        "timm",
        "adapters.timm",
    },  # adapters are imported by fuse_, each where its library has been imported already
    "mlp_mixer_pytorch": {"adapters.lucidrains"},
    "transformers": {"adapters.patchtsmixer"},
    "tsfm_public": {"adapters.tinytimemixer", "adapters.tspulse"},
    "sktime": {"adapters.sktime"},
    "torch_geometric": {"adapters.pyg"},
    "darts": {"adapters.darts"},
    "neuralforecast": {"adapters.neuralforecast"},
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def own_imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level module of mixer_kernels) for each import of the package's own, wherever it stands."""
    path = ["mixer_kernels", *name.split(".")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path[: len(path) - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "mixer_kernels":
                member = target[1] if len(target) > 1 else "__init__"
                is_module = (PACKAGE / member).is_dir() or (PACKAGE / f"{member}.py").is_file()
                yield node.lineno, member if is_module else "__init__"


def violations(name: str, tree: ast.AST) -> list[str]:
    top = name.split(".")[0]
    found = []
    for line, imported in own_imports(name, tree):
        allowed = imported in ONLY[top] if top in ONLY else RANK.get(imported, len(GROUPS)) <= RANK[top]
        if imported in ONLY and top not in ONLY:
            allowed = RANK[top] == len(GROUPS) - 1
        if not allowed:
            found.append(f"{name}:{line} imports {imported}")
    return found


def imported_at_import(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, distribution's top-level name) for imports that run when the module is imported."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module.split(".")[0]
        pending.extend(ast.iter_child_nodes(node))


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_has_a_place() -> None:
    unplaced = {dotted(path).split(".")[0] for path in sources()} - set(RANK) - set(ONLY)
    assert not unplaced, f"say in GROUPS or ONLY what these may import: {sorted(unplaced)}"


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_imports_run_one_way(path: Path) -> None:
    assert violations(dotted(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("name", "code", "bad"),
    [
        ("shapes", "import torch", False),
        ("ops", "from . import backends", False),
        ("ops", "from . import functional", True),
        ("ops", "from .functional import token_mixing", True),
        ("ops", "def f():\n    import mixer_kernels.modules", True),
        ("ops", "from mixer_kernels import FusedMixer", True),
        ("functional", "from .backends import torch", False),
        ("backends.__init__", "from ..tuning import configs", False),
        ("backends.triton.launch", "from ...tuning import configs", False),
        ("backends.triton.launch", "from ...ops import token_mixing", True),
        ("backends.triton.launch", "from . import gelu", False),
        ("backends.cuda.library", "from ...tuning.target import target_of", False),
        ("backends.cuda.library", "from ...functional import token_mixing", True),
        ("backends.torch", "from .. import shapes", False),
        ("backends.torch", "from .. import modules", True),
        ("convert", "from . import shapes", False),
        ("convert", "from . import modules", True),
        ("models", "from . import modules", False),
        ("__main__", "from . import __version__, models", False),
    ],
)
def test_the_rule_sees(name: str, code: str, bad: bool) -> None:
    assert bool(violations(name, ast.parse(code))) is bad


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    name = dotted(path)
    for line, imported in imported_at_import(ast.parse(path.read_text())):
        if imported in sys.stdlib_module_names or imported == "mixer_kernels":
            continue
        assert imported in AT_IMPORT, f"{name}:{line} imports {imported}, which is not a dependency"
        where = AT_IMPORT[imported]
        assert where is None or any(name.startswith(prefix) for prefix in where), f"{name}:{line} imports {imported}"


def test_imports_without_triton_and_timm() -> None:
    output = python(
        """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "timm", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from mixer_kernels import FusedMixerBlock, functional, use_backend

block = FusedMixerBlock(8, 4).eval()
x = torch.randn(2, 4, 8)
y = block(x)
n = torch.nn.functional.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
u = x + block.mlp_tokens(n.transpose(1, 2)).transpose(1, 2)
torch.testing.assert_close(y, u + block.mlp_channels(block.norm2(u)))
try:
    with use_backend("triton"):
        block(x)
except RuntimeError as error:
    print(error)
"""
    )
    assert "triton" in output and "backend='torch'" in output


def test_importing_touches_no_cuda_and_no_optional_package() -> None:
    output = python(
        """
import os, sys
import torch

def touched(*args, **kwargs):
    raise AssertionError("importing mixer_kernels asked CUDA something")

for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name"):
    setattr(torch.cuda, name, touched)
before = set(sys.modules)
import mixer_kernels
import mixer_kernels.backends.cuda

print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
assert not torch.cuda.is_initialized()
if os.fork() == 0:
    os._exit(torch.cuda._is_in_bad_fork())
assert os.wait()[1] == 0, "a forked process cannot use CUDA after importing mixer_kernels"
"""
    )
    new = set(output.split()) - set(sys.stdlib_module_names)
    assert "mixer_kernels" in new
    assert new.isdisjoint({"triton", "timm", "torchvision", "matplotlib", "tqdm", "safetensors"}), new


def test_importing_is_quick_on_top_of_torch() -> None:
    """Nothing but this package's own light modules: no part of torch that torch itself leaves for later."""
    output = python(
        "import sys, torch; before = set(sys.modules); import mixer_kernels; print(*sorted(set(sys.modules) - before))"
    )
    others = {name.split(".")[0] for name in output.split()} - set(sys.stdlib_module_names)
    assert others == {"mixer_kernels"}
    heavy = (
        "bench",
        "adapters.t",
        "adapters.l",
        "convert",
        "compile_check",
        "backends.triton",
        "backends.cuda",
        "backends.cpu",
    )
    assert not [name for name in output.split() if name.startswith(tuple(f"mixer_kernels.{part}" for part in heavy))]
