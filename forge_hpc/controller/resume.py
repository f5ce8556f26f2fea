"""Going on from a checkpoint: which one, and whether it is of this configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_hpc.checkpoint import CheckpointStore
from forge_hpc.config import Config, UserError, read_config, safe_changes
from forge_hpc.controller.saving import CONFIG
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog

logger = logging.getLogger(__name__)


def find_checkpoint(
    checkpoints: CheckpointStore, config: Config, run_dir: RunDir
) -> tuple[Path, Mapping[str, Any]] | None:
    """The newest checkpoint that verifies, with its record; None in a fresh run.

    Raises:
        UserError: there are checkpoints and none can be used, or it is of another configuration.
    """
    found = checkpoints.newest()
    if found is None and checkpoints.steps():
        raise UserError(
            f"none of the checkpoints in {run_dir.checkpoints} can be used; controller.log says why",
            "mend or restore one, or move them away to begin again from step 0",
        )
    if found is not None and (found[0] / CONFIG).exists():
        _accept_changes(config, run_dir, found[0], found[1]["step"])
    return found


def _accept_changes(config: Config, run_dir: RunDir, checkpoint: Path, step: int) -> None:
    """Compare with the configuration of a checkpoint: ``config.yaml`` may have been edited since, by hand.

    Changes that are safe are recorded, unless whoever submitted the run has done so. Raises UserError for others.
    """
    try:
        before = read_config(checkpoint / CONFIG)
    except UserError as error:  # of keys that there are no longer: there is nothing to compare with
        logger.warning("not compared with this configuration: %s", error)
        return
    before.cluster.nodes = config.cluster.nodes  # those of the allocations, not of the configurations
    changes = safe_changes(
        before,
        config,
        step,
        f"{run_dir.config} is not the configuration of {checkpoint.name}",
        f"put these values back, or copy {checkpoint / CONFIG} over it; for other values choose another --run-dir",
    )
    log = StartLog(run_dir)
    recorded = [line for record in log.read() if record["event"] == "changed" for line in record["changes"]]
    latest = {line.partition(": ")[0]: line.rpartition(" -> ")[2] for line in recorded}
    new = [line for line in changes if latest.get(line.partition(": ")[0]) != line.rpartition(" -> ")[2]]
    for line in new:
        logger.info("changed since %s: %s", checkpoint.name, line)
    if new:
        log.changed(new)
