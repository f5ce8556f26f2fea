"""The sources of a mixture, each as a configuration of its own, and the names of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_hpc.config.schema import Config, DataConfig, RewardConfig

MAX_SETS = 64
"""Held-out sets of a run: so many find room among the positions of held-out prompts."""


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
    """What its figures are called; empty for the only one of a run without ``evaluation.sets``."""
    data: DataConfig
    num_prompts: int
    rewards: Sequence[RewardConfig]
    """Of its own; none: the run's."""


def held_out_sets(cfg: Config) -> list[HeldOut]:
    """What an evaluation goes through: ``evaluation.sets``, or that of ``data``; nothing where evaluation is off."""
    data, evaluation = cfg.data, cfg.evaluation
    if not evaluation.num_prompts:
        return []
    if not evaluation.sets:
        key = "data.eval_path" if data.eval_path else "data.path"
        return [HeldOut(key, "", data, evaluation.num_prompts, ())]
    found = []
    for i, one in enumerate(evaluation.sets):
        names = ("prompt_field", "target_field", "system_prompt")
        given = {name: value for name in names if (value := getattr(one, name)) is not None}
        given |= {"path": one.path, "eval_path": one.path, "eval_split": one.split or data.eval_split, "name": one.name}
        own = dataclasses.replace(data, **given, sources=[])
        num = evaluation.num_prompts if one.num_prompts is None else one.num_prompts
        found.append(HeldOut(f"evaluation.sets.{i}.path", one.label, own, num, one.reward))
    return found


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
