"""Metrics that know their own reduction, and the keys of ``metrics.jsonl`` that others rely on.

An actor returns ``{"loss": Mean(3.2, 4), "tokens/trained": Sum(512)}``; the controller reduces the dictionaries of all
actors to one of floats, without knowing what each key means.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

METRIC_KEYS: dict[str, str] = {
    "step": "optimizer steps done",
    "wall_time": "unix time in seconds",
    "policy_version": "version of the weights after the step",
    "reward/mean": "mean reward of all completions of the step, before any filtering",
    "reward/std": "standard deviation of the same",
    "loss": "loss of the step, a mean over trained tokens or sequences as the loss says",
    "grad_norm": "global gradient norm before clipping",
    "kl/mean": "mean KL to the reference per trained token, weighted as in the loss, nats",
    "entropy/mean": "mean entropy per trained token, nats",
    "staleness/max": "largest staleness of the episodes of the step, optimizer steps",
    "staleness/mean": "mean of the same",
    "tokens/generated": "sampled tokens of the step",
    "tokens/trained": "tokens in the loss of the step",
    "tokens/fill": "share of the token slots of all rows that hold a token",
    "time/step_s": "the whole step, seconds",
    "time/generate_s": "generation, seconds",
    "time/train_s": "forward, backward and optimizer, seconds",
    "time/weight_sync_s": "publishing and loading weights, seconds",
    "time/wait_generator_s": "waiting for generators, seconds",
    "time/wait_trainer_s": "waiting for trainers, seconds",
    "time/checkpoint_s": "the step was held up by checkpointing, seconds",
    "mismatch/logprob_abs_mean": "mean |generator - trainer| log-probability of the sampled tokens, nats",
}
"""What each key of a GRPO step means."""

SFT_KEYS = (
    *("step", "wall_time", "policy_version", "loss", "grad_norm", "tokens/trained", "tokens/fill"),
    *("time/step_s", "time/train_s", "time/checkpoint_s"),
)
"""The keys of an SFT step: there is no generator and no reward."""


def missing_keys(record: Mapping[str, object], recipe: str) -> list[str]:
    """The keys that ``record``, one line of ``metrics.jsonl`` of ``recipe`` (grpo or sft), ought to have and lacks.

    A recipe of the user's own has only those of every training step.
    """
    keys = {"grpo": METRIC_KEYS, "sft": SFT_KEYS}.get(recipe, SFT_KEYS)
    return [key for key in keys if key not in record]


class Metric(ABC):
    """A value that can be merged with others of its kind."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Both as one. Associative, so sources may be merged in any grouping."""

    @abstractmethod
    def result(self) -> float:
        """The reduced value."""


@dataclass(frozen=True, slots=True)
class Mean(Metric):
    """A mean over ``count`` things; merging weights by the counts."""

    mean: float
    count: float = 1.0

    def merge(self, other: Self) -> Self:
        count = self.count + other.count
        total = sum(part.mean * part.count for part in (self, other) if part.count)
        return type(self)(total / count if count else float("nan"), count)

    def result(self) -> float:
        return self.mean if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class Sum(Metric):
    value: float

    def merge(self, other: Self) -> Self:
        return type(self)(self.value + other.value)

    def result(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Max(Metric):
    value: float

    def merge(self, other: Self) -> Self:
        return self if self.value >= other.value or self.value != self.value else other  # a NaN wins: it must be seen

    def result(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Min(Metric):
    value: float

    def merge(self, other: Self) -> Self:
        return self if self.value <= other.value or self.value != self.value else other

    def result(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Last(Metric):
    """The value of the last source."""

    value: float

    def merge(self, other: Self) -> Self:
        return other

    def result(self) -> float:
        return self.value


def merge(sources: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge the metrics of several sources key by key; a source may lack keys.

    Raises:
        TypeError: a value is no ``Metric``, or two sources disagree on the kind of a key.
    """
    merged: dict[str, Metric] = {}
    for source in sources:
        for key, metric in source.items():
            if not isinstance(metric, Metric):
                raise TypeError(f"metric {key!r} is a {type(metric).__name__}; wrap it in Mean, Sum, Max, Min or Last")
            if key in merged and type(merged[key]) is not type(metric):
                raise TypeError(f"metric {key!r} is {type(merged[key]).__name__} and {type(metric).__name__}")
            merged[key] = merged[key].merge(metric) if key in merged else metric
    return merged


def reduce(sources: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """``merge``, then the value of each key."""
    return {key: float(metric.result()) for key, metric in merge(sources).items()}
