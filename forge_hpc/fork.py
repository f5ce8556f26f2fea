"""A new run that begins with a checkpoint of another one: ``forge-hpc resume --from RUN_DIR[@STEP]``.

The checkpoint's files get a second name in the new run directory, or are copied where that cannot be. From then on the
two have nothing in common: the new run goes on from that step, with its own configuration, as a resumed one does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_hpc.checkpoint import CheckpointError, CheckpointStore, load_extra
from forge_hpc.checkpoint.borrow import borrowed
from forge_hpc.checkpoint.manifest import NO_OPTIMIZER, read_manifest
from forge_hpc.config import Config, UserError, config_text, diff_config
from forge_hpc.config.changes import change_lines
from forge_hpc.config.fields import FIXED, rule_of
from forge_hpc.config.recipes import needs_of
from forge_hpc.run_dir import RunDir

_EPISODES = "episodes.npz"
_MODEL_KEYS = ("model.path", *(f"trainer.lora.{name}" for name in ("enable", "rank", "alpha", "target_modules")))


@dataclass(frozen=True)
class Fork:
    """What a new run begins with."""

    source: RunDir
    step: int
    checkpoint: Path
    """Readable as long as ``open_fork`` is."""
    keeps_optimizer: bool
    before: Config
    """The configuration of the other run."""

    def changes(self, cfg: Config) -> list[str]:
        """What the new run's configuration says otherwise, a line a key."""
        return change_lines(diff_config(self.before, cfg))


def parse_source(text: str) -> tuple[Path, int | None]:
    """``RUN_DIR`` or ``RUN_DIR@STEP``; a directory whose name ends so is itself."""
    path, at, step = text.rpartition("@")
    if at and path and step.isdigit() and not Path(text).exists():
        return Path(path), int(step)
    return Path(text), None


@contextmanager
def open_fork(source: RunDir, step: int | None, before: Config, cfg: Config, keep_optimizer: bool) -> Iterator[Fork]:
    """Find the checkpoint, by default the newest, and check that a run of `cfg` can begin with it.

    Raises:
        UserError: there is none, it is of another model, or no step would be left to do.
    """
    differing = [change for change in diff_config(before, cfg) if change[0].startswith(_MODEL_KEYS)]
    if differing:
        key, old, new = differing[0]
        raise UserError(
            f"the checkpoints of {source} are of another model: {key} ({old} there, {new} now)",
            f"leave it as it is; a run of its own begins with the weights alone: model.path={source.export}",
        )
    there, here = (
        {name for name, need in needs_of(each).models.items() if need.trained and need.path is None}
        for each in (before, cfg)
    )
    if there != here:
        raise UserError(
            f"the checkpoints of {source} hold {' and '.join(sorted(there))}, and recipe={cfg.recipe} trains "
            f"{' and '.join(sorted(here))}",
            f"a run of its own begins with the weights alone: model.path={source.export}",
        )
    with borrowed(source, step) as (found, checkpoint):
        if cfg.trainer.training.steps <= found:
            raise UserError(
                f"trainer.training.steps={cfg.trainer.training.steps}, and the checkpoint is of step {found} already",
                "ask for more, or name an earlier one: --from RUN_DIR@STEP",
            )
        yield Fork(source, found, checkpoint, keep_optimizer, before)


def begin_with(fork: Fork, cfg: Config, run_dir: RunDir) -> None:
    """Put the checkpoint into `run_dir`, with the models that the other run has made for itself.

    The position in the data is kept where the data are the same, rollouts that were finished where all is.

    Raises:
        UserError: it cannot be written.
    """
    free = ["name"] + ([] if fork.before.data.template_date else ["data.template_date"])  # it did not keep the day
    changed = [key for key, _, _ in diff_config(fork.before, cfg) if rule_of(Config, key).resume == FIXED]
    changed = [key for key in changed if key not in free]
    other_data = any(key in ("recipe", "seed") or key.startswith(("data.", "sources.")) for key in changed)
    state: dict[str, Any] = json.loads((fork.checkpoint / "controller.json").read_text(encoding="utf-8"))
    state = {name: state[name] for name in ("step", "policy_version", "recipe")}
    if other_data:
        state["recipe"] = {}
    if "seed" in changed and cfg.model.path.startswith("builtin:"):  # of another seed it would be another model
        name = f"{cfg.model.path.removeprefix('builtin:')}-seed{fork.before.seed}"
        cfg.model.path = str(run_dir.path / "model" / name)
    extra = {run_dir.config.name: config_text(cfg).encode()}
    if not changed and (episodes := load_extra(fork.checkpoint, _EPISODES)) is not None:
        extra[_EPISODES] = episodes
    if not fork.keeps_optimizer:
        extra[NO_OPTIMIZER] = b""
    for name in ("hub.json", "model", "warmstart/config.yaml", "warmstart/status.json", "warmstart/export"):
        _link(fork.source.path / name, run_dir.path / name)
    files = {
        name: record for name, record in read_manifest(fork.checkpoint)["files"].items() if name.startswith("trainer/")
    }
    store = CheckpointStore(run_dir, cfg.checkpoint.keep)
    try:
        directory = store.begin(fork.step)
        for name in files:
            _link(fork.checkpoint / name, directory / name)
        store.commit(fork.step, state, files, extra)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{run_dir} cannot begin with {fork.source}: {error}", "choose another --run-dir") from error


def _link(source: Path, target: Path) -> None:
    """Second names for a file or for all files of a directory, copies where there can be none; nothing if it is not
    there."""
    if source.is_dir():
        for path in source.iterdir():
            _link(path, target / path.name)
        return
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
