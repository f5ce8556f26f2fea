"""MLflow, for those who ask for it (``logging.mlflow``)."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from forge_hpc.config import UserError, read_config
from forge_hpc.config.fields import walk
from forge_hpc.files import atomic_write_text, is_there, read_text, sync_dir
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.remote import RemoteWriter
from forge_hpc.run_dir import RunDir

logger = logging.getLogger(__name__)
_STEP, _EVALUATED = "step", "eval/step"
"""Sent with every point: their last values tell a restart which steps are there, and which evaluations."""
_NUM_PARAMS, _MAX_PARAM = 100, 500
"""At once, and the longest one: what every release of MLflow's server takes."""


class MlflowWriter(RemoteWriter):
    """Sends scalars to one MLflow run, which has the configuration as its parameters and as the artifact config.yaml.
    Its id is kept in the run directory: a restart continues it, and first sends what an earlier start could not.

    MLflow's own environment variables say where to (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``,
    ``MLFLOW_TRACKING_TOKEN``). Its names may not hold some signs that ours do: ``pass@8`` is ``pass_at_8`` there.
    """

    NAME = "MLflow"
    LATER = "the next start of the run sends those points, and until then they are in metrics.jsonl only"

    def _start(self) -> _Run:
        try:
            import mlflow
        except ImportError:
            raise UserError(
                "logging.mlflow is true, but mlflow is not installed", "pip install mlflow-skinny"
            ) from None
        logging.getLogger("urllib3.connectionpool").addFilter(_is_not_ours)  # it warns of each of the client's tries
        run = _Run(mlflow, self._run_dir)
        run.catch_up(self._resume_step)
        return run


def _is_not_ours(record: logging.LogRecord) -> bool:
    return record.threadName != MlflowWriter.NAME


class _Run:
    def __init__(self, mlflow: Any, run_dir: RunDir) -> None:
        self._mlflow, self._run_dir = mlflow, run_dir
        self._client = mlflow.MlflowClient()
        path = run_dir.path / "mlflow-id"
        if not is_there(path):
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "forge_hpc")).experiment_id
            tags = {"forge_hpc.run_dir": str(run_dir)}
            atomic_write_text(path, self._client.create_run(experiment, run_name=run_dir.name, tags=tags).info.run_id)
            sync_dir(run_dir.path)
        self._id = read_text(path).strip()
        there = self._client.get_run(self._id).data
        step = there.metrics.get(_STEP, -1)
        # a run that has the one alone was begun when evaluations had no marker of their own
        self._there = {_STEP: int(step), _EVALUATED: int(there.metrics.get(_EVALUATED, step))}
        self._client.update_run(self._id, status="RUNNING")
        if run_dir.has_config:
            self._describe(there.params)

    def _describe(self, there: Mapping[str, str]) -> None:
        """Parameters stay as the run began with them, which is MLflow's rule; the artifact is of this start."""
        new = ((_allowed(key), value) for key, value, _ in walk(read_config(self._run_dir.config)))
        params = [self._mlflow.entities.Param(key, _text(value)) for key, value in new if key not in there]
        for start in range(0, len(params), _NUM_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _NUM_PARAMS])
        try:
            self._client.log_artifact(self._id, str(self._run_dir.config))
        except Exception as error:  # of whatever store the server names; it need not be one that nodes reach
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("MLflow has no config.yaml of this run, and its curves all the same: %s", reason)

    def catch_up(self, last_step: int) -> None:
        """Send what is in the run directory, up to ``last_step``, and not at the server."""
        for prefix, marker, path in (
            ("", _STEP, self._run_dir.metrics),
            ("eval/", _EVALUATED, self._run_dir.evaluations),
        ):
            missing = [record for record in read_jsonl(path) if self._there[marker] < record["step"] <= last_step]
            for record in missing:
                values = {f"{prefix}{key}": value for key, value in _figures(record)}
                self._send(marker, values, record["step"], record["wall_time"])
                self._there[marker] = record["step"]  # this start may have written it by now, and will log it, too

    def log(self, values: Mapping[str, float], step: int) -> None:
        marker = _EVALUATED if all(key.startswith("eval/") for key in values) else _STEP
        if step > self._there[marker]:  # MLflow would keep both
            self._send(marker, values, step, time.time())

    def _send(self, marker: str, values: Mapping[str, float], step: int, wall_time: float) -> None:
        metric, when = self._mlflow.entities.Metric, int(1000 * wall_time)
        metrics = [metric(_allowed(key), value, when, step) for key, value in ({marker: step} | dict(values)).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key not in ("step", "wall_time") and isinstance(value, int | float) and math.isfinite(value):
            yield key, float(value)


def _text(value: object) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    return text if len(text) <= _MAX_PARAM else f"{text[: _MAX_PARAM - 1]}…"


def _allowed(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))
