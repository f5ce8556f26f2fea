"""Tables for the terminal that are Markdown too."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

PARTS_OVERLAP = "Parts overlap, or are within others: their shares may add up to more than 100 %."
"""Below a table of ``time/*``."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns, the first to the left and the others to the right."""
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return [line(header), f"| {' | '.join(rule)} |", *(line(row) for row in rows)]


_SAMPLED = re.compile(r"(pass|maj|best)@\d+")
_SOURCE_REWARD = re.compile("source/([^/]+)/reward/mean")


def evaluation_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records of ``evaluations.jsonl``, one a line, with 95 % intervals; a single one has a line a figure."""
    keys = {key: None for record in records for key in record}
    sampled = sorted((key for key in keys if is_sampled(key) and "/" not in key), key=_place)
    columns = {"accuracy": "greedy accuracy"} | {key: key for key in sampled}
    columns |= {"reward": "reward", "reward_sampled": "reward, sampled", "num_prompts": "prompts"}
    columns |= {key: key for key in keys if "/" in key and (key.endswith("/accuracy") or is_sampled(key))}
    columns = {key: name for key, name in columns.items() if any(record.get(key) is not None for record in records)}
    if len(records) == 1:
        rows = [[name, _value(records[0], key), _interval(records[0], key)] for key, name in columns.items()]
        return table(["held-out prompts", "", "95 % interval"], rows)
    rows = [[str(record["step"]), *(_cell(record, key) for key in columns)] for record in records]
    return table(["step", *columns.values()], rows)


def is_sampled(key: str) -> bool:
    """Whether it is a figure of the sampled answers of an evaluation, such as ``pass@4``, of all prompts or a set's."""
    return _SAMPLED.fullmatch(key.rpartition("/")[2]) is not None


def is_shown(key: str) -> bool:
    """Whether it is one of the figures by which evaluations are compared, of all prompts or a set's."""
    return key.rpartition("/")[2] in ("accuracy", "loss") or is_sampled(key)


def rewards_of_sources(keys: Iterable[str]) -> dict[str, str]:
    """Which of the keys is the mean reward of a source (``sources``), by the source's name, in their order."""
    found = ((_SOURCE_REWARD.fullmatch(key), key) for key in keys)
    return {match[1]: key for match, key in found if match}


def split_set(key: str, keys: Container[str]) -> tuple[str, str]:
    """The set or source that a figure of an evaluation with these keys is of, empty for all prompts, and the figure:
    ``gsm8k``, ``accuracy``."""
    label = ""
    for place in (place for place, letter in enumerate(key) if letter == "/"):
        if f"{key[:place]}/num_prompts" in keys or f"{key[:place]}/num_documents" in keys:
            label = key[:place]
    return label.removeprefix("source/"), key[len(label) :].removeprefix("/")


def _place(key: str) -> tuple[str, int]:
    name, _, k = key.partition("@")
    return name, int(k)


def _cell(record: Mapping[str, Any], key: str) -> str:
    interval = _interval(record, key)
    return _value(record, key) + (f" ({interval})" if interval else "")


def _value(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _interval(record: Mapping[str, Any], key: str) -> str:
    low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
