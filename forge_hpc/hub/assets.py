"""What a run needs of the Hugging Face hub, by its configuration, and whether the cache has it whole.

Imports none of the hub's libraries: ``submit`` asks it on the login node, and every node at its start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forge_hpc.config import Config, UserError
from forge_hpc.config.hub_cache import (
    MODEL_FILES,
    are_there,
    cached_commit,
    cached_snapshot,
    listed_files,
    repo_folder,
    split_name,
)
from forge_hpc.config.models import check_tokenizer, check_weights, looks_local, read_model_config
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import DataConfig
from forge_hpc.config.sources import data_sources, held_out_sets, run_sources, with_sft_data

NOTE = "forge-hpc"
"""Folder beside ``snapshots`` of a data set: which files of a commit a configuration of it is made of."""
_FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Asset:
    """A model with its tokenizer, or the files of a data set."""

    kind: str
    """model, dataset."""
    name: str
    """``OWNER/NAME``, or ``OWNER/NAME@REVISION``."""
    keys: tuple[str, ...]
    """Who asks for it."""
    config: str | None = None
    """Of a data set that has several."""
    splits: tuple[str, ...] = ()
    """Those that are read; without any it is all that its repository holds."""

    @property
    def repo(self) -> str:
        return split_name(self.name)[0]

    @property
    def revision(self) -> str | None:
        return split_name(self.name)[1]

    def __str__(self) -> str:
        what = "model" if self.kind == "model" else "data set"
        return f"{what} {self.name}" + (f" ({self.config})" if self.config else "")


def is_hub_name(path: str | None) -> bool:
    """Whether a path of the configuration is for the hub: no built-in thing, no warm start, nothing local."""
    if not path or path == "warmstart" or path.startswith("builtin:") or path.endswith(_FILES) or looks_local(path):
        return False
    try:
        split_name(path)
    except ValueError:
        return False
    return True


def assets_of(cfg: Config, *, warm_start: bool = True) -> list[Asset]:
    """All that a run of `cfg` asks the hub for, and its warm start; each once."""
    found: dict[tuple[str, str, str | None], Asset] = {}
    for asset in [*_assets(cfg), *(_warm_assets(cfg) if warm_start else ())]:
        place = (asset.kind, asset.name, asset.config)
        if (old := found.get(place)) is not None:
            keys, splits = (*old.keys, *asset.keys), (*old.splits, *asset.splits)
            asset = replace(old, keys=tuple(dict.fromkeys(keys)), splits=tuple(dict.fromkeys(splits)))
        found[place] = asset
    return list(found.values())


def _assets(cfg: Config) -> Iterator[Asset]:
    paths = {"model.path": cfg.model.path}
    paths |= {f"the model {name!r}": need.path for name, need in needs_of(cfg).models.items() if need.path is not None}
    paths |= {f"served.{i}.path": one.path for i, one in enumerate(cfg.served)}
    for key, path in paths.items():
        if is_hub_name(path):
            yield Asset("model", path, (key,))
    for run in run_sources(cfg):
        for key, data, _ in data_sources(run.config.data):
            yield from _data(f"{run.key}{key}.path", data, data.path, data.split)
    if (examples := with_sft_data(cfg)) is not None and cfg.algorithm.sft.sources:
        for key, data, _ in data_sources(examples.data):
            yield from _data(f"{key.replace('data', 'algorithm.sft', 1)}.path", data, data.path, data.split)
    for held_out in held_out_sets(cfg):
        data = held_out.config.data
        if data.eval_path or not data.sources:
            yield from _data(held_out.key, data, data.eval_path or data.path, data.eval_split)


def _warm_assets(cfg: Config) -> Iterator[Asset]:
    if cfg.model.path == "warmstart" and cfg.warmstart.config and Path(cfg.warmstart.config).expanduser().is_file():
        from forge_hpc.config import load_config

        for asset in _assets(load_config(cfg.warmstart.config, cfg.warmstart.overrides)):
            yield replace(asset, keys=tuple(f"warm start: {key}" for key in asset.keys))


def _data(key: str, data: DataConfig, path: str, split: str) -> Iterator[Asset]:
    if is_hub_name(path):
        names = tuple(part.strip().partition("[")[0] for part in split.split("+"))
        yield Asset("dataset", path, (key,), data.name, names)


# --- what the cache has


@dataclass(frozen=True)
class Cached:
    """Something that is in the cache, whole."""

    commit: str
    snapshot: Path
    num_bytes: int


def find_cached(asset: Asset, environ: Mapping[str, str] = os.environ) -> Cached | None:
    """It as the cache has it; None where it, or part of it, is not there."""
    commit, snapshot = cached_commit(asset.name, asset.kind, environ), cached_snapshot(asset.name, asset.kind, environ)
    if commit is None or snapshot is None:
        return None
    folder = repo_folder(asset.repo, asset.kind, environ)
    if asset.kind == "model":
        files = listed_files(folder, commit, MODEL_FILES)
        if files is None:  # fetched by other means: complete, as far as it says itself
            try:
                read_model_config(snapshot)
                check_weights(snapshot)
                check_tokenizer(snapshot)
            except UserError:
                return None
            files = {path.name: path.stat().st_size for path in snapshot.iterdir() if path.is_file()}
    else:
        files = read_note(folder, commit).get(asset.config or "") or listed_files(folder, commit)
    if not files or not are_there(snapshot, files):
        return None
    return Cached(commit, snapshot, sum(files.values()))


def read_note(folder: Path, commit: str) -> dict[str, dict[str, int]]:
    """By configuration of a data set ("" is its own choice) the files that it is made of, and their bytes."""
    try:
        notes = json.loads((folder / NOTE / f"{commit}.json").read_text(encoding="utf-8"))
        return {str(config): dict(files) for config, files in notes.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def named(assets: Sequence[Asset]) -> str:
    """Assets with those who ask for them, for a message."""
    return ", ".join(f"the {asset} [{', '.join(asset.keys)}]" for asset in assets)
