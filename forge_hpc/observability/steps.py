"""The metrics of a run of any length in bounded memory: neighbouring steps are brought together as they are read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_STOPS = ("step", "wall_time")
"""Where a step stands, and no figures of it."""


@dataclass(slots=True)
class Span:
    """The values of one key in some steps."""

    num: int
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        return self.total / self.num

    def add(self, other: Span) -> None:
        self.num += other.num
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(slots=True)
class Bucket:
    """Some steps in a row."""

    first: int
    last: int
    start: float
    """Unix time at which the first began."""
    end: float
    num: int = 1
    spans: dict[str, Span] = field(default_factory=dict)

    def add(self, later: Bucket) -> None:
        self.last, self.end, self.num = later.last, later.end, self.num + later.num
        for key, span in later.spans.items():
            if key in self.spans:
                self.spans[key].add(span)
            else:
                self.spans[key] = span

    def total(self, key: str) -> float:
        return self.spans[key].total if key in self.spans else 0.0

    @property
    def middle(self) -> float:
        """The step in its middle."""
        return (self.first + self.last) / 2


@dataclass(frozen=True, slots=True)
class Mended:
    """Losses that a run has mended while it went on (``recoveries/KIND``), or saves that failed."""

    step: int
    time: float
    what: str
    num: int


class Steps:
    """The steps of a run, brought together in at most twice ``most`` buckets, equally many steps in each.

    Example:
        steps = Steps.read(read_jsonl(run_dir.metrics))
        steps.curve("reward/mean")  # [(step, span), ...]
    """

    MOST_MENDED = 200
    ENDS = 5

    def __init__(self, most: int = 200) -> None:
        self.buckets: list[Bucket] = []
        self.mended: list[Mended] = []
        """The first ``MOST_MENDED`` of them."""
        self.num = 0
        self.last: dict[str, float] = {}
        """The newest value of every key."""
        self.whole: dict[str, Span] = {}
        """Every key over the whole run."""
        self.oldest: list[Mapping[str, Any]] = []
        """The records of the first ``ENDS`` steps."""
        self.newest: deque[Mapping[str, Any]] = deque(maxlen=self.ENDS)
        self._most = most
        self._size = 1

    @classmethod
    def read(cls, records: Iterable[Mapping[str, Any]], most: int = 200) -> Steps:
        steps = cls(most)
        for record in records:
            steps.add(record)
        return steps

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a line of ``metrics.jsonl``."""
        values = {key: float(value) for key, value in record.items() if key not in _STOPS and _is_number(value)}
        step, end = int(record["step"]), float(record.get("wall_time") or 0.0)
        self._see_mended(step, end, values)
        self.last |= values
        if self.num < self.ENDS:
            self.oldest.append(record)
        self.newest.append(record)
        self.num += 1
        spans = {key: Span(1, value, value, value) for key, value in values.items()}
        for key, value in values.items():
            if key in self.whole:
                self.whole[key].add(spans[key])
            else:
                self.whole[key] = Span(1, value, value, value)
        new = Bucket(step, step, end - values.get("time/step_s", 0.0), end, spans=spans)
        if self.buckets and self.buckets[-1].num < self._size:
            self.buckets[-1].add(new)
            return
        self.buckets.append(new)
        if len(self.buckets) > 2 * self._most:
            for left, right in zip(self.buckets[::2], self.buckets[1::2], strict=False):
                left.add(right)
            self.buckets, self._size = self.buckets[::2], 2 * self._size

    def curve(self, key: str) -> list[tuple[float, Span]]:
        """Steps and values of a key, where it has any."""
        return [(bucket.middle, bucket.spans[key]) for bucket in self.buckets if key in bucket.spans]

    def _see_mended(self, step: int, time: float, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if key.startswith("recoveries/") or key == "checkpoint/failed":
                num = int(value - self.last.get(key, 0.0))
                if num > 0 and len(self.mended) < self.MOST_MENDED:
                    what = "saves failed" if key == "checkpoint/failed" else f"lost {key.partition('/')[2]} mended"
                    self.mended.append(Mended(step, time, what, num))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
