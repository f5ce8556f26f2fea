"""Metrics for Prometheus and MLflow."""

from __future__ import annotations

import socket
import sys
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from runs import wait_for

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import LoggingConfig
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.observability.prometheus import PrometheusWriter
from forge_hpc.observability.remote import finish_runs
from forge_hpc.run_dir import RunDir


# ---------------------------------------------------------------------------------------------------- Prometheus
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(answer.read().decode())


def test_prometheus_reads_the_newest_value_of_every_figure(tmp_path: Path) -> None:
    """As its own client's parser does."""
    parser = pytest.importorskip("prometheus_client.parser")
    port = free_port()
    config = LoggingConfig(console="none", tensorboard=False, prometheus_port=port)
    run_dir = RunDir(tmp_path / 'a "run"\\').create()
    with MetricLogger(run_dir, config) as logger:
        logger.log(1, {"reward/mean": 0.25, "loss": 2.0})
        logger.log(2, {"reward/mean": 0.5, "loss": float("nan")})
        logger.log_evaluation(2, {"pass@8": 0.125})
        text = scrape(port)
        with pytest.raises(urllib.error.HTTPError):
            scrape(port, "/")
    samples = {
        sample.name: sample for family in parser.text_string_to_metric_families(text) for sample in family.samples
    }
    assert {name: sample.value for name, sample in samples.items()} == {
        "forge_hpc_reward_mean": 0.5,
        "forge_hpc_loss": 2.0,
        "forge_hpc_step": 2.0,
        "forge_hpc_eval_pass_8": 0.125,
    }
    assert samples["forge_hpc_step"].labels == {"run": 'a "run"\\'}
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def test_only_this_machine_is_served_unless_told_otherwise() -> None:
    assert LoggingConfig().prometheus_host == "127.0.0.1" and LoggingConfig().prometheus_port is None
    writer = PrometheusWriter("127.0.0.1", 0, "run")
    assert writer.address is not None and writer.address[0] == "127.0.0.1"
    writer.close()


def test_a_port_that_is_taken_is_said_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = LoggingConfig(console="none", tensorboard=False, prometheus_port=port)
        with MetricLogger(RunDir(tmp_path).create(), config) as logger:
            logger.log(1, {"x": 1.0})
            logger.log(2, {"x": 1.0})
    [warning] = caplog.messages
    assert f"127.0.0.1:{port}" in warning and "the training goes on" in warning


def test_a_client_that_says_nothing_holds_up_nobody() -> None:
    writer = PrometheusWriter("127.0.0.1", 0, "run")
    assert writer.address is not None
    with socket.create_connection(writer.address):
        writer.write(1, {"x": 1.0})
        assert 'forge_hpc_x{run="run"} 1.0' in scrape(writer.address[1])
        writer.close()


# ---------------------------------------------------------------------------------------------------- MLflow
class Mlflow(types.ModuleType):
    """Stands in for mlflow: keeps what it is sent, and fails or hangs where it is told to."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, now, step: (key, value, step),
        )
        self.runs: dict[str, list[tuple[str, float, int]]] = {}
        self.ended: list[str] = []
        self.fails: str = ""
        self.hangs: threading.Event | None = None

    def MlflowClient(self) -> Mlflow:
        return self

    def set_experiment(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="1")

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self._fail("create_run")
        self.runs[id := f"id-{len(self.runs)}"] = []
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=id))

    def get_run(self, id: str) -> Any:
        metrics = {key: value for key, value, _ in self.runs[id]}
        return types.SimpleNamespace(data=types.SimpleNamespace(metrics=metrics, params={}))

    def update_run(self, id: str, status: str) -> None: ...

    def log_batch(self, id: str, metrics: list[tuple[str, float, int]]) -> None:
        self._fail("log_batch")
        self.runs[id] += metrics

    def set_terminated(self, id: str) -> None:
        if self.hangs is not None:
            self.hangs.wait()
        self.ended.append(id)

    def _fail(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError("the server\ndoes not answer")


WITH_MLFLOW = LoggingConfig(console="none", mlflow=True, tensorboard=False)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    module = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def log_steps(run_dir: RunDir, first: int, last: int) -> None:
    """What one start of a run does, to the end of its process."""
    with MetricLogger(run_dir, WITH_MLFLOW, resume_step=first - 1) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"pass@8": float(step)})
    finish_runs(60)


def test_a_restart_continues_its_run_at_mlflow_and_doubles_no_step(tmp_path: Path, mlflow: Mlflow) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    log_steps(run_dir, 1, 4)
    log_steps(run_dir, 3, 6)  # from the checkpoint of step 2
    [points] = mlflow.runs.values()
    steps = [step for key, _, step in points if key == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {key for key, _, _ in points} == {"step", "pass_at_8"}
    assert mlflow.ended == ["id-0", "id-0"]


def test_runs_of_one_process_write_to_mlflow_beside_each_other(tmp_path: Path, mlflow: Mlflow) -> None:
    one, other = (RunDir(tmp_path / name).create() for name in ("one", "other"))
    with MetricLogger(one, WITH_MLFLOW), MetricLogger(other, WITH_MLFLOW) as logger:
        logger.log(1, {"reward/mean": 1.0})  # while the first goes on
        wait_for(lambda: any(mlflow.runs.values()), "its point", 60)
    finish_runs(60)
    assert len(mlflow.runs) == 2


@pytest.mark.parametrize("call", ["create_run", "log_batch"])
def test_an_error_of_mlflow_costs_its_curves_and_not_the_training(
    call: str, tmp_path: Path, mlflow: Mlflow, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow.fails = call
    run_dir = RunDir(tmp_path).create()
    log_steps(run_dir, 1, 5)
    assert [record["step"] for record in read_jsonl(run_dir.metrics)] == [1, 2, 3, 4, 5]
    [warning] = caplog.messages
    assert warning == "nothing more is sent to MLflow, the training goes on: the server does not answer"


def test_mlflow_that_is_not_installed_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="not installed"):
        log_steps(RunDir(tmp_path).create(), 1, 1)


def test_an_mlflow_that_does_not_finish_holds_up_neither_the_close_nor_the_end(
    tmp_path: Path, mlflow: Mlflow, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow.hangs = threading.Event()
    with MetricLogger(RunDir(tmp_path).create(), WITH_MLFLOW) as logger:
        logger.log(1, {"x": 1.0})
    try:
        finish_runs(0.1)
        assert "MLflow has not finished" in caplog.text and not mlflow.ended
    finally:
        mlflow.hangs.set()
    finish_runs(60)
    assert mlflow.ended == ["id-0"]
