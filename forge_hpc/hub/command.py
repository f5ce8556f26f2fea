"""What ``forge-hpc fetch`` does: look, ask the hub, see that there is room, fetch, and say what is where."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from forge_hpc.config import Config, UserError, print_error, validate
from forge_hpc.config.hub_cache import hub_cache, nodes_environ, split_name
from forge_hpc.hub.assets import Asset, assets_of, find_cached
from forge_hpc.hub.pins import Pins
from forge_hpc.observability.tables import table

if TYPE_CHECKING:
    from forge_hpc.hub.download import Plan


def fetch(
    config: Path | None,
    run_dir: Path | None,
    overrides: Sequence[str],
    site: str | None,
    models: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> int:
    """Bring to the cache what a run of the configuration has from the hub, and these models and data sets; the exit
    code.

    Everything is tried, whatever fails; a table of it is printed at the end.

    Raises:
        UserError: a wrong configuration or name; the hub cannot be reached, or there is no room.
    """
    assets = [_extra("model", name) for name in models] + [_extra("dataset", name) for name in datasets]
    if config is not None or run_dir is not None or not assets:
        from forge_hpc.submission import Request, resolve_config

        cfg = resolve_config(Request(config, tuple(overrides), run_dir, site=site))
        validate(cfg)
        os.environ.update(nodes_environ(cfg.slurm.setup))
        assets = [*_of_run(cfg, run_dir), *assets]
    if not assets:
        print("nothing of it comes from the hub")
        return 0
    from forge_hpc.hub.download import Hub, HubSilent, cache_umask, quiet, size  # reads the environment

    os.umask(cache_umask(hub_cache()))
    hub = Hub()
    plans: list[Plan] = []
    rows: list[list[str]] = []
    failed: list[UserError] = []

    def add(asset: Asset, state: str, commit: str = "", num_bytes: str = "") -> None:
        rows.append([str(asset), ", ".join(asset.keys), commit[:12], num_bytes, state])

    for asset in assets:
        try:
            plans.append(hub.plan(asset))
        except UserError as error:
            cached = find_cached(asset) if isinstance(error, HubSilent) else None
            if cached is None:
                failed.append(error)
                add(asset, "FAILED")
            else:
                add(asset, "was there; the hub does not answer", cached.commit, size(cached.num_bytes))
    hub.check_room(plans)
    for plan in plans:
        was_there = plan.left_files == 0 and find_cached(plan.asset) is not None
        if not was_there:
            print(f"fetching the {plan.asset}: {size(plan.left_bytes)}", file=sys.stderr, flush=True)
        try:
            with nullcontext() if sys.stderr.isatty() and not was_there else quiet():
                hub.fetch(plan)
        except UserError as error:
            failed.append(error)
            add(plan.asset, "FAILED")
            continue
        state = "was there" if was_there else f"fetched {size(plan.left_bytes)}"
        add(plan.asset, state, plan.commit, size(plan.num_bytes))
    print("\n".join(table(["what", "for", "commit", "size", "state"], rows)))
    print(f"cache: {hub.cache}", flush=True)
    for failure in failed[:-1]:
        print_error(failure)
    if failed:
        raise failed[-1]
    return 0


def _of_run(cfg: Config, run_dir: Path | None) -> list[Asset]:
    pins = Pins(run_dir) if run_dir is not None else None
    return [
        asset if pins is None else replace(asset, name=pins.named(asset.name, asset.kind)) for asset in assets_of(cfg)
    ]


def _extra(kind: str, name: str) -> Asset:
    try:
        split_name(name)
    except ValueError as error:
        raise UserError(f"--{kind}: {error}", "write OWNER/NAME") from None
    return Asset(kind, name, (f"--{kind}",))
