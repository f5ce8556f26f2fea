"""What the source of this project's own classes says, read without importing them: most need torch."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]


def source_file(module: str) -> Path:
    """The file of one of this project's modules."""
    return _PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")


def class_defaults(module: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a class of this project can be made with, and its class attributes, each by name with its plain default.

    Both with those of its bases, as far as they are of this project too. A default that is no plain value is None.

    Returns:
        The parameters of its ``__init__``, or the fields of a dataclass; the attributes marked as ClassVar.
    """
    tree = _parse(module)
    found = next((s for s in tree.body if isinstance(s, ast.ClassDef) and s.name == name), None)
    if found is None:
        return {}, {}
    parameters: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    imported = {
        alias.asname or alias.name: (statement.module or "", alias.name)
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    for base in reversed(found.bases):
        if isinstance(base, ast.Name):
            place, original = imported.get(base.id, (module, base.id))
            if place.startswith(f"{_PACKAGE.name}."):
                inherited = class_defaults(place, original)
                parameters |= inherited[0]
                attributes |= inherited[1]
    for statement in found.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = attributes if "ClassVar" in ast.unparse(statement.annotation) else parameters
            kind[statement.target.id] = _plain(statement.value)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            parameters = _arguments(statement.args)
    return parameters, attributes


@functools.cache
def _parse(module: str) -> ast.Module:
    return ast.parse(source_file(module).read_text(encoding="utf-8"))


def _arguments(arguments: ast.arguments) -> dict[str, Any]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*map(_plain, arguments.defaults)]
    given = {a.arg: default for a, default in zip(positional, defaults, strict=True)}
    given |= {a.arg: _plain(d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    return dict(list(given.items())[1:])  # without self


def _plain(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
