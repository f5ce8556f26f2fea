"""MLflow, for those who ask for it (``logging.mlflow``)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_text, is_there, read_text, sync_dir
from forge_hpc.observability.remote import RemoteWriter
from forge_hpc.run_dir import RunDir

_STEP = "step"
"""Sent with every point: its last value tells a restart which steps are there."""


class MlflowWriter(RemoteWriter):
    """Sends scalars to one MLflow run. Its id is kept in the run directory, so that a restart continues it.

    MLflow's own environment variables say where to (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``,
    ``MLFLOW_TRACKING_TOKEN``). Its names may not hold some signs that ours do: ``pass@8`` is ``pass_at_8`` there.
    """

    NAME = "MLflow"
    LATER = "those points are in metrics.jsonl only"

    def _start(self) -> _Run:
        try:
            import mlflow
        except ImportError:
            raise UserError(
                "logging.mlflow is true, but mlflow is not installed", "pip install mlflow-skinny"
            ) from None
        return _Run(mlflow, self._run_dir)


class _Run:
    def __init__(self, mlflow: Any, run_dir: RunDir) -> None:
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient()
        path = run_dir.path / "mlflow-id"
        self._last_step = 0
        if is_there(path):
            self._id = read_text(path).strip()
            self._last_step = int(self._client.get_run(self._id).data.metrics.get(_STEP, 0))
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "forge_hpc")).experiment_id
        self._id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        atomic_write_text(path, self._id + "\n")
        sync_dir(run_dir.path)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step < self._last_step:  # MLflow would keep both
            return
        metric, now = self._mlflow.entities.Metric, int(1000 * time.time())
        metrics = [metric(_allowed(key), value, now, step) for key, value in ({_STEP: step} | dict(values)).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _allowed(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))
