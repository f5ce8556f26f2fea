"""What a user has written, ``package.module:name`` or ``file.py:name``: found without running it, and loaded."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import symtable
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from forge_hpc.config.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
_forget: list[Callable[[], None]] = []


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """``functools.cache`` for what follows from a user's code: ``forget_user_code`` empties it."""
    cached = functools.cache(function)
    _forget.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget_user_code(files: Iterable[Path]) -> None:
    """Have the next ``load_user_code`` of this process read these files, and what follows from them, anew."""
    paths = {str(file) for file in files}
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) in paths:
            del sys.modules[name]
    importlib.invalidate_caches()
    for forget in _forget:
        forget()


def find_user_code(key: str, file: Path, name: str) -> ast.stmt | None:
    """The function or class `name` at the top level of `file`; None for something else that is called so. Nothing runs.

    Raises:
        UserError: the file cannot be read or does not compile, or nothing at its top level has the name; ``key`` says
            where it was named.
    """
    try:
        source = file.read_text(encoding="utf-8")
        table = symtable.symtable(source, str(file), "exec")
    except FileNotFoundError:
        raise UserError(
            f"{key}: no such file: {file}", "a relative path is looked for beside the YAML, then here"
        ) from None
    except SyntaxError as error:
        raise UserError(f"{key}: {file}:{error.lineno}: {error.msg}", "mend the file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {file}: {error}", "check the path and its permissions") from None
    names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    if name not in names:
        raise UserError(f"{key}: {file} has no {name!r}", nearest(name, names) or "define it at top level")
    for statement in reversed(ast.parse(source).body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and statement.name == name:
            return statement
    return None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """A hint at what was meant."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]}?" if close else None


def load_user_code(name: str, kind: str) -> Callable[..., Any]:
    """The function or class that `name` means. Runs the user's module.

    Args:
        kind: what it is to be, for messages: ``reward``, ``loss``.

    Raises:
        UserError: there is no such thing, or it cannot be called.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UserError(f"{name!r} does not say where the {kind} is", "write package.module:name or file.py:name")
    module = _load_file(Path(place), kind) if place.endswith(".py") else _import(place, kind)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{place} has no function or class {attribute!r}", f"check the name of the {kind}")
    return found


def _load_file(path: Path, kind: str) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"no such {kind} file: {path}", f"name the {kind} as file.py:name")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # it may import its neighbours; at the end, so that they hide nothing
    module_name = f"forge_hpc_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _import(module_name: str, kind: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # found, but something that it imports is missing
        raise UserError(
            f"no module {module_name!r} for a {kind}", "is it installed, or in the current directory?"
        ) from None
