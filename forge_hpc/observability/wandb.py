"""Weights & Biases, for those who ask for it (``logging.wandb``)."""

from __future__ import annotations

import uuid
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_text, is_there, sync_dir
from forge_hpc.observability.remote import RemoteWriter
from forge_hpc.run_dir import RunDir


class WandbWriter(RemoteWriter):
    """Sends scalars to one W&B run. Its random id is kept in the run directory, so that a restart continues it and no
    other run does, whatever the directories are called.

    W&B's own environment variables say where to (``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``WANDB_API_KEY``).
    """

    NAME = "W&B"
    LATER = "`wandb sync` may send what is left"

    def _start(self) -> Any:
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb is true, but wandb is not installed", "pip install wandb") from None
        path, name = self._run_dir.path, self._run_dir.name
        settings = wandb.Settings(console="off", silent=True)
        options: dict[str, Any] = {"resume": "allow", "reinit": "create_new", "settings": settings}
        try:  # beside others of this process, where it has several
            return wandb.init(id=_run_id(self._run_dir), name=name, dir=str(path), **options)
        except wandb.errors.UsageError as error:
            raise UserError(f"wandb does not start: {error}", "wandb login, or set WANDB_MODE=offline") from None


def _run_id(run_dir: RunDir) -> str:
    path = run_dir.path / "wandb-id"
    if not is_there(path):
        atomic_write_text(path, uuid.uuid4().hex + "\n")
        sync_dir(run_dir.path)
    return path.read_text(encoding="utf-8").strip()
