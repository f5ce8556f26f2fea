"""A user's day on a real cluster: a job that waits, a run that is looked at, and one that is cancelled and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import PROJECT, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster
from test_slurm_runs import environment, log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


class User:
    """Gives commands in a folder, on the login node."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def __call__(self, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "forge_hpc.cli", *command]
        env = environment(self.cluster)
        done = self.cluster.run(*line, env=env, cwd=self.folder, check=False, timeout_s=400)
        print(f"$ forge-hpc {' '.join(command)}\n{done.stdout}{done.stderr}")
        assert done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture
def user(slurm_cluster: SlurmCluster, tmp_path: Path) -> User:
    return User(slurm_cluster, tmp_path)


def test_a_job_that_waits_says_why_and_is_cancelled_at_once(user: User) -> None:
    held = ("slurm.extra={hold: true}", "model.path=builtin:qwen3-tiny")
    user("submit", "--nodes", "4", "--run-dir", "runs/held", *held)
    job = status(user.folder / "runs/held")["job_id"]
    shown = user("status", job).stdout
    assert f"{job}  PENDING, 4 nodes\n" in shown
    assert f"waits for  JobHeldUser; to let it go: scontrol release {job}\n" in shown
    [row] = user("status", "--all").stdout.splitlines()[1:]
    assert row.split()[:3] == ["held", "pending,", "queued"]
    said = json.loads(user("status", "--json").stdout)
    assert (said["slurm_state"], said["nodes"]) == ("PENDING", 4) and said["waits_for"].startswith("JobHeldUser")
    assert "has no nodes yet: JobHeldUser" in user("attach", job, "--", "true", code=2).stderr
    began = time.monotonic()
    assert "cancelled" in user("cancel", job).stdout and time.monotonic() - began < 30
    assert (
        user.cluster.job(job)["JobState"] == "CANCELLED" and status(user.folder / "runs/held")["state"] == "cancelled"
    )


def test_a_run_is_looked_at_by_its_job_and_cancel_saves_its_last_step(user: User) -> None:
    cluster, run_dir = user.cluster, user.folder / "runs/mine"
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={user.folder}/slurm-%j.out", f"{PROJECT}/sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), *small_run(user.folder, 2000)]
    command += ["checkpoint.interval=1000", "evaluation.num_prompts=0", "algorithm.max_steps_without_signal=1000"]
    job = cluster.run(*command, env=environment(cluster), cwd=user.folder).stdout.strip()
    wait_for(lambda: len(read(run_dir)) >= 2, "two steps", 300)

    shown = user("status", job).stdout
    assert f"{job}  RUNNING, 2 nodes, " in shown and "/2000" in shown
    found = json.loads(user("stacks", job, "--json").stdout)
    roles = {(process["node"], process["role"]) for process in found}
    assert {(0, "controller"), (0, "trainer-0"), (1, "generator-0"), (1, "worker-1")} <= roles
    second = cluster.hosts[1].name
    assert user("attach", job, "--node", "1", "--", "hostname").stdout == f"{second}\n"
    assert "worker-0: " in user("logs", job, "--role", "worker").stdout

    done = user("cancel", job)
    assert f"at once: forge-hpc cancel --now {run_dir}" in done.stderr
    [end] = [record for record in read(run_dir, "starts.jsonl") if record["event"] == "end"]
    assert (end["state"], end["cause"]) == ("cancelled", "cancelled"), log(run_dir)
    assert end["step"] == read(run_dir)[-1]["step"] and "which is saved" in done.stdout, "the last step was saved"
    job_now = cluster.job(job)
    assert job_now["JobState"] in ("FAILED", "CANCELLED") and job_now["Restarts"] == "0"
    assert "cancelled already" in user("cancel", job).stdout
    assert "it is cancelled" in user("stacks", job, code=2).stderr


def test_a_login_node_that_kills_what_follows_a_run_takes_nothing_from_it(user: User) -> None:
    run_dir = user.folder / "runs/followed"
    waits = "slurm.setup=['touch begun; sleep 600']"
    line = [sys.executable, "-m", "forge_hpc.cli", "submit", "--nodes=1", f"--run-dir={run_dir}", "--follow", waits]
    line += ["model.path=builtin:qwen3-tiny"]
    with subprocess.Popen(line, env=environment(user.cluster), cwd=user.folder, stdout=subprocess.DEVNULL) as follower:
        wait_for(lambda: (user.folder / "begun").exists(), "the begin of the job", 120)
        follower.kill()
    job = status(run_dir)["job_id"]
    assert user.cluster.job(job)["JobState"] == "RUNNING"
    assert "RUNNING" in user("status", job).stdout
    user("cancel", "--now", job)
