"""``RUN_DIR/hub.json``: the commit of everything that the run has from the hub, so that all its starts read the same.

    {"models": {"Qwen/Qwen3-8B": "b968826d…"}, "datasets": {"openai/gsm8k": "e53f048…"}}

Written where the run is submitted, from the cache, and on the first node for what is fetched there. What stands there
stays, whatever becomes of the branch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from forge_hpc.config import Config
from forge_hpc.config.hub_cache import split_name
from forge_hpc.config.schema import DataConfig
from forge_hpc.files import atomic_write_json
from forge_hpc.hub.assets import Asset, assets_of, find_cached, is_hub_name

FILE = "hub.json"


class Pins:
    """The commits of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        try:
            self._known: dict[str, dict[str, str]] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._known = {}

    def get(self, asset: Asset) -> str | None:
        """The commit of an asset, None where it is not known yet."""
        return self._known.get(f"{asset.kind}s", {}).get(asset.name)

    def add(self, commits: Mapping[Asset, str]) -> None:
        """Note the commits of assets that have none."""
        new = {asset: commit for asset, commit in commits.items() if self.get(asset) is None}
        if not new:
            return
        for asset, commit in new.items():
            self._known.setdefault(f"{asset.kind}s", {})[asset.name] = commit
        atomic_write_json(self.path, self._known)

    def named(self, path: str, kind: str = "model") -> str:
        """What a path of the configuration means in this run: ``OWNER/NAME@COMMIT``, or the path as it is."""
        if not is_hub_name(path) or (commit := self._known.get(f"{kind}s", {}).get(path)) is None:
            return path
        return f"{split_name(path)[0]}@{commit}"

    def data_of(self, cfg: Config) -> Config:
        """`cfg` with the data sets of this run."""
        runs = [replace(run, data=self._data(run.data)) for run in cfg.sources]
        sets = [replace(one, path=self.named(one.path, "dataset")) for one in cfg.evaluation.sets]
        evaluation = replace(cfg.evaluation, sets=sets)
        return replace(cfg, data=self._data(cfg.data), sources=runs, evaluation=evaluation)

    def _data(self, data: DataConfig) -> DataConfig:
        sources = [replace(source, path=self.named(source.path, "dataset")) for source in data.sources]
        eval_path = None if data.eval_path is None else self.named(data.eval_path, "dataset")
        return replace(data, path=self.named(data.path, "dataset"), sources=sources, eval_path=eval_path)


def pin_cached(cfg: Config, run_dir: Path, environ: Mapping[str, str]) -> Pins:
    """The run's commits, with those that the cache has whole."""
    pins = Pins(run_dir)
    new = [asset for asset in assets_of(cfg, warm_start=False) if pins.get(asset) is None]
    found = {asset: cached.commit for asset in new if (cached := find_cached(asset, environ)) is not None}
    pins.add(found)
    return pins


def pin_all(cfg: Config, run_dir: Path) -> Pins:
    """The run's commits, with those that the hub has now of what the cache lacks. A hub that does not answer is for who
    fetches it to name."""
    pins = pin_cached(cfg, run_dir, os.environ)
    for asset in assets_of(cfg, warm_start=False):
        if pins.get(asset) is None:
            from httpx import TransportError
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

            with suppress(HfHubHTTPError, OfflineModeIsEnabled, TransportError, OSError):
                commit = HfApi().repo_info(asset.repo, repo_type=asset.kind, revision=asset.revision, timeout=30.0).sha
                pins.add({asset: commit} if commit else {})
    return pins
