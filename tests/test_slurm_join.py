"""A real job that lends generators to a real run: it joins, it is killed, and nothing of the run is lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from runs import PROJECT, left_over, lost_prompts, processes, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ENVIRONMENT = """
import pathlib, time
from forge_hpc.environments import Step

class Slow:
    def __init__(self, hurry: str) -> None:
        self.hurry, self.left, self.chars = pathlib.Path(hurry), 3, 0
    async def reset(self, prompt):
        return None
    async def step(self, response):
        time.sleep(0 if self.hurry.exists() else 0.5)
        self.left, self.chars = self.left - 1, self.chars + len(response)
        return Step("ok", self.chars / 18 if not self.left else 0.0, not self.left)
    async def close(self):
        pass
"""


def forge(cluster: SlurmCluster, *arguments: str, check: bool = True) -> str:
    command = [sys.executable, "-m", "forge_hpc.cli", *arguments]
    environ = {**cluster.env, "PYTHONPATH": str(PROJECT)}
    done = cluster.run(*command, env=environ, cwd=PROJECT, check=check, timeout_s=300)
    return done.stdout + done.stderr


def lenders() -> Sequence[psutil.Process]:
    """Supervisors of lent nodes."""
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        if "forge_hpc.join" in (process.info["cmdline"] or ()) and process.info["name"].startswith("python"):
            found.append(process)
    return found


def test_a_run_is_joined_by_two_generators_and_loses_nothing_when_they_are_killed(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(ENVIRONMENT)
    run_dir, hurry, steps, per_step = tmp_path / "run", tmp_path / "hurry", 40, 4
    overrides = [item for item in small_run(tmp_path, steps) if not item.startswith(("reward=", "rollout.prompts"))]
    overrides += ["reward=[]", f"environment.name={tmp_path / 'slow.py'}:Slow", f"environment.args={{hurry: {hurry}}}"]
    overrides += ["environment.max_open_episodes=4"]
    overrides += ["environment.max_turns=3", "environment.max_turn_tokens=4", "rollout.max_prompt_tokens=40"]
    overrides += ["rollout.max_response_tokens=48", f"rollout.prompts_per_step={per_step}", "rollout.group_size=4"]
    overrides += ["rollout.max_staleness=2", "generator.engine.max_num_seqs=4", "evaluation.num_prompts=0"]
    overrides += ["checkpoint.interval=0", f"logging.num_rollouts_per_step={4 * per_step}"]
    overrides += ["algorithm.max_steps_without_signal=1000", "cluster.max_restarts=0"]
    forge(slurm_cluster, "submit", "--nodes", "1", "--run-dir", str(run_dir), *overrides)
    assert "is queued: it is pending" in forge(slurm_cluster, "join", str(run_dir), check=False) or read(run_dir)
    wait_for(lambda: status(run_dir)["state"] == "running", "the run", 300)

    absent = forge(slurm_cluster, "join", str(run_dir), "--partition", "absent", check=False)
    assert "slurm.partition: no partition absent" in absent and "there are: main, short, spot, urgent" in absent
    said = forge(slurm_cluster, "join", str(run_dir), "--nodes", "2", "--partition", "spot")
    job = said.split("job", 1)[1].split()[0]
    assert "lends          2 generators on 2 nodes" in said
    wait_for(lambda: status(run_dir)["lent"] == 2, "two lent generators", 300)
    shown = forge(slurm_cluster, "status", str(run_dir))
    assert f"lent       2 generators; job {job} RUNNING" in shown
    wait_for(lambda: any(record.get("generators/serving") == 3 for record in read(run_dir)), "a step of all three", 150)
    wait_for(lambda: any(record["generators/lent_share"] > 0 for record in read(run_dir)), "what lent ones wrote", 150)

    victims = [process for supervisor in lenders() for process in (supervisor, *supervisor.children(recursive=True))]
    assert len([process for process in victims if process.is_running()]) >= 6
    for process in victims:  # all of both nodes, without a word
        process.kill()
    wait_for(lambda: status(run_dir)["lent"] == 0, "that it is noticed", 60)
    hurry.touch()
    wait_for(lambda: status(run_dir)["state"] == "completed", "the end of the run", 300)

    metrics = read(run_dir)
    assert [record["step"] for record in metrics] == list(range(1, steps + 1))
    assert all(record["staleness/max"] <= 2 and record["episodes/failed"] == 0 for record in metrics)
    assert lost_prompts(run_dir, range(1, steps + 1), per_step) == 0
    assert [record["event"] for record in read(run_dir, "starts.jsonl")].count("begin") == 1
    log = (next((run_dir / "logs").glob("*.0")) / "controller.log").read_text()
    assert log.count("leaves the run: its processes were killed, or its host is silent") == 2
    assert not left_over(run_dir) and not processes(run_dir)
    assert "has ended: it is completed" in forge(slurm_cluster, "join", str(run_dir), check=False)


@pytest.mark.training  # three engines, one after another
@pytest.mark.timeout(1800)
def test_jobs_of_an_array_lend_one_after_another_to_a_run_that_is_a_task_of_one(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The last task of an array has the array's own id for Slurm."""
    overrides = [*small_run(tmp_path, 100_000), "rollout.max_staleness=1", "rollout.prompts_per_step=4"]
    overrides += ["evaluation.num_prompts=0", "checkpoint.interval=0", "algorithm.max_steps_without_signal=100000"]
    forge(slurm_cluster, "submit", "--run-dir", str(tmp_path / "sweep"), *overrides, "--sweep", "seed=7")
    run_dir = tmp_path / "sweep/0"
    run_job = status(run_dir)["job_id"]
    assert run_job.endswith("_0")
    wait_for(lambda: read(run_dir), "the first step", 600)

    said = forge(slurm_cluster, "join", run_job, "--array", "2", "--at-once", "1")
    assert f"lends          1 generator on 1 node in each of 2 jobs to {run_dir}\n" in said
    lender = said.split("job array", 1)[1].split()[0]
    for task in (f"{lender}_0", f"{lender}_1"):
        wait_for(lambda: status(run_dir)["lent"] == 1, f"the generator of {task}", 600)
        assert f"lent       1 generator; job {task} RUNNING, on " in forge(slurm_cluster, "status", run_job)
        assert f"job {task}: lent to {run_dir}" in (run_dir / f"lent/lender-{task}.out").read_text()
        if task.endswith("_0"):
            assert f"job {task} is cancelled: {run_dir} goes on" in forge(slurm_cluster, "cancel", task)
            wait_for(lambda: status(run_dir)["lent"] == 0, "that it has left", 60)
            assert slurm_cluster.job(task)["JobState"] in ("CANCELLED", "COMPLETING")
    assert ": cancelled" in forge(slurm_cluster, "cancel", run_job)
    slurm_cluster.wait_for_job(f"{lender}_1", ("COMPLETED",), 120)
    assert [record["event"] for record in read(run_dir, "starts.jsonl")].count("begin") == 1
    assert not left_over(run_dir) and not lenders()
