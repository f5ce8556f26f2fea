"""Sweeps, jobs that wait for others, and runs within an allocation, on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, read, run_local, status, wait_for
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SFT = PROJECT / "configs/sft/demo.yaml"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED")
SHORT = ["trainer.lr_scheduler.warmup_steps=0", "evaluation.num_prompts=0"]
NOT_STARTED = "slurm.setup=['exit 3']"
"""These are about how a run gets there."""


def submit(cluster: SlurmCluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_hpc.cli", "submit", "--config", str(SFT), *arguments]
    env = {**cluster.env, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return cluster.run(*command, env=env, cwd=PROJECT, check=check, timeout_s=300)


def job_of(run_dir: Path) -> str:
    return str(status(run_dir)["job_id"])


def learned(run_dir: Path) -> list[dict[str, Any]]:
    """What a run has measured, but for how long it took."""
    untold = ("time/", "perf/", "wall_time", "memory/")
    return [{k: v for k, v in record.items() if not k.startswith(untold)} for record in read(run_dir)]


def assert_equal_to_one_alone(run_dir: Path, alone: Path, overrides: list[str]) -> None:
    """To the last bit, in its figures and its model."""
    done = run_local(alone, overrides, config=SFT)
    assert done.returncode == 0, done.stderr
    assert learned(run_dir) == learned(alone) != []
    models = [(folder / "export/model.safetensors").read_bytes() for folder in (run_dir, alone)]
    assert models[0] == models[1]


def test_each_run_of_a_sweep_is_a_task_that_is_what_it_is_alone(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    sweep, overrides = tmp_path / "sweep", ["trainer.training.steps=2", *SHORT]
    said = submit(slurm_cluster, "--run-dir", str(sweep), *overrides, "--sweep", "seed=0,1", "--at-once=1")
    array = job_of(sweep / "0").partition("_")[0]
    assert f"job array      {array}" in said.stdout
    assert json.loads((sweep / "sweep.json").read_text())["runs"] == [["seed=0"], ["seed=1"]]
    assert slurm_cluster.job(f"{array}_1").get("ArrayTaskThrottle", "1") == "1"
    for number in (0, 1):
        wait_for(lambda n=number: slurm_cluster.job(f"{array}_{n}")["JobState"] in ENDED, "the end", 600)
        run_dir = sweep / str(number)
        log = (run_dir / f"logs/slurm-{array}_{number}.out").read_text()
        assert (status(run_dir)["state"], job_of(run_dir)) == ("completed", f"{array}_{number}"), log
        assert (run_dir / f"logs/{array}_{number}.0").is_dir()
    assert learned(sweep / "0") != learned(sweep / "1")
    assert_equal_to_one_alone(sweep / "1", tmp_path / "alone", [*overrides, "seed=1"])


@pytest.mark.training  # 14 starts
@pytest.mark.timeout(3600)
def test_six_runs_on_four_hosts_two_of_them_preempted_are_what_they_are_alone(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    overrides = ["trainer.training.steps=10", "trainer.training.global_batch_size=512", *SHORT]
    sweep, values = tmp_path / "sweep", ["trainer.optimizer.lr=1e-3,3e-3", "seed=0,1,2"]
    submit(slurm_cluster, "--run-dir", str(sweep), *overrides, "slurm.partition=spot", "--sweep", *values)
    runs = json.loads((sweep / "sweep.json").read_text())["runs"]
    array = job_of(sweep / "0").partition("_")[0]
    assert len(runs) == 6
    wait_for(lambda: sum(bool(read(sweep / str(n))) for n in range(4)) >= 2, "a step of two runs", 900)
    victims = [n for n in range(4) if read(sweep / str(n))][:2]
    hosts = [slurm_cluster.job(f"{array}_{n}")["NodeList"] for n in victims]
    urgent = ["sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive", f"--nodelist={','.join(hosts)}"]
    slurm_cluster.run(*urgent, "--wrap=true", f"--output={tmp_path}/urgent.out", timeout_s=300)
    for number, changes in enumerate(runs):
        run_dir = sweep / str(number)
        wait_for(lambda n=number: slurm_cluster.job(f"{array}_{n}")["JobState"] in ENDED, "the end", 1800)
        ends = [
            (record["state"], record["cause"]) for record in read(run_dir, "starts.jsonl") if record["event"] == "end"
        ]
        preempted = [("preempted", "preempted")] * (number in victims)
        assert ends == [*preempted, ("completed", "completed")], status(run_dir)
        assert slurm_cluster.job(f"{array}_{number}")["Restarts"] == str(len(preempted))
        print(f"run {number} {' '.join(changes)}: {ends}, {len(learned(run_dir))} steps")
    for number, changes in enumerate(runs):
        assert_equal_to_one_alone(sweep / str(number), tmp_path / f"alone-{number}", [*overrides, *changes])
        print(f"run {number} is equal to one alone")
