"""Sweeps, jobs that wait for others, and runs within an allocation, on a real cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, left_over, read, run_local, status, wait_for
from slurm_cluster import SlurmCluster

from forge_hpc import Run
from forge_hpc.config import UserError
from forge_hpc.slurm.successor import move_dependents

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SFT = PROJECT / "configs/sft/demo.yaml"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED")
SHORT = ["trainer.lr_scheduler.warmup_steps=0", "evaluation.num_prompts=0"]
NOT_STARTED = "slurm.setup=['exit 3']"
"""These are about how a run gets there."""


def forge(cluster: SlurmCluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_hpc.cli", *arguments]
    env = {**cluster.env, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return cluster.run(*command, env=env, cwd=PROJECT, check=check, timeout_s=300)


def submit(cluster: SlurmCluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return forge(cluster, "submit", "--config", str(SFT), *arguments, check=check)


def job_of(run_dir: Path) -> str:
    return str(status(run_dir)["job_id"])


def learned(run_dir: Path) -> list[dict[str, Any]]:
    """What a run has measured, but for how long it took."""
    untold = ("time/", "perf/", "wall_time", "memory/")
    return [{k: v for k, v in record.items() if not k.startswith(untold)} for record in read(run_dir)]


def assert_equal_to_one_alone(run_dir: Path, alone: Path) -> None:
    """To the last bit, in its figures and its model."""
    assert learned(run_dir) == learned(alone) != []
    models = [(folder / "export/model.safetensors").read_bytes() for folder in (run_dir, alone)]
    assert models[0] == models[1]


def wait_for_end(run_dir: Path, timeout_s: float = 600) -> None:
    """By its own status: hundreds of questions would keep Slurm from its work."""
    wait_for(
        lambda: status(run_dir).get("state") in ("completed", "failed", "cancelled"), f"the end of {run_dir}", timeout_s
    )
    assert status(run_dir)["state"] == "completed", "".join(log.read_text() for log in run_dir.glob("logs/*.out"))


def test_each_run_of_a_sweep_is_a_task_that_is_what_it_is_alone(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    sweep, overrides = tmp_path / "sweep", ["trainer.training.steps=2", *SHORT]
    said = submit(slurm_cluster, "--run-dir", str(sweep), *overrides, "--sweep", "seed=0,1", "--at-once=1")
    array = job_of(sweep / "0").partition("_")[0]
    assert f"job array      {array}" in said.stdout and "#SBATCH --array=0-1%1" in script_of(sweep)
    assert json.loads((sweep / "sweep.json").read_text())["runs"] == [["seed=0"], ["seed=1"]]
    alone = run_local(tmp_path / "alone", [*overrides, "seed=1"], config=SFT)
    assert alone.returncode == 0, alone.stderr
    for number in (0, 1):
        run_dir = sweep / str(number)
        wait_for_end(run_dir)
        assert job_of(run_dir) == f"{array}_{number}"
        assert (run_dir / f"logs/slurm-{array}_{number}.out").exists()
        assert (run_dir / f"logs/{array}_{number}.0").is_dir()
    starts = [read(sweep / str(number), "starts.jsonl") for number in (0, 1)]
    begins, ends = ([r["time"] for run in starts for r in run if r["event"] == event] for event in ("begin", "end"))
    assert begins[1] > ends[0] or begins[0] > ends[1], "one at once"
    assert learned(sweep / "0") != learned(sweep / "1")
    assert_equal_to_one_alone(sweep / "1", tmp_path / "alone")


def script_of(directory: Path) -> str:
    [script] = (directory / "logs").glob("*_submission.sh")
    return script.read_text()


@pytest.mark.training  # 14 starts
@pytest.mark.timeout(3600)
def test_six_runs_on_four_hosts_two_of_them_preempted_are_what_they_are_alone(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    overrides = ["trainer.training.steps=10", *SHORT]
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
    for number in range(6):
        wait_for_end(sweep / str(number), 1800)
        ends = [record["cause"] for record in read(sweep / str(number), "starts.jsonl") if record["event"] == "end"]
        assert ends == [*["preempted"] * (number in victims), "completed"]
        assert slurm_cluster.job(f"{array}_{number}")["Restarts"] == str(int(number in victims))
        print(f"run {number} {' '.join(runs[number])}: {', '.join(ends)}, {len(learned(sweep / str(number)))} steps")
    for number, changes in enumerate(runs):
        alone = run_local(tmp_path / f"alone-{number}", [*overrides, *changes], config=SFT)
        assert alone.returncode == 0, alone.stderr
        assert_equal_to_one_alone(sweep / str(number), tmp_path / f"alone-{number}")
        print(f"run {number} is equal to one alone")


def test_a_sweep_larger_than_arrays_may_be_is_refused(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    values = ",".join(map(str, range(1002)))
    refused = submit(slurm_cluster, "--run-dir", str(tmp_path / "sweep"), "--sweep", f"seed={values}", check=False)
    assert refused.returncode == 2 and "1001 tasks at most (MaxArraySize)" in refused.stderr
    assert not (tmp_path / "sweep").exists()


def test_jobs_begin_after_others_when_released_and_not_before_their_time(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    runs = {name: tmp_path / name for name in ("held", "later", "after", "last")}
    said = submit(slurm_cluster, "--run-dir", str(runs["held"]), NOT_STARTED, "--hold").stdout
    assert f"when it is released: scontrol release {job_of(runs['held'])}\n" in said
    said = submit(slurm_cluster, "--run-dir", str(runs["later"]), NOT_STARTED, "--begin=now+2hours").stdout
    begin = slurm_cluster.job(job_of(runs["later"]))["EligibleTime"]  # in local time
    assert f"starts         not before {begin[:16].replace('T', ' ')} (now+2hours)\n" in said
    several = ("--run-dir", str(tmp_path / "sweep"), "--sweep", "seed=0,1", "--begin=2037-01-31T08:00")
    said = submit(slurm_cluster, NOT_STARTED, *several).stdout
    assert "starts         not before 2037-01-31 08:00 (2037-01-31T08:00)\n" in said
    slurm_cluster.run("scancel", job_of(tmp_path / "sweep/0").partition("_")[0])
    held, later = job_of(runs["held"]), job_of(runs["later"])
    waits = ("--after", str(runs["held"]), "--after", later)
    said = submit(slurm_cluster, "--run-dir", str(runs["after"]), NOT_STARTED, *waits).stdout
    after = job_of(runs["after"])
    assert f"starts         after jobs {held}, {later} have ended well\n" in said
    said = submit(slurm_cluster, "--dry-run", NOT_STARTED, "--after", after).stdout
    assert f"# sbatch --dependency=afterok:{after}" in said and "#SBATCH --dependency" not in said
    for more in (("--sweep", "seed=0,1"), ("--then", str(SFT))):
        said = submit(slurm_cluster, "--dry-run", NOT_STARTED, *more)
        assert "| trainers " in said.stdout and "starts " in said.stderr
        nowhere = submit(slurm_cluster, "--dry-run", NOT_STARTED, "slurm.partition=nowhere", *more, check=False)
        assert nowhere.returncode == 2 and "slurm.partition" in nowhere.stderr
    assert slurm_cluster.job(held)["Reason"] == "JobHeldUser"
    assert slurm_cluster.job(later)["Reason"] == "BeginTime"
    waits_for = slurm_cluster.job(after)["Dependency"]
    assert waits_for == f"afterok:{held}(unfulfilled),afterok:{later}(unfulfilled)"
    slurm_cluster.run("scancel", held, later, after)
    refused = submit(slurm_cluster, NOT_STARTED, "--after", str(runs["held"]), check=False)
    assert refused.returncode == 2 and "is pending, and no job goes on with it" in refused.stderr


def test_a_task_that_waits_is_cancelled_alone_and_a_sweep_by_its_directory(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Slurm forgets such a task at once."""
    sweep = tmp_path / "sweep"
    submit(slurm_cluster, "--run-dir", str(sweep), NOT_STARTED, "--hold", "--sweep", "seed=0,1,2")
    task = job_of(sweep / "1")
    assert task.endswith("_1")
    said = forge(slurm_cluster, "cancel", str(sweep / "1")).stdout
    assert said == f"{sweep}/1: cancelled  job {task} was cancelled\n"
    rows = forge(slurm_cluster, "status", str(sweep)).stdout.splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["0", "pending,"], ["1", "cancelled"], ["2", "pending,"]]
    said = forge(slurm_cluster, "cancel", str(sweep)).stdout
    assert f"{sweep}/1 is cancelled already\n" in said and said.count(" was cancelled\n") == 2
    assert {status(sweep / str(number))["state"] for number in range(3)} == {"cancelled"}


def test_who_waits_for_a_job_waits_for_its_successor(
    slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))

    def held(*options: str) -> str:
        command = ["sbatch", "--parsable", "--hold", "--output=/dev/null", *options, "--wrap=true"]
        return slurm_cluster.run(*command).stdout.strip()

    job, other = held(), held()
    successor, waits, apart = (
        held(f"--dependency=afterany:{job}"),
        held(f"-dafterok:{other}:{job}"),
        held(f"-dafterok:{other}"),
    )
    assert move_dependents(job, successor) == [waits]
    for name, waits_for in ((waits, [other, successor]), (apart, [other])):
        wanted = ",".join(f"afterok:{job_id}(unfulfilled)" for job_id in waits_for)
        assert slurm_cluster.job(name)["Dependency"] == wanted
    assert slurm_cluster.job(successor)["Dependency"] == f"afterany:{job}(unfulfilled)"
    slurm_cluster.run("scancel", job, other, successor, waits, apart)


def test_the_stages_of_a_pipeline_wait_for_each_other(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    stages = [str(PROJECT / f"configs/{name}/demo.yaml") for name in ("grpo", "eval")]
    waits = ("--hold", "--then", stages[0], "--then", stages[1])
    said = submit(slurm_cluster, "--run-dir", str(tmp_path / "p"), *waits).stdout
    runs = [tmp_path / "p" / name for name in ("1-demo-sft", "2-demo", "3-eval-demo")]
    jobs = [job_of(run) for run in runs]
    assert slurm_cluster.job(jobs[0])["Reason"] == "JobHeldUser"
    assert f"starts         when it is released: scontrol release {jobs[0]}\n" in said
    for job, before in zip(jobs[1:], jobs, strict=False):
        assert slurm_cluster.job(job)["Dependency"] == f"afterok:{before}(unfulfilled)"
    assert f"path: {runs[1]}/export" in (runs[2] / "config.yaml").read_text()
    slurm_cluster.run("scancel", *jobs)


def test_a_run_object_is_its_job(slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    run = Run.submit(SFT, run_dir=tmp_path / "run", on="slurm", **{"slurm.setup": ["echo started", "sleep 600"]})
    assert run.job_id is not None and run.state == "pending" and run.metrics().empty
    wait_for(lambda: "started" in run.logs(), "its output", 120)
    with pytest.raises(TimeoutError):
        run.wait(timeout_s=1)
    Run(tmp_path / "run").cancel()
    assert (run.wait(), slurm_cluster.job(run.job_id)["JobState"]) == ("cancelled", "CANCELLED")
    dead = Run.submit(SFT, run_dir=tmp_path / "dead", on="slurm", **{"slurm.setup": ["exit 3"]})
    with pytest.raises(UserError, match=r"has died: job .* is no longer active"):
        dead.wait(timeout_s=120)


def test_what_is_submitted_within_an_allocation_runs_on_its_nodes_at_once(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir, host = (
        tmp_path / "run",
        "slurm.setup=['echo on $SLURMD_NODENAME as $SLURM_PROCID of $SLURM_JOB_ID; exit 3']",
    )
    command = [sys.executable, "-m", "forge_hpc.cli", "submit", "--config", str(SFT), "--run-dir", str(run_dir), host]
    env = {**slurm_cluster.env, "PYTHONPATH": str(PROJECT)}
    salloc = ["salloc", "--nodes=2", "--exclusive", "--mem=0"]
    done = slurm_cluster.run(*salloc, *command, env=env, cwd=PROJECT, check=False, timeout_s=300)
    tasks = {tuple(line.split()[1::2]) for line in done.stdout.splitlines() if line.startswith("on fhpc")}
    hosts, numbers, jobs = (set(column) for column in zip(*tasks, strict=True))
    assert numbers == {"0", "1"} and len(hosts) == 2, done.stdout + done.stderr
    assert len(jobs) == 1, "no job but the allocation"
    assert done.returncode == 3 and "2 nodes" in done.stdout
    done = slurm_cluster.run(*salloc, *command, "--nodes=3", env=env, cwd=PROJECT, check=False, timeout_s=300)
    assert done.returncode == 2 and "3 nodes are asked for, and this shell's allocation" in done.stderr


@pytest.mark.parametrize("by", ["Ctrl-C", "forge-hpc cancel"])
def test_a_run_in_an_allocation_saves_when_it_is_interrupted_and_its_allocation_stays(
    slurm_cluster: SlurmCluster, tmp_path: Path, by: str
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "forge_hpc.cli", "submit", "--config", str(SFT), "--run-dir", str(run_dir)]
    script = tmp_path / "shell.sh"
    script.write_text(
        f"#!/bin/bash\necho $$ $SLURM_JOB_ID > {tmp_path}/shell\n{' '.join([*command, *SHORT])} &\n"
        f"echo $! > {tmp_path}/pid; wait $!; echo $? > {tmp_path}/code\n"
        f"squeue --noheader --jobs=$SLURM_JOB_ID --format=%T > {tmp_path}/state\n"
    )
    env = {**slurm_cluster.env, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    salloc = ["salloc", "--nodes=1", "--exclusive", "--mem=0", "bash", str(script)]
    with subprocess.Popen(
        salloc, env=env, cwd=PROJECT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as shell:
        try:
            wait_for(lambda: len(read(run_dir)) >= 2, "two steps", 300)
            if by == "Ctrl-C":
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)
            else:
                slurm_cluster.run(sys.executable, "-m", "forge_hpc.cli", "cancel", str(run_dir), env=env, cwd=PROJECT)
            out, err = shell.communicate(timeout=120)
        finally:
            shell.terminate()
    assert status(run_dir)["state"] == "cancelled", out + err
    assert (tmp_path / "code").read_text() == "130\n"
    assert (tmp_path / "state").read_text() == "RUNNING\n"
    [end] = [record for record in read(run_dir, "starts.jsonl") if record["event"] == "end"]
    assert end["step"] == len(read(run_dir)) >= 2, "the last step was saved"
    assert not left_over(run_dir)
