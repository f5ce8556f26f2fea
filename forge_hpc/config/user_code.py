"""Loads what a user has written: ``package.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError


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
