"""Weights & Biases, for those who ask for it (``logging.wandb``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from forge_hpc.config.errors import UserError


class WandbWriter:
    """Sends scalars to one W&B run whose id is the run directory's name, so that a restart continues it.

    W&B's own environment variables say where to (``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``WANDB_API_KEY``).

    Raises:
        UserError: wandb is not installed, or nobody is logged in.
    """

    def __init__(self, directory: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb is true, but wandb is not installed", "pip install wandb") from None
        run_id = re.sub(r"[^\w.-]", "-", name)
        settings = wandb.Settings(console="off", silent=True)
        try:
            self._run = wandb.init(id=run_id, name=name, dir=str(directory), resume="allow", settings=settings)
        except wandb.errors.UsageError as error:
            raise UserError(f"wandb does not start: {error}", "wandb login, or set WANDB_MODE=offline") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve. W&B drops steps that it has already."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
