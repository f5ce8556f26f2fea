"""The first and the last groups of ``rollouts.jsonl``, which may be larger than memory."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forge_hpc.files import asking
from forge_hpc.observability.jsonl import read_lines

_READ_BYTES = 8 << 20
"""Looked at from either end."""
NUM_GROUPS = 3

Group = list[dict[str, Any]]
"""The samples kept of one prompt at one step."""


def first_and_last(path: Path, num_groups: int = NUM_GROUPS) -> tuple[list[Group], list[Group]]:
    """Groups of the first step, and of the last one where it is another, within 8 MiB of the ends."""
    try:
        file = asking(path, lambda: path.open("rb"))
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    with file:
        head = file.read(_READ_BYTES)
        size = file.seek(0, io.SEEK_END)
        tail_at = max(0, size - _READ_BYTES)
        file.seek(tail_at)
        tail = file.read(_READ_BYTES)
    if tail_at:
        tail = tail.partition(b"\n")[2]  # the line that was cut
    first, last = _records(head), _records(tail)
    first = [record for record in first if record["step"] == first[0]["step"]]
    last = [record for record in last if record["step"] == last[-1]["step"]]
    if first and last and first[0]["step"] == last[0]["step"]:
        last = []
    return _groups(first, num_groups), _groups(last, num_groups)


def _records(data: bytes) -> list[dict[str, Any]]:
    return list(read_lines(io.BytesIO(data)))


def _groups(records: Iterable[dict[str, Any]], num: int) -> list[Group]:
    """By prompt, in order, whole groups first; of several sources one of each before a second one."""
    groups: dict[object, Group] = {}
    for record in records:
        groups.setdefault(record.get("position"), []).append(record)
    num_before: Counter[object] = Counter()
    ordered: list[tuple[int, Group]] = []
    for group in sorted(groups.values(), key=len, reverse=True):
        source = group[0].get("source")
        ordered.append((num_before[source], group))
        num_before[source] += 1
    return [group for _, group in sorted(ordered, key=lambda pair: pair[0])[:num]]
