"""A run whose curves go to a real MLflow server, which is away for a while: ``make peers``.

The server has a virtual environment of its own. The client, mlflow-skinny, is installed into a folder with what it
needs and this environment lacks, as its users would add it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, left_over, read, status, wait_for

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]
MLFLOW = "3.17.2"
LOG = """
import sys
from pathlib import Path
from forge_hpc.config.schema import LoggingConfig
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.observability.remote import finish_runs
from forge_hpc.run_dir import RunDir

first, last, wait_s = map(int, sys.argv[2:])
config = LoggingConfig(console="none", mlflow=True, tensorboard=False)
with MetricLogger(RunDir(Path(sys.argv[1])).create(), config, resume_step=first - 1) as logger:
    for step in range(first, last + 1):
        logger.log(step, {"loss": 1 / step, "pass@8": float(step), "nothing": float("nan")})
        if step % 2 == 0:
            logger.log_evaluation(step, {"accuracy": step / 10})
finish_runs(wait_s)
"""


def install(python: Path | str, *arguments: str) -> str:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=1500).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEERS_VENVS keeps what is installed for the next time."""
    return Path(os.environ.get("PEERS_VENVS") or tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Path:
    """A folder for PYTHONPATH."""
    path = folder / f"mlflow-skinny-{MLFLOW}"
    if not path.exists():
        wanted = f"mlflow-skinny=={MLFLOW}"
        report = json.loads(install(sys.executable, "--dry-run", "--report", "-", wanted))
        found = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in report["install"]]
        install(sys.executable, "--no-deps", "--target", str(path), *found)
    return path


class Server:
    """``mlflow server`` on a port of this machine; ``kill`` and ``start`` are a server that is away for a while."""

    def __init__(self, python: Path, directory: Path) -> None:
        self._python, self._directory = python, directory
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            self.port = held.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self._directory}/mlflow.db"]
        store += ["--artifacts-destination", str(self._directory / "artifacts")]
        command = [self._python.with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self._directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1", *store],
                cwd=self._directory,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # 10 processes more
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 600
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, "the server did not start"
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=10).read()
                return
            except OSError:
                time.sleep(0.5)

    def kill(self) -> None:
        """All of it, without a word."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self.process = None

    def ask(self, what: str, **query: str) -> Any:
        """An answer of MLflow's REST API."""
        url = f"{self.url}/api/2.0/mlflow/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.loads(answer.read())

    def steps(self, run_id: str, key: str) -> list[int]:
        """Steps of a curve, as often as each is there."""
        history = self.ask("metrics/get-history", run_id=run_id, metric_key=key).get("metrics", [])
        return sorted(int(point["step"]) for point in history)

    def run(self, run_id: str) -> Any:
        return self.ask("runs/get", run_id=run_id)["run"]

    def artifacts(self, run_id: str) -> list[str]:
        return [file["path"] for file in self.ask("artifacts/list", run_id=run_id).get("files", [])]


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Server]:
    venv = folder / f"mlflow-{MLFLOW}"
    if not (venv / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        install(venv / "bin/python", f"mlflow=={MLFLOW}")
        (venv / "installed").touch()
    directory = tmp_path / "server"
    directory.mkdir()
    found = Server(venv / "bin/python", directory)
    try:
        found.start()
        yield found
    finally:
        found.kill()


def environment(server: Server, client: Path) -> dict[str, str]:
    path = {"PYTHONPATH": f"{PROJECT}:{client}", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **path, "MLFLOW_TRACKING_URI": server.url}


def run_id(run_dir: Path) -> str:
    return (run_dir / "mlflow-id").read_text().strip()


def test_each_step_is_there_once_whatever_was_away(server: Server, client: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"

    def log_steps(first: int, last: int, wait_s: int = 120) -> list[str]:
        """What it warns of."""
        command = [sys.executable, "-c", LOG, str(run_dir), str(first), str(last), str(wait_s)]
        done = subprocess.run(command, env=environment(server, client), text=True, capture_output=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if " INFO mlflow" not in line]

    assert not log_steps(1, 4)
    number = run_id(run_dir)
    assert not log_steps(3, 6)  # from the checkpoint of step 2
    assert run_id(run_dir) == number
    for key in ("loss", "pass_at_8", "step"):
        assert server.steps(number, key) == [1, 2, 3, 4, 5, 6]
    assert server.steps(number, "eval/accuracy") == [2, 4, 6] and not server.steps(number, "nothing")
    assert server.run(number)["info"]["status"] == "FINISHED"

    server.kill()
    [said] = log_steps(7, 9, wait_s=3)
    assert said.startswith("MLflow has not finished within 3 s; the next start of the run sends those points")
    server.start()
    assert not log_steps(9, 11)
    assert run_id(run_dir) == number
    assert server.steps(number, "loss") == list(range(1, 12))
    assert server.steps(number, "eval/accuracy") == [2, 4, 6, 8, 10]


def start(run_dir: Path, env: dict[str, str], steps: int) -> subprocess.Popen[str]:
    """A short SFT run of this machine, or its next start."""
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(run_dir)]
    command += ["--config", str(PROJECT / "configs/sft/demo.yaml"), "logging.mlflow=true"]
    command += [f"trainer.training.steps={steps}", "trainer.training.global_batch_size=16", "checkpoint.interval=4"]
    command += ["evaluation.num_prompts=0"]
    return subprocess.Popen(
        command, env=env, cwd=run_dir.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_preempted_run_goes_on_at_mlflow_and_one_whose_server_dies_goes_on_without(
    server: Server, client: Path, tmp_path: Path
) -> None:
    run_dir, env = tmp_path / "run", environment(server, client)

    def steps() -> int:
        return len(read(run_dir))

    run = start(run_dir, env, 2000)
    try:
        wait_for(lambda: steps() >= 6 or run.poll() is not None, "six steps", 1200)
        run.send_signal(signal.SIGTERM)  # what Slurm sends to a job that it preempts
        said = "".join(run.communicate(timeout=600))
    finally:
        run.kill()
    assert status(run_dir)["state"] == "preempted", said
    first, number = steps(), run_id(run_dir)
    assert server.steps(number, "loss") == list(range(1, first + 1))

    run = start(run_dir, env, first + 60)
    try:
        wait_for(lambda: steps() >= first + 4 or run.poll() is not None, "four more steps", 1200)
        server.kill()
        said = "".join(run.communicate(timeout=1200))
    finally:
        run.kill()
    assert run.returncode == 0 and status(run_dir)["state"] == "completed", said
    log = (run_dir / "logs/local.1/controller.log").read_text()
    assert [line for line in log.splitlines() if "MLflow" in line or "urllib3" in line] == [
        line for line in log.splitlines() if "MLflow has not finished within" in line
    ], log
    assert log.count("MLflow has not finished within") == 1

    server.start()
    assert run_id(run_dir) == number
    there = server.steps(number, "loss")
    assert there == list(range(1, len(there) + 1)) and first + 2 <= len(there) < steps()
    run = start(run_dir, env, steps() + 2)
    try:
        said = "".join(run.communicate(timeout=1200))
    finally:
        run.kill()
    assert run.returncode == 0 and not left_over(run_dir), said
    assert run_id(run_dir) == number
    assert server.steps(number, "loss") == server.steps(number, "grad_norm") == list(range(1, steps() + 1))
    found = server.run(number)
    params = {item["key"]: item["value"] for item in found["data"]["params"]}
    assert (params["trainer.optimizer.lr"], params["trainer.training.steps"]) == ("0.003", "2000")
    assert {item["key"]: item["value"] for item in found["data"]["tags"]}["forge_hpc.run_dir"] == str(run_dir)
    assert found["info"]["run_name"] == "run" and server.artifacts(number) == ["config.yaml"]
    artifact = f"{server.url}/get-artifact?path=config.yaml&run_uuid={number}"
    with urllib.request.urlopen(artifact, timeout=60) as answer:
        assert answer.read() == (run_dir / "config.yaml").read_bytes()
