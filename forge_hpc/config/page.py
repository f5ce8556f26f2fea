"""docs/configuration.md, made from the schema: ``python -m forge_hpc.config.page``, or ``make configuration``."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from forge_hpc.config.fields import FIXED, ROUNDING, Rule, hints, item_class, not_none, rules
from forge_hpc.config.schema import Config

_HEAD = """# Every key of the configuration

Made from `forge_hpc/config/schema.py` by `make configuration`: change it there.

In a YAML file the dots are levels; on the command line a key is written as here: `trainer.optimizer.lr=1e-6`. Paths are
looked for beside the file that names them, then where you are.

The last column is for a run that exists (`forge-hpc resume RUN_DIR key=value`): **yes**, the key may change; **bits**,
it may, and sums may then be added up in another order, so that the last bit can move, which `starts.jsonl` says; empty,
it may not, because another value is another experiment: `forge-hpc resume --from RUN_DIR` begins one from a checkpoint.
"""
_COLUMNS = "| key | default | values | |\n|---|---|---|---|"
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def page() -> str:
    """The text of docs/configuration.md."""
    lines = [_HEAD]
    for title, text, rows in _sections(Config, "", FIXED):
        lines += [f"## {title}\n", *([f"{text}\n"] if text else []), _COLUMNS, *rows, ""]
    return "\n".join(lines)


def _sections(
    cls: type, prefix: str, resume: str, shown: dict[type, str] | None = None
) -> Iterator[tuple[str, str, list[str]]]:
    """(title, introduction, rows) of a section of the configuration, then those of the sections within it; one that was
    ``shown`` elsewhere is a row."""
    shown = {} if shown is None else shown
    texts, kinds, inner = docstrings(cls), hints(cls), []
    rows = []
    for field in dataclasses.fields(cls):
        kind, rule, key = kinds[field.name], rules(cls, resume)[field.name], f"{prefix}{field.name}"
        section = item_class(kind)
        if (elsewhere := shown.get(section or kind)) is not None:
            rows.append(f"| `{key}` | `{elsewhere}` | as `{elsewhere}` | |")
            continue
        if section is not None or dataclasses.is_dataclass(kind):
            inner.append((section or kind, f"{key}.{'0.' if section else ''}", rule.resume))
        if not dataclasses.is_dataclass(kind):
            values = f"a list: see below. {texts[field.name]}" if section else f"{_values(kind, rule)}. "
            about = values if section else values + texts[field.name]
            mark = {FIXED: "", ROUNDING: "bits"}.get(rule.resume, "yes")
            rows.append(f"| `{key}` | {_default(field, section)} | {_cell(about)} | {mark} |")
    if rows:
        introduction = "" if cls is Config else " ".join((inspect.getdoc(cls) or "").split())
        own = "" if introduction.startswith(cls.__name__) else introduction
        yield (f"`{prefix.rstrip('.')}`" if prefix else "The run"), own.replace("``", "`"), rows
    for section, inner_prefix, inner_resume in inner:
        shown[section] = inner_prefix.removesuffix("0.").removesuffix(".")
        yield from _sections(section, inner_prefix, inner_resume, shown)


def docstrings(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, in one line; empty for a section, which says it itself."""
    body = next(s.body for s in _parse(cls.__module__) if isinstance(s, ast.ClassDef) and s.name == cls.__name__)
    found = {field.name: "" for field in dataclasses.fields(cls)}
    for statement, after in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            name, text = ast.unparse(statement.target), ast.literal_eval(after.value)
            found[name] = " ".join(text.split()).replace("``", "`")
    return found


@functools.cache
def _parse(module: str) -> list[ast.stmt]:
    return ast.parse(inspect.getsource(sys.modules[module])).body


def _values(kind: Any, rule: Rule) -> str:
    """What a key takes."""
    bare = not_none(kind)
    names = ", ".join(f"`{name}`" for name in rule.choices)
    if names:
        text = f"{names}, or your own" if rule.code else names
    else:
        arguments = typing.get_args(bare)
        is_list = typing.get_origin(bare) is list
        text = f"list of {_TYPES[arguments[0]]}s" if is_list else _TYPES.get(bare, "mapping")
        text = "list of texts" if text == "list of texts" else text
        if rule.range is not None:
            text += f", {rule.range.text}"
        if rule.path:
            text = "path or name"
    return text if bare is kind else f"{text}, or null"


def _default(field: dataclasses.Field[Any], section: type | None) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_shown(field.default)}`"
    assert field.default_factory is not dataclasses.MISSING
    value = field.default_factory()
    return f"`{_shown([item.name for item in value] if section else value)}`"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) if value != "" else '""'


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
