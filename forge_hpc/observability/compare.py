"""Runs side by side: those that differ in nothing but their seed are one group, with 95 % intervals over its runs.

The intervals are Student's: they say how far the mean of other seeds may lie, as far as so few runs can tell. Where a
figure has a range (a share lies in 0 to 1) an interval ends with it: the mean cannot lie beyond, so what is cut off has
covered nothing. An interval of counts (Wilson's, as evaluations have it) would be another thing: it says how other
questions would be answered by one model, and is far too narrow for other seeds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import yaml

from forge_hpc.config.errors import UserError
from forge_hpc.files import is_there, read_text
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.steps import Steps
from forge_hpc.observability.tables import is_shown, rewards_of_sources, table
from forge_hpc.run_dir import RunDir

_NOT_THE_EXPERIMENT = ("name", "logging", "profile", "slurm")
"""Keys, and groups of keys, that runs of one group may differ in, beside their seed."""
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, for 1 to 10 degrees of freedom."""
_MAX_LABEL = 60
_RANGES = {r"held-out (.+/)?(accuracy|(pass|maj)@\d+)": (0.0, 1.0), r"tokens/s of a GPU": (0.0, math.inf)}
"""Of figures, by what their names are."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of some runs and, of two or more, its 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    num: int

    @classmethod
    def of(cls, values: Sequence[float], range: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
        """``range``: where the values lie, and so their mean."""
        mean, num = fmean(values), len(values)
        if num < 2:
            return cls(mean, None, None, num)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (num - 1))
        half = student_t(num - 1) * deviation / math.sqrt(num)
        return cls(mean, max(range[0], mean - half), min(range[1], mean + half), num)

    def __str__(self) -> str:
        digits = ",.0f" if abs(self.mean) >= 100 else ".3f"
        if self.low is None or self.high is None:
            return f"{self.mean:{digits}}"
        return f"{self.mean:{digits}} ({self.low:{digits}} to {self.high:{digits}})"


@dataclass(slots=True)
class ComparedRun:
    """What is compared of a run."""

    run_dir: RunDir
    config: dict[str, Any]
    """``key.of.it``: value."""
    state: str
    steps: Steps
    evaluations: Steps
    """The lines of ``evaluations.jsonl``."""
    figures: dict[str, float]
    """By the name of its column."""


@dataclass(slots=True)
class Group:
    """Runs of one experiment."""

    differs: dict[str, Any]
    """Where the groups are not the same: this group's values."""
    runs: list[ComparedRun] = field(default_factory=list)

    @property
    def label(self) -> str:
        label = ", ".join(f"{key}={_shown(value)}" for key, value in self.differs.items()) or self.runs[0].run_dir.name
        return label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…"

    @property
    def steps(self) -> str:
        last = sorted(run.steps.newest[-1]["step"] if run.steps.num else 0 for run in self.runs)
        return f"{last[0]:,}" if last[0] == last[-1] else f"{last[0]:,} to {last[-1]:,}"

    @property
    def states(self) -> str:
        return ", ".join(sorted({run.state for run in self.runs}))

    def figures(self) -> dict[str, Interval]:
        names = {name: None for run in self.runs for name in run.figures}
        return {
            name: Interval.of([run.figures[name] for run in self.runs if name in run.figures], range_of(name))
            for name in names
        }


def range_of(name: str) -> tuple[float, float]:
    """Where the values of a figure with this name lie."""
    return next((found for names, found in _RANGES.items() if re.fullmatch(names, name)), (-math.inf, math.inf))


def student_t(freedom: int) -> float:
    """Student's t at 97.5 %; for more than 10 degrees of freedom by its expansion about the normal distribution."""
    return (
        _T[freedom - 1]
        if freedom <= len(_T)
        else 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2 + 2.556 / freedom**3
    )


def find_runs(paths: Iterable[RunDir]) -> list[RunDir]:
    """The runs themselves, and those in a folder of runs, each once.

    Raises:
        UserError: there is none in one of them.
    """
    found: dict[str, RunDir] = {}
    for path in paths:
        runs = [path] if path.has_config else [RunDir(each.parent) for each in sorted(path.path.glob("*/config.yaml"))]
        if not runs:
            raise UserError(f"no run in {path}", "give run directories, or a folder of them")
        found |= {str(run): run for run in runs}
    return list(found.values())


def compare(runs: Iterable[RunDir]) -> list[Group]:
    """The groups of the runs, in the order of the first of each."""
    read = [_read(run) for run in runs]
    common = set.intersection(*(set(run.config) for run in read)) - {"seed"}  # older versions lack keys
    groups: dict[str, Group] = {}
    for run in read:
        identity = json.dumps({key: run.config[key] for key in sorted(common)}, default=str)
        groups.setdefault(identity, Group({})).runs.append(run)
    found = list(groups.values())
    for key in read[0].config:
        if key in common:
            values = [group.runs[0].config[key] for group in found]
            for group, differs in zip(found, _differing(key, values), strict=True):
                group.differs |= differs
    return found


def _differing(key: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each value of a key what differs: of lists of as many items the keys within, ``sources.1.share``."""
    if len({json.dumps(value, default=str) for value in values}) == 1:
        return [{} for _ in values]
    is_list = all(isinstance(value, list) and all(isinstance(item, Mapping) for item in value) for value in values)
    if not is_list or len({len(value) for value in values}) > 1:
        return [{key: value} for value in values]
    flat = [dict(_flat(dict(enumerate(value)), f"{key}.")) for value in values]
    keys = {part: None for each in flat for part in each}
    parts = [_differing(part, [each.get(part) for each in flat]) for part in keys]
    return [{name: value for part in parts for name, value in part[place].items()} for place in range(len(values))]


def render_comparison(groups: Sequence[Group]) -> str:
    """A table for the terminal."""
    figures = [group.figures() for group in groups]
    names = list({name: None for each in figures for name in each})
    rows = [
        [group.label, str(len(group.runs)), group.states, group.steps, *(str(each.get(name, "")) for name in names)]
        for group, each in zip(groups, figures, strict=True)
    ]
    lines = table(("group", "runs", "state", "steps", *names), rows)
    if any(len(group.runs) > 1 for group in groups):
        lines += ["", "95 % intervals over the runs of a group, which differ in their seeds (Student's t)."]
    return "\n".join(lines)


def as_json(groups: Sequence[Group]) -> str:
    """The same for programs."""
    return json.dumps(
        [
            {
                "group": group.label,
                "differs": group.differs,
                "runs": [
                    {"run_dir": str(run.run_dir), "state": run.state, "seed": run.config.get("seed"), **run.figures}
                    for run in group.runs
                ],
                "figures": {
                    name: {"mean": each.mean, "low": each.low, "high": each.high, "num": each.num}
                    for name, each in group.figures().items()
                },
            }
            for group in groups
        ],
        indent=2,
        default=str,
    )


def _read(run_dir: RunDir) -> ComparedRun:
    status = run_dir.read_status()
    steps = Steps.read(read_jsonl(run_dir.metrics))
    figures: dict[str, float] = {}
    for key, name in (("reward/mean", "reward, last 5 steps"), ("loss", "loss, last 5 steps")):
        values = [record[key] for record in steps.newest if record.get(key) is not None]
        if values and not figures:
            figures[name] = fmean(values)
    for name, key in rewards_of_sources(steps.whole).items():
        if values := [record[key] for record in steps.newest if record.get(key) is not None]:
            figures[f"reward of {name}, last 5 steps"] = fmean(values)
    evaluations = Steps.read(read_jsonl(run_dir.evaluations))
    figures |= {f"held-out {key}": value for key, value in evaluations.last.items() if is_shown(key)}
    if speed := steps.whole.get("perf/tokens_per_s"):
        figures["tokens/s of a GPU"] = speed.mean
    state = status.state if status else "unknown"
    return ComparedRun(run_dir, _config(run_dir), state, steps, evaluations, figures)


def _config(run_dir: RunDir) -> dict[str, Any]:
    if not is_there(run_dir.config):
        raise UserError(f"no run in {run_dir}: it has no config.yaml", "give run directories, or a folder of them")
    try:
        config = yaml.safe_load(read_text(run_dir.config)) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{run_dir.config} cannot be read: {' '.join(str(error).split())}") from None
    flat = dict(_flat({key: value for key, value in config.items() if key not in _NOT_THE_EXPERIMENT}))
    if not flat.get("data.chat_template"):
        flat.pop("data.template_date", None)  # the day of the submission; only templates see it
    return flat


def _flat(config: Mapping[Any, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
