"""Nodes without a network: what a run lacks is said before the queue, and a job that lacks nothing asks no hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from forge_hpc.config import Config, UserError
from forge_hpc.config.hub_cache import nodes_environ
from forge_hpc.config.sources import run_sources
from forge_hpc.hub.assets import Asset, assets_of, find_cached, named
from forge_hpc.hub.pins import Pins


def missing_assets(cfg: Config, run_dir: Path, environ: Mapping[str, str] = os.environ) -> list[Asset]:
    """What a run of `cfg` has from the hub, and the cache lacks that ``environ`` says; at the commits it began with."""
    pins = Pins(run_dir)
    needed = [replace(asset, name=pins.named(asset.name, asset.kind)) for asset in assets_of(cfg)]
    return [asset for asset in needed if find_cached(asset, environ) is None]


def check_cache(cfg: Config, run_dir: Path, command: str) -> list[str]:
    """What is said before the queue of things that nodes would have to fetch: a line of warning, or none.

    Args:
        command: that which fetches them.

    Raises:
        UserError: something is missing, and nodes have no network (``cluster.offline``).
    """
    missing = missing_assets(cfg, run_dir, nodes_environ(cfg.slurm.setup))
    if not missing:
        return []
    names = named(missing)
    if cfg.cluster.offline:
        raise UserError(f"the cache lacks {names}, and nodes have no network (cluster.offline)", f"here: {command}")
    return [f"the cache lacks {names}: the job would fetch it while its nodes wait. Before: {command}"]


def offline_environ(cfg: Config, run_dir: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for the processes of this node that keep them from asking the hub.

    Empty where something is not in the cache, or code of the user's may ask for what no configuration names, and the
    nodes have a network. What the user has set stays.
    """
    offline = cfg.cluster.offline or not (_has_own_code(cfg) or missing_assets(cfg, run_dir, environ))
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if offline else ()
    return {name: "1" for name in names if name not in environ}


def _has_own_code(cfg: Config) -> bool:
    names = [cfg.recipe, cfg.algorithm.loss]
    names += [reward.name for one in cfg.evaluation.sets for reward in one.reward]
    for run in run_sources(cfg):
        names += [run.config.environment.name or "", *(reward.name for reward in run.config.reward)]
    return any(":" in name for name in names)
