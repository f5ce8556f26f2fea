"""The demo's GRPO on a real Slurm cluster of four hosts, through both doors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import PROJECT, check_contract, left_over, processes, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster
from test_agents import AGENT_DEMO, branching_run, check_branching_run, num_under_way

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
SPLIT = ["cluster.trainer_nodes=2", "cluster.rollout_nodes=2"]


def environment(cluster: SlurmCluster) -> dict[str, str]:
    """Where sbatch and srun find this environment's Python."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**cluster.env, "PATH": path, "PYTHONPATH": str(PROJECT)}


def log(run_dir: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in run_dir.parent.rglob("slurm-*.out"))


def check_run(run_dir: Path, steps: int) -> None:
    check_contract(run_dir, steps)
    [start] = [path for path in (run_dir / "logs").iterdir() if path.is_dir()]
    names = {path.name for path in start.iterdir()}
    assert {"trainer-0.log", "trainer-1.log", "generator-0.log", "generator-1.log"} <= names
    assert "dp_shard=2" in (start / "trainer-1.log").read_text()  # one model over two nodes
    assert "weights: TLS streams\n" in (start / "controller.log").read_text()
    assert all(record["mismatch/logprob_abs_mean"] < 1e-5 for record in read(run_dir))


def test_submit_runs_grpo_from_its_warm_start_on_four_nodes(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        *SPLIT,
        "warmstart.overrides=[trainer.training.steps=100, trainer.lr_scheduler.warmup_steps=10]",
        "trainer.training.steps=4",
        "trainer.lr_scheduler.warmup_steps=0",
        "evaluation.num_prompts=20",
    ]
    command = [sys.executable, "-m", "forge_hpc.submit", "--nodes", "4", "--run-dir", str(run_dir), *overrides]
    result = slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT)
    assert "demo.yaml" in result.stderr and str(run_dir) in result.stdout
    job = json.loads((run_dir / "status.json").read_text())["job_id"]
    wait_for(lambda: slurm_cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the end", 600)
    assert status(run_dir)["state"] == "completed", log(run_dir)
    check_run(run_dir, steps=4)
    assert status(run_dir / "warmstart")["state"] == "completed"


def test_sbatch_runs_grpo_on_four_nodes(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["sbatch", "--wait", "--nodes=4", f"--output={tmp_path}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), *SPLIT, "generator.send_changes=true", *small_run(tmp_path)]
    result = slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT, timeout_s=600, check=False)
    assert result.returncode == 0, result.stderr + log(run_dir)
    check_run(run_dir, steps=4)


def start_small_run(cluster: SlurmCluster, directory: Path, steps: int = 2000) -> tuple[str, Path]:
    """Job id and run directory of a job of two nodes that trains, once it has trained two steps."""
    run_dir = directory / "run"
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={directory}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), *small_run(directory, steps)]
    job = cluster.run(*command, env=environment(cluster), cwd=PROJECT).stdout.strip()
    wait_for(lambda: len(read(run_dir)) >= 2, "two steps", 300)
    return job, run_dir


def test_scancel_frees_the_nodes_within_15_seconds(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job, run_dir = start_small_run(slurm_cluster, tmp_path)
    slurm_cluster.run("scancel", job)
    wait_for(lambda: slurm_cluster.job(job)["JobState"] == "CANCELLED", "the cancellation", 15)
    states = ("sinfo", "-h", "-p", "main", "-o", "%t")
    wait_for(lambda: slurm_cluster.run(*states).stdout.split() == ["idle"], "all nodes idle", 15)
    assert status(run_dir)["state"] == "cancelled", log(run_dir)


def test_a_job_comes_back_after_preemption_and_after_its_controller_died(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    steps, run_dir = 40, tmp_path / "run"
    command = ["sbatch", "--parsable", "--nodes=2", "--partition=spot", f"--output={tmp_path}/slurm-%j.out"]
    command += ["sbatch/grpo.sh", "--run-dir", str(run_dir), *small_run(tmp_path, steps)]
    command += ["algorithm.max_steps_without_signal=1000", "checkpoint.interval=1"]
    job = slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT).stdout.strip()

    def starts(event: str) -> list[dict]:
        return [record for record in read(run_dir, "starts.jsonl") if record["event"] == event]

    wait_for(lambda: len(read(run_dir)) >= 3, "three steps", 300)
    urgent = ["sbatch", "--wait", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true"]
    slurm_cluster.run(*urgent, f"--output={tmp_path}/urgent.out", env=environment(slurm_cluster), timeout_s=120)
    [end] = starts("end")
    assert (end["state"], end["cause"]) == ("preempted", "preempted")
    assert end["step"] == len(read(run_dir)), "the last step was saved"
    wait_for(lambda: len(starts("begin")) == 2, "the second start", 120)
    wait_for(lambda: len(read(run_dir)) >= end["step"] + 2, "steps after the preemption", 300)
    victim, *_ = processes(run_dir, "forge_hpc.controller")
    victim.kill()
    wait_for(lambda: len(starts("end")) == 2, "the end of the job", 30)
    assert starts("end")[1]["cause"] == "crash" and "SIGKILL" in starts("end")[1]["message"]
    wait_for(lambda: slurm_cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the end", 400)
    assert status(run_dir)["state"] == "completed", log(run_dir)
    assert slurm_cluster.job(job)["Restarts"] == "2"
    check_contract(run_dir, steps)
    assert not left_over(run_dir)


@pytest.mark.training  # two starts
def test_a_preemption_amid_an_agents_episodes_requeues_the_job_and_every_episode_is_trained_once(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The agent plays on the first node, and asks a generator on the second."""
    steps, run_dir = 20, tmp_path / "run"
    command = ["sbatch", "--parsable", "--nodes=2", "--partition=spot", f"--output={tmp_path}/slurm-%j.out"]
    command += ["sbatch/grpo.sh", "--config", str(AGENT_DEMO), "--run-dir", str(run_dir)]
    command += [*branching_run(tmp_path, steps), "evaluation.num_prompts=0"]
    job = slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT).stdout.strip()
    wait_for(lambda: len(read(run_dir)) >= 1 and num_under_way(tmp_path) > 0, "episodes of a later step", 600)
    urgent = ["sbatch", "--wait", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true"]
    slurm_cluster.run(*urgent, f"--output={tmp_path}/urgent.out", env=environment(slurm_cluster), timeout_s=120)
    [end] = ends(run_dir)
    assert (end["state"], end["cause"]) == ("preempted", "preempted"), log(run_dir)
    assert 1 <= end["step"] == len(read(run_dir)) < steps, "the last step was saved"
    wait_for(lambda: slurm_cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the end", 600)
    assert status(run_dir)["state"] == "completed", log(run_dir)
    assert slurm_cluster.job(job)["Restarts"] == "1"
    check_branching_run(run_dir, steps)
    assert not left_over(run_dir)


def first_supervisor(run_dir: Path) -> psutil.Process:
    """The supervisor of the first node, as Slurm has started it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            ours = "forge_hpc.run" in words and str(run_dir) in words and "--after" not in words
            if ours and "python" in process.name() and process.environ().get("SLURM_PROCID") == "0":
                return process
    raise AssertionError("no supervisor")


def test_a_job_comes_back_when_the_supervisor_of_its_first_node_is_killed(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    job, run_dir = start_small_run(slurm_cluster, tmp_path, steps=12)
    first_supervisor(run_dir).kill()
    wait_for(lambda: len(ends(run_dir)) == 1, "the end of the first start", 60)
    assert (ends(run_dir)[0]["state"], ends(run_dir)[0]["cause"]) == ("preempted", "crash"), log(run_dir)
    assert "a supervisor has died without a word" in ends(run_dir)[0]["message"]
    wait_for(lambda: slurm_cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the end", 400)
    assert status(run_dir)["state"] == "completed", log(run_dir)
    assert slurm_cluster.job(job)["Restarts"] == "1"
    assert [record["step"] for record in read(run_dir)] == list(range(1, 13))
    assert not left_over(run_dir)


def test_a_run_with_successors_goes_on_in_another_job_however_its_job_ended(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir, steps = tmp_path / "run", 30
    command = [sys.executable, "-m", "forge_hpc.submit", "--nodes", "1", "--run-dir", str(run_dir)]
    command += [*small_run(tmp_path, steps), "slurm.requeue=successor", "checkpoint.interval=1"]
    slurm_cluster.run(*command, "algorithm.max_steps_without_signal=1000", env=environment(slurm_cluster), cwd=PROJECT)
    jobs = [status(run_dir)["job_id"]]
    for ending, cause in (("leave", "walltime"), ("die", "crash")):
        done = len(read(run_dir))
        wait_for(lambda: len(read(run_dir)) >= done + 2, "two steps", 300)  # noqa: B023
        if ending == "leave":
            slurm_cluster.run("scancel", "--signal=USR2", jobs[-1])
        else:
            first_supervisor(run_dir).kill()
        wait_for(lambda: status(run_dir)["job_id"] != jobs[-1], "a successor", 90)
        assert ends(run_dir)[-1]["cause"] == cause
        jobs.append(status(run_dir)["job_id"])
    slurm_cluster.wait_for_job(jobs[-1], timeout_s=400)
    assert status(run_dir)["state"] == "completed", log(run_dir)
    assert {slurm_cluster.job(job)["Restarts"] for job in jobs} == {"0"}
    check_contract(run_dir, steps)


@pytest.mark.parametrize(("choice", "requeue"), [("never", "0"), ("successor", "0"), ("auto", "1")])
def test_a_job_of_sbatch_is_requeued_by_slurm_only_where_the_run_wants_it(
    slurm_cluster: SlurmCluster, tmp_path: Path, choice: str, requeue: str
) -> None:
    command = ["sbatch", "--parsable", "--nodes=1", f"--output={tmp_path}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(tmp_path / "run"), f"slurm.requeue={choice}", "slurm.setup=[exit 3]"]
    job = slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT).stdout.strip()
    assert slurm_cluster.wait_for_job(job, ["FAILED"])["Requeue"] == requeue, log(tmp_path / "run")


def ends(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read(run_dir, "starts.jsonl") if record["event"] == "end"]


def test_sft_is_the_same_on_one_node_and_on_two_and_when_it_was_stopped(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    steps = 20

    def submit(name: str, nodes: int) -> str:
        command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={tmp_path}/slurm-%j.out", "sbatch/sft.sh"]
        command += ["--run-dir", str(tmp_path / name), f"trainer.training.steps={steps}", "evaluation.num_prompts=0"]
        command += ["trainer.lr_scheduler.warmup_steps=5", "checkpoint.interval=2"]
        return slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT).stdout.strip()

    def wait(*jobs: str) -> None:
        for job in jobs:
            slurm_cluster.wait_for_job(job, timeout_s=600)

    stopped = submit("stopped", 2)
    wait_for(lambda: len(read(tmp_path / "stopped")) >= 3, "three steps", 300)
    slurm_cluster.run("scancel", "--signal=USR2", stopped)  # save, leave, come back
    wait(submit("one", 1), submit("two", 2), stopped)
    assert [record["state"] for record in read(tmp_path / "stopped", "starts.jsonl") if record["event"] == "end"] == [
        "preempted",
        "completed",
    ]
    one, two, again = (read(tmp_path / name) for name in ("one", "two", "stopped"))
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in two], abs=1e-4)
    same = ("step", "loss", "grad_norm", "lr", "tokens/trained")
    assert [[record[key] for key in same] for record in again] == [[record[key] for key in same] for record in two]
    weights = [(tmp_path / name / "export/model.safetensors").read_bytes() for name in ("two", "stopped")]
    assert weights[0] == weights[1]
