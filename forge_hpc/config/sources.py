"""The sources of a mixture, each as a configuration of its own, and the names of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from forge_hpc.config.schema import Config, CurriculumConfig, DataConfig

_ORDER = 0x5F7  # the examples of SFT beside RL do not come in the order of the prompts


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


def with_sft_data(cfg: Config) -> Config | None:
    """The configuration with the data of ``algorithm.sft`` in place of its own, in an order of their own; None where no
    examples are learned beside what is sampled."""
    sft = cfg.algorithm.sft
    if not sft.coef:
        return None
    data = dataclasses.replace(cfg.data, curriculum=CurriculumConfig(), eval_path=None)
    if sft.sources:
        data = dataclasses.replace(data, sources=sft.sources)
    return dataclasses.replace(cfg, data=data, seed=cfg.seed ^ _ORDER)


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
