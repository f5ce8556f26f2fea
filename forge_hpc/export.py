"""``forge-hpc export``: the weights of a checkpoint in Hugging Face format, also of a run that goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from forge_hpc.checkpoint.borrow import borrowed
from forge_hpc.checkpoint.manifest import CheckpointError
from forge_hpc.checkpoint.store import read_best
from forge_hpc.config import Config, UserError, read_config
from forge_hpc.config.recipes import needs_of
from forge_hpc.run_dir import RunDir

CONFIG = "config.yaml"


def export(run_dir: RunDir, step: int | Literal["best"] | None = None, output: Path | None = None) -> Path:
    """Write a model that transformers and vLLM load, from the checkpoint of ``step``, by default the newest; ``best``
    is the one that ``checkpoint.best`` keeps.

    Args:
        output: a directory that there is not yet; by default ``RUN_DIR/exports/step-N``, which is written anew.

    Raises:
        UserError: there is no such checkpoint, its model cannot be found here, or the output cannot be written.
    """
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists", "name a directory that does not: --output")
    config = read_config(run_dir.config)
    if not needs_of(config).trains:
        raise UserError(f"{run_dir} has no model of its own: it evaluates {config.model.path}")
    if step == "best":
        if (best := read_best(run_dir.checkpoints)) is None:
            raise UserError(f"no checkpoint of {run_dir} is marked as the best", "name a step, or set checkpoint.best")
        step = int(best["step"])
    with borrowed(run_dir, step) as (found, checkpoint):
        if (own := checkpoint / CONFIG).exists():
            config = read_config(own)
        directory = output or run_dir.export_of(found)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPUs here, if any, may be a run's
        from forge_hpc.training.offline import export_checkpoint  # loads torch

        model_dir = _model_dir(config, run_dir)
        try:
            export_checkpoint(config, model_dir, checkpoint / "trainer", directory.absolute())
        except CheckpointError as error:
            raise UserError(str(error), f"is config.yaml that of the checkpoint? forge-hpc status {run_dir}") from error
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error}", "choose another place with --output") from error
        finally:
            shutil.rmtree(directory.with_name(f".{directory.name}.tmp"), ignore_errors=True)
    return directory


def _model_dir(config: Config, run_dir: RunDir) -> Path:
    """The model that the run started from, as the run itself finds it."""
    from forge_hpc.data.hub import resolve_model
    from forge_hpc.hub.pins import Pins

    if config.model.path == "warmstart":
        return RunDir(run_dir.warmstart).export
    return resolve_model(Pins(run_dir.path).named(config.model.path), config.seed, run_dir.path / "model")
