"""A step gets what its own job asked for, and the batch shell's environment, wherever the job was submitted."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from runs import PROJECT, wait_for
from slurm_cluster import SlurmCluster

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.config import Config
from forge_hpc.slurm import job_facts
from launchers.command import job_command
from launchers.slurm import RunExecutor, adopt_shell

# In the place of Python: what a task is given.
TASK = """\
#!/bin/bash
step=$(scontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" | sed -n 's/^ *TRES=//p')
echo "task $SLURM_PROCID of $SLURM_NTASKS: $step gpus=${CUDA_VISIBLE_DEVICES-} mark=$MARK" >> "$HERE/$SLURM_JOB_NAME"
"""


def cores_and_memory(tres: str) -> dict[str, str]:
    return dict(re.findall(r"(cpu|mem)=(\w+)", tres))


JOBS = {
    # name: (options, GPUs that each of the tasks sees)
    "whole": ("--nodes=2 --exclusive --mem=0", 0),
    "gpus": ("--nodes=2 --gpus-per-node=3 --mem=2G --cpus-per-task=4", 3),
    "gres": ("--nodes=1 --gres=gpu:h100:2 --mem-per-cpu=100M --cpus-per-task=2", 2),
    "by-task": ("--nodes=2 --ntasks-per-node=1 --gpus-per-task=2 --mem-per-gpu=1G", 2),
    "tasks": ("--nodes=1 --ntasks=3 --mem=1G", 0),
    "no-export": ("--nodes=1 --mem=1G --export=NONE", 0),
}


@pytest.mark.slurm
def test_a_step_has_all_that_its_job_has_inside_another_job_too(gpu_cluster: SlurmCluster, tmp_path: Path) -> None:
    task, outer = tmp_path / "task", tmp_path / "outer.sh"
    task.write_text(TASK)
    task.chmod(0o700)
    start = job_command(Config(), tmp_path).replace(shlex.quote(sys.executable), str(task))
    lines = ["#!/bin/bash"]
    for name, (options, _) in JOBS.items():
        inner = tmp_path / f"{name}.sh"
        inner.write_text(f"#!/bin/bash\nexport HERE={tmp_path} MARK=batch\n{start}\n")
        lines.append(f"sbatch --parsable --job-name={name} --time=5 --output={tmp_path}/{name}.out {options} {inner}")
    outer.write_text("\n".join(lines))
    command = ["sbatch", "--wait", "--nodes=1", "--ntasks=2", "--cpus-per-task=1", "--gpus-per-node=1", "--mem=50M"]
    command += ["--time=1", "--exclusive", f"--output={tmp_path}/ids", str(outer)]
    shell = {"SBATCH_EXPORT": "ALL", "SLURM_TIMELIMIT": "0:01", "SLURM_GPUS_PER_TASK": "1", "SRUN_CPUS_PER_TASK": "1"}
    gpu_cluster.run(*command, env={**gpu_cluster.env, **shell}, timeout_s=120)
    jobs = dict(zip(JOBS, (tmp_path / "ids").read_text().split(), strict=True))
    for name, (_, gpus) in JOBS.items():
        job = gpu_cluster.wait_for_job(jobs[name], ["COMPLETED", "FAILED"])
        found = sorted((tmp_path / name).read_text().splitlines()) if (tmp_path / name).exists() else []
        assert len(found) == int(job["NumNodes"]), (name, found, (tmp_path / f"{name}.out").read_text())
        has = cores_and_memory(job.get("AllocTRES", job.get("TRES", "")))
        for number, line in enumerate(found):
            assert line.startswith(f"task {number} of {job['NumNodes']}:") and line.endswith(" mark=batch"), (
                name,
                line,
            )
            seen = line.partition("gpus=")[2].partition(" ")[0]
            assert len([gpu for gpu in seen.split(",") if gpu]) == gpus, (name, line)
            assert cores_and_memory(line) == has, (name, line)


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["option", "variable"])
def test_tasks_have_the_batch_shell_s_environment_where_sbatch_exports_none(
    slurm_cluster: SlurmCluster, tmp_path: Path, how: str
) -> None:
    option, shell = (["--export=NONE"], {}) if how == "option" else ([], {"SBATCH_EXPORT": "NONE"})
    command = ["sbatch", "--parsable", "--nodes=2", *option, f"--output={tmp_path}/out", "sbatch/grpo.sh"]
    tell = f"env > {tmp_path}/part-$SLURM_PROCID; mv {tmp_path}/part-$SLURM_PROCID {tmp_path}/task-$SLURM_PROCID"
    wait = f"until test -e {tmp_path}/task-0 && test -e {tmp_path}/task-1; do sleep 0.1; done"  # one ends the other
    command += ["--run-dir", str(tmp_path / "run"), f"slurm.setup=[{tell}, {wait}, exit 3]"]
    job = slurm_cluster.run(*command, env={**slurm_cluster.env, **shell}, cwd=PROJECT).stdout.strip()
    slurm_cluster.wait_for_job(job, ["FAILED"])
    for task in range(2):
        text = (tmp_path / f"task-{task}").read_text()
        assert "\nPATH=/" in f"\n{text}" and f"PYTHONPATH={PROJECT}" in text, (tmp_path / "out").read_text()


@pytest.mark.slurm
def test_a_job_is_submitted_as_it_was_rendered_whatever_the_shell_has_left(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in slurm_cluster.env.items():
        monkeypatch.setenv(key, value)
    left = {"SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "1-2", "SBATCH_EXPORT": "NONE", "SBATCH_MEM_PER_CPU": "1M"}
    left |= {"SBATCH_PARTITION": "spot", "SLURM_NTASKS": "7", "SLURM_RESTART_COUNT": "2", "SLURM_GPUS_PER_NODE": "1"}
    for key, value in left.items():
        monkeypatch.setenv(key, value)
    cfg = Config(name="mine")
    cfg.slurm.time, cfg.slurm.setup = "0:20:00", [f"env > {tmp_path}/env", "exit 0"]
    cfg.slurm.extra = {"hold": True}
    assert adopt_shell(cfg) == ["SBATCH_ARRAY_INX", "SBATCH_EXPORT", "SBATCH_MEM_PER_CPU", "SBATCH_TIMELIMIT"]
    job = RunExecutor(cfg, tmp_path).submit_run()
    facts = job_facts(job)
    assert facts is not None
    assert (facts.job_id, facts.time_limit, facts.partition) == (job, "00:20:00", "spot")
    assert facts.said["MinMemoryNode"] == "0" and facts.said["NumTasks"] == "1"
    assert {key: os.environ[key] for key in left} == left  # the shell's own are its own again
    slurm_cluster.run("scontrol", "release", job)
    wait_for(lambda: (tmp_path / "env").exists() and "SLURM_PROCID" in (tmp_path / "env").read_text(), "the task", 60)
    slurm_cluster.run("scancel", job)
    text = (tmp_path / "env").read_text()
    assert "SLURM_RESTART_COUNT" not in text and "\nPATH=" in f"\n{text}"


def test_what_the_configuration_says_wins_over_the_shell() -> None:
    cfg = Config()
    cfg.slurm.partition = "gpu"
    assert adopt_shell(cfg, {"SBATCH_PARTITION": "cpu", "SBATCH_ACCOUNT": "me", "SBATCH_QOS": ""}) == []
    assert (cfg.slurm.partition, cfg.slurm.account, cfg.slurm.qos) == ("gpu", "me", None)


def test_the_batch_shell_counts_the_nodes_of_its_job_since_it_has_no_tasks() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "4"}
    assert Allocation.from_environment(environ).num_nodes == 4
    assert Allocation.from_environment(environ | {"SLURM_NTASKS": "3"}).num_nodes == 3  # of a step that lost a node
