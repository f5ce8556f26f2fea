"""Tables that fit the terminal that they are shown on, and those who read them by a program."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_GAP = "  "
_MIN_NAME = 12
"""The first column is cut down to so many characters before another one is left out."""
_MIN_LAST = 24
"""The same of the last one where that has words."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    rank: int = 0
    """Where there is no room the column of the highest rank is left out first; one of rank 0 stays."""
    right: bool = True
    """Numbers stand at the right."""


def width_of_terminal() -> int | None:
    """Characters a line, by ``COLUMNS`` or the terminal; None where nobody looks, and lines may have any length."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Lines of a table no wider than ``width``: columns are left out by their rank, names and last words are cut."""
    kept = [index for index, column in enumerate(columns) if any(row[index] for row in rows) or not column.rank]
    widths = {index: max([len(columns[index].name), *(len(row[index]) for row in rows)]) for index in kept}

    def total(first: int) -> int:
        last = widths[kept[-1]] if columns[kept[-1]].right else min(widths[kept[-1]], _MIN_LAST)
        between = sum(widths[index] for index in kept[1:-1])
        return first + between + (last if len(kept) > 1 else 0) + len(_GAP) * (len(kept) - 1)

    while width is not None and total(min(widths[0], _MIN_NAME)) > width:
        least = max(kept, key=lambda index: columns[index].rank)
        if not columns[least].rank:
            break
        kept.remove(least)
    if width is not None:
        widths[0] = max(1, min(widths[0], width - total(0)))
    lines = []
    for row in ([column.name for column in columns], *rows):
        cells = [_cut(row[index], widths[index]) for index in kept]
        sides = [columns[index].right for index in kept]
        words = [c.rjust(widths[i]) if r else c.ljust(widths[i]) for c, r, i in zip(cells, sides, kept, strict=True)]
        lines.append(cut(_GAP.join(words).rstrip(), width))
    return lines


def cut(line: str, width: int | None) -> str:
    """``line`` in at most ``width`` characters, its end left out where it is too long."""
    return line if width is None else _cut(line, width)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON array with an object a line."""
    return "[" + ",\n ".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]"
