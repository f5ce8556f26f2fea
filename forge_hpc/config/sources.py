"""The sources of a mixture, each as a configuration of its own, and the names of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig


@dataclass(frozen=True)
class RunSource:
    """One of the sources of a run's prompts."""

    key: str
    """Where it stands in the configuration, with a dot behind it: ``sources.0.``; empty for the only one."""
    name: str
    """What it is called; empty for the only one."""
    share: Fraction
    """Of all prompts."""
    config: Config
    """The run's, as if there were no other source."""


def run_sources(config: Config) -> list[RunSource]:
    """The sources of ``config.sources``; without any the run itself is the only one."""
    if not config.sources:
        return [RunSource("", "", Fraction(1), config)]
    shares = [Fraction(str(source.share)) for source in config.sources]  # 0.1 is a tenth
    found = []
    for number, (source, share) in enumerate(zip(config.sources, shares, strict=True)):
        data = source.data
        if data.template_date is None:
            data = dataclasses.replace(data, template_date=config.data.template_date)
        own = dataclasses.replace(config, data=data, environment=source.environment, reward=source.reward, sources=[])
        found.append(RunSource(f"sources.{number}.", source.name, share / sum(shares), own))
    return found


def run_source(config: Config, name: str | None) -> Config:
    """The configuration of one source. Raises UserError where ``name`` is none of theirs, or is missing."""
    runs = {run.name: run.config for run in run_sources(config)}
    if name is None and len(runs) == 1:
        return next(iter(runs.values()))
    if name is None or name not in runs or not name:
        known = ", ".join(runs) if config.sources else "none: the configuration has no sources"
        what = "the configuration has several sources" if name is None else f"there is no source {name!r}"
        raise UserError(what, f"name one with --source; there is {known}")
    return runs[name]


def data_sources(data: DataConfig) -> list[tuple[str, DataConfig, float]]:
    """(key, configuration, weight) of each source: ``data`` itself where there is no mixture.

    What a source of ``data.sources`` leaves out is as in ``data``, but for ``name``.
    """
    if not data.sources:
        return [("data", data, 1.0)]
    sources = []
    for i, source in enumerate(data.sources):
        given = {name: value for name, value in dataclasses.asdict(source).items() if value is not None}
        weight = given.pop("weight")
        own = dataclasses.replace(data, **{"name": None, **given, "sources": [], "eval_path": None})
        sources.append((f"data.sources.{i}", own, weight))
    return sources


def find_field(example: Mapping[str, Any], name: str) -> Any:
    """The value of a field; ``reward_model.ground_truth`` is one within another, unless it is itself a field's name.

    Raises:
        KeyError: there is none.
    """
    if name in example:
        return example[name]
    value: Any = example
    for part in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return value
