"""Mutants: each comparison, number and mask of a kernel's source replaced by one that is nearly it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .copies import ROOT


class Mutant(NamedTuple):
    file: str  # from the root of the tree
    line: int
    column: int
    old: str
    new: str
    where: str  # the line

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.old!r} -> {self.new!r}"

    def text(self) -> str:
        """Of the file with it."""
        lines = (ROOT / self.file).read_text().split("\n")
        line = lines[self.line - 1]
        assert line.startswith(self.old, self.column), self.name
        lines[self.line - 1] = line[: self.column] + self.new + line[self.column + len(self.old) :]
        return "\n".join(lines)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Of the Triton kernels in a Python file, or of a C++ or CUDA source."""
    text = path.read_text()
    found = _of_triton(text) if path.suffix == ".py" else _of_cpp(text)
    lines = text.split("\n")
    for line, column, old, new in sorted(set(found)):
        yield Mutant(str(path.relative_to(ROOT)), line, column, old, new, lines[line - 1].strip())


Place = tuple[int, int, str, str]  # line, column, old, new
_NEARLY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&"}


def _another_number(old: str) -> str:
    number = old.rstrip("f")
    if re.fullmatch(r"\d+", number):
        return str(int(number) + 1)
    new = "1.0" if float(number) == 0 else repr(float(number) * 1.01)
    return new + old[len(number) :]


# -------------------------------------------------------------------------------------------------------------- Triton


def _of_triton(text: str) -> Iterator[Place]:
    lines = text.split("\n")

    def source(node: ast.AST) -> str | None:
        """Of what stands on one line."""
        if node.lineno != node.end_lineno:
            return None
        return lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()

    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef) or not any(map(_is_jit, function.decorator_list)):
            continue
        for node in (inner for statement in function.body for inner in ast.walk(statement)):
            old = source(node) if isinstance(node, ast.expr) else None
            if old is None:
                continue
            at = (node.lineno, node.col_offset, old)
            if isinstance(node, ast.Compare) and len(node.ops) == 1:
                # "is None" chooses code by which arguments there are.
                between = lines[node.lineno - 1][node.left.end_col_offset : node.comparators[0].col_offset]
                if (operator := between.strip(" ()")) in _NEARLY:
                    column = node.left.end_col_offset + between.index(operator)
                    yield node.lineno, column, operator, _NEARLY[operator]
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                yield *at, _another_number(old)
            elif isinstance(node, ast.Constant) and type(node.value) is bool:
                yield *at, str(not node.value)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
                yield from ((*at, f"({kept})") for kept in map(source, (node.left, node.right)) if kept)
            elif isinstance(node, ast.Call):
                masks = [keyword.value for keyword in node.keywords if keyword.arg == "mask"]
                yield from ((m.lineno, m.col_offset, old, f"({old}) | True") for m in masks if (old := source(m)))


def _is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).startswith("triton.jit")


# ------------------------------------------------------------------------------------------------------- C++ and CUDA

# As clang-format sets them: templates' brackets have no spaces on both sides.
_OPERATOR = re.compile(r"(?<= )(<=|>=|==|!=|<|>|&&|\|\|)(?= )")
_NUMBER = re.compile(r"(?<![\w.\"'])(?:\d+\.\d+(?:e-?\d+)?f?|\d+)(?![\w.'])")
# No code, or what only makes it faster, or what the compiler checks.
_NO_CODE = re.compile(r"\s*(#|//|static_assert|extern |using |enum |case )|__launch_bounds__|__builtin_expect|printf")


def _of_cpp(text: str) -> Iterator[Place]:
    for number, line in enumerate(text.split("\n"), start=1):
        code = line.split("//")[0]
        if _NO_CODE.search(code) or '"' in code:
            continue
        for match in _OPERATOR.finditer(code):
            yield number, match.start(), match[0], _NEARLY[match[0]]
        for match in _NUMBER.finditer(code):
            yield number, match.start(), match[0], _another_number(match[0])
