"""The sources of a mixture, each as a configuration of its own, and the names of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, CurriculumConfig, DataConfig, RewardConfig

MAX_SETS = 64
"""Held-out sets of a run: so many find room among the positions of held-out prompts."""
_ORDER = 0x5F7  # the examples of SFT beside RL do not come in the order of the prompts


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


@dataclass(frozen=True)
class HeldOut:
    """A set of held-out examples: ``data.eval_split`` of ``data.eval_path``, or of ``data.path`` where it is null."""

    key: str
    """Of its path in the configuration."""
    label: str
    """What its figures are called; empty for the only one of a run."""
    source: str
    """The source of the run that it belongs to; empty where there is but one."""
    config: Config
    """The run's, or its source's, with the data of this set."""
    num_prompts: int
    rewards: Sequence[RewardConfig]
    """Of its own; none: the run's."""


def held_out_sets(cfg: Config) -> list[HeldOut]:
    """What an evaluation goes through: ``evaluation.sets``, or those of the ``data`` of each source; nothing where
    evaluation is off."""
    data, evaluation = cfg.data, cfg.evaluation
    if not evaluation.num_prompts:
        return []
    found = []
    if not evaluation.sets:
        for run in run_sources(cfg):
            key = f"{run.key}data.{'eval_path' if run.config.data.eval_path else 'path'}"
            label = f"source/{run.name}" if run.name else ""
            found.append(HeldOut(key, label, run.name, run.config, evaluation.num_prompts, ()))
    for i, one in enumerate(evaluation.sets):
        names = ("prompt_field", "target_field", "system_prompt")
        given = {name: value for name in names if (value := getattr(one, name)) is not None}
        given |= {"path": one.path, "eval_path": one.path, "eval_split": one.split or data.eval_split, "name": one.name}
        num = evaluation.num_prompts if one.num_prompts is None else one.num_prompts
        own = dataclasses.replace(cfg, data=dataclasses.replace(data, **given, sources=[]))
        found.append(HeldOut(f"evaluation.sets.{i}.path", one.label, "", own, num, one.reward))
    return found


def with_sft_data(cfg: Config) -> Config | None:
    """The configuration with the data of ``algorithm.sft`` in place of its own, in an order of their own; None where no
    examples are learned beside what is sampled."""
    sft = cfg.algorithm.sft
    if not sft.coef:
        return None
    data = dataclasses.replace(cfg.data, curriculum=CurriculumConfig(), eval_path=None)
    if sft.sources:
        data = dataclasses.replace(data, sources=sft.sources)
    return dataclasses.replace(cfg, data=data, sources=[], seed=cfg.seed ^ _ORDER)


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
