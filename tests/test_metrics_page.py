"""docs/metrics.md and the code say the same. That real runs write no other key is asked where they run: ``runs``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import PROJECT, explained_metrics, pattern_of

from forge_hpc.observability.metrics import METRIC_KEYS
from forge_hpc.rewards.errors import RewardError

PAGE = explained_metrics()


def literals() -> set[str]:
    """All texts of the code, what is put in while it runs as X; without the module that only explains."""
    return {text for path in (PROJECT / "forge_hpc").rglob("*.py") if path.name != "metrics.py" for text in texts(path)}


def texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


CODE = literals()


@pytest.mark.parametrize("key", PAGE, ids=str)
def test_every_key_on_the_page_is_written_by_some_code(key: str) -> None:
    assert any(re.fullmatch(pattern_of(key), text) for text in CODE), f"no code writes {key}"


def test_every_key_has_a_unit_or_is_a_plain_number_and_an_explanation() -> None:
    assert all(explanation for _, explanation in PAGE.values())
    assert all(PAGE[key][0] for key in PAGE if key.startswith(("time/", "tokens/")) or key.endswith("_s"))
    assert len(PAGE) > 40


def test_the_keys_that_others_rely_on_are_on_the_page() -> None:
    assert METRIC_KEYS.keys() <= PAGE.keys()
    assert all(f"`{kind}`" in PAGE["rewards/failed_KIND"][1] for kind in RewardError.KINDS)


def test_what_looks_like_the_key_of_a_step_in_the_code_is_on_the_page() -> None:
    rooms = {key.partition("/")[0] for key in PAGE if "/" in key}
    looks = re.compile(rf"({'|'.join(rooms)})/[a-z_A-Z]+")
    found = {text for text in CODE if looks.fullmatch(text)} - {
        "tokens/s",
        "rewards/failed_",
        "source/X",
    }  # a speed, pieces
    assert len(found) > 30
    missing = {text for text in found if not any(re.fullmatch(pattern_of(key), text) for key in PAGE)}
    assert not missing
