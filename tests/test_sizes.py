"""Functions stay short or say why not, and imports inside them are few, each with its reason beside it."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cloob

PACKAGE = Path(cloob.__file__).parent
LONGEST = 50
"""Lines of code of a function: docstrings, comments and empty lines do not count, nor do functions inside twice."""
REASON = "# Long: "
IMPORTS = 15
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
_HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Function(NamedTuple):
    name: str
    length: int
    above: str


class Import(NamedTuple):
    line: str
    reason: str


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _HOLDERS) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def functions(source: str) -> Iterator[Function]:
    """Each function with its length and the line above it, decorators included."""
    code, lines = code_lines(source), source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
            yield Function(node.name, length, lines[first - 2].strip() if first > 1 else "")


def inner_imports(source: str) -> set[Import]:
    """The imports inside functions, and what the comment on their line says."""
    lines = source.splitlines()
    imports = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    line, _, reason = lines[inner.lineno - 1].partition("  # ")
                    imports.add(Import(f"{inner.lineno}: {line.strip()}", reason.removeprefix("noqa").strip()))
    return imports


def test_lengths_and_imports_are_seen() -> None:
    body = "\n".join(f"    x = {i}" for i in range(LONGEST))
    source = f'''import ast
# Long: it is.
@cache
def long():
    """Not

    counted."""
    # nor this
{body}


def short():
    import io  # slow
    import os
'''
    assert list(functions(source)) == [Function("long", LONGEST + 1, "# Long: it is."), Function("short", 3, "")]
    assert inner_imports(source) == {Import("62: import io", "slow"), Import("63: import os", "")}


def test_no_function_is_long_without_a_reason() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}: {function.name} has {function.length} lines of code"
        for path in PACKAGE.rglob("*.py")
        for function in functions(path.read_text(encoding="utf-8"))
        if function.length > LONGEST and not function.above.startswith(REASON)
    ]
    assert not long


def test_imports_inside_functions_are_few_and_each_says_why() -> None:
    imports = {
        path.relative_to(PACKAGE): inner_imports(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
    }
    without = [f"{path}, {one.line}" for path, some in imports.items() for one in some if not one.reason]
    assert not without
    # A command imports its work late, so that a mistake in its words is answered at once: once each, and not counted.
    assert all(len(some) <= 1 for path, some in imports.items() if path.parts[:-1] == ("commands",))
    # Nor are those of search/, of which a question about pictures that are indexed needs neither torch nor Pillow.
    counted = {path: some for path, some in imports.items() if path.parts[0] not in ("commands", "search")}
    assert sum(map(len, counted.values())) <= IMPORTS
