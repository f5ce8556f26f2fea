"""The house keeps its plan: recipes/ holds recipes, nobody else names one, no file needs one that needs it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import PROJECT

from forge_hpc.config.registry import RECIPES

FILES = sorted(path for room in ("forge_hpc", "launchers") for path in (PROJECT / room).rglob("*.py"))
MAX_LINES = 150


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it, for types alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inside)


def test_recipes_holds_recipes_and_none_is_longer_than_a_page() -> None:
    files = {path.stem: path for path in (PROJECT / "forge_hpc/recipes").glob("*.py")}
    assert files.keys() == {*RECIPES, "base", "__init__"}
    assert all(len(files[name].read_text().splitlines()) <= MAX_LINES for name in RECIPES)


def test_no_line_outside_recipes_compares_with_the_name_of_one() -> None:
    names = "|".join(RECIPES)
    compares = re.compile(rf"recipe\b[^#\n]*(==|!=|\bin\b)[^#\n]*[\"'](?:{names})[\"']")
    found = [
        f"{path.relative_to(PROJECT)}:{number}"
        for path in FILES
        if path.parent.name != "recipes"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if compares.search(line)
    ]
    assert found == []


def test_no_files_import_each_other_in_a_circle() -> None:
    below = {name: {found for found in imports(path) if found in MODULES} - {name} for name, path in MODULES.items()}
    while leaves := [name for name, needed in below.items() if not needed & below.keys()]:
        for name in leaves:
            del below[name]
    # What is left either stands in a circle or leads into one.
    while tops := [name for name in below if not any(name in needed for needed in below.values())]:
        for name in tops:
            del below[name]
    assert sorted(below) == []


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_loads_without_torch(name: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from forge_hpc.config import Config; from forge_hpc.config.recipes import needs_of; "
        f"needs_of(Config(recipe={name!r})); assert not {{'torch', 'vllm', 'monarch'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, timeout=120)
