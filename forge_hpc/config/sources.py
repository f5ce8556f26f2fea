"""The sources of a mixture, each as a configuration of its own."""

from __future__ import annotations

import dataclasses

from forge_hpc.config.schema import DataConfig


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
