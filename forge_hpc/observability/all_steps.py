"""The figures of all steps of a run, of any length, in one pass and in bounded memory: for texts about it.

What a page draws of them: ``steps``.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from forge_hpc.observability.console import tokens_per_second

MOST = 4096
"""Values that are kept of a key: quantiles of more steps than these are those of every second, fourth, … step."""
ENDS = 5
"""Steps averaged at either end of a run."""


class Series:
    """The values of one key. ``count``, ``total``, ``low``, ``high`` and both ends are exact.

    Args:
        most: values that are kept.
    """

    def __init__(self, most: int = MOST) -> None:
        self.count, self.total, self.low, self.high = 0, 0.0, math.inf, -math.inf
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=ENDS)
        self.kept = array("d")
        """Of every so many steps, all of them while there are at most ``most``."""
        self._most, self._stride = most, 1

    def add(self, value: float) -> None:
        """The value of the next step that has one."""
        if self.count % self._stride == 0:
            if len(self.kept) == self._most:
                self.kept, self._stride = self.kept[::2], 2 * self._stride
            if self.count % self._stride == 0:
                self.kept.append(value)
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        if len(self.first) < ENDS:
            self.first.append(value)
        self.last.append(value)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the values lies, interpolated. There must be one."""
        return self.high if share == 1 else quantile(self.kept, share)


class AllSteps:
    """All records of ``metrics.jsonl`` together.

    Example:
        steps = AllSteps(read_jsonl(run_dir.metrics))
        steps["reward/mean"].quantile(0.5)
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.num = 0
        self.newest: deque[dict[str, Any]] = deque(maxlen=ENDS)
        """The last records themselves."""
        self.num_failed_episodes = self.num_kept_episodes = 0.0
        self._series: dict[str, Series] = {}
        self.speed = Series()
        """Tokens per second."""
        for record in records:
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        self.num += 1
        self.newest.append(record)
        for key, value in record.items():
            if isinstance(value, int | float):
                self._series.setdefault(key, Series()).add(value)
        self.speed.add(tokens_per_second(record))
        if length := record.get("response/length_mean"):
            self.num_failed_episodes += record.get("episodes/failed") or 0.0
            self.num_kept_episodes += record["tokens/generated"] / length

    def __getitem__(self, key: str) -> Series:
        """An empty one where no step has the key."""
        return self._series.get(key) or Series(1)

    @property
    def names(self) -> list[str]:
        """The keys that a step has."""
        return sorted(self._series)

    def first(self, key: str) -> float | None:
        """The mean of the first five values; None where there are none."""
        return _mean(self[key].first)

    def last(self, key: str) -> float | None:
        """The mean of the last five."""
        return _mean(self[key].last)

    def ends(self, key: str) -> str:
        """Both in words, or the mean of all values while they are fewer than ten. There must be one."""
        values = self[key]
        if values.count < 2 * ENDS:
            return f"{values.total / values.count:.3f} (mean of {values.count} step{'s' * (values.count > 1)})"
        return f"{fmean(values.first):.3f} (first {ENDS} steps) -> {fmean(values.last):.3f} (last {ENDS} steps)"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lies, interpolated. ``values`` must not be empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
