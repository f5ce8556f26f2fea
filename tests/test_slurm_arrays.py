"""Job arrays on a real cluster: what a task does is done to it alone, by the last one too, whose id is the array's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, read, wait_for
from slurm_cluster import SlurmCluster

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.slurm import corrections, job_facts, own_job_id
from forge_hpc.slurm import job as jobs

pytestmark = [pytest.mark.timeout(900)]
DONE = ("COMPLETED", "FAILED", "CANCELLED")

# A task that does what the file of its number says: "facts", "requeue", "successor" or "end". In a later life, or as a
# successor, it ends at once.
TASK = """
import json, os, signal, sys, time
from pathlib import Path
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.slurm import cause_of, job_facts, requeue, submit_successor

directory = Path(sys.argv[1])
allocation, task = Allocation.from_environment(), os.environ["SLURM_ARRAY_TASK_ID"]
job = allocation.job_id

def say(event, **fields):
    common = {"event": event, "task": task, "job": job, "raw": os.environ["SLURM_JOB_ID"]}
    with (directory / "log").open("a") as log:
        log.write(json.dumps(common | {"restarts": allocation.requeues} | fields) + "\\n")

say("started")
if allocation.requeues or "FORGE_HPC_CONTINUE" in os.environ:
    sys.exit(0)
while True:
    time.sleep(0.05)
    order = directory / f"task-{task}"
    if not order.exists():
        continue
    what = order.read_text()
    order.unlink()
    facts = job_facts(job)
    if what == "facts":
        say("facts", state=facts.state, named=facts.job_id, cause=cause_of(facts, signal.SIGTERM, 0))
    elif what == "successor":
        say("successor", id=submit_successor(facts, directory))
    elif what == "requeue":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        requeue(job, [os.environ["SLURMD_NODENAME"]])
        sys.exit(0)
    elif what == "end":
        sys.exit(0)
"""


class Array:
    """Tasks that wait for orders, and what they have written down."""

    def __init__(self, cluster: SlurmCluster, directory: Path, *options: str) -> None:
        self.cluster, self.directory = cluster, directory
        (directory / "logs").mkdir()
        (directory / "task.py").write_text(TASK)
        script = directory / "job.sh"
        script.write_text(
            f"#!/bin/bash\n#SBATCH --mem=1 --output={directory}/out-%A_%a\n"
            f"exec srun {sys.executable} {directory}/task.py {directory}\n"
        )
        env = {**cluster.env, "PYTHONPATH": str(PROJECT)}
        self.id = cluster.run("sbatch", "--parsable", *options, str(script), env=env).stdout.strip()

    def said(self, event: str, task: int | None = None) -> list[dict[str, Any]]:
        found = [record for record in read(self.directory, "log") if record["event"] == event]
        return [record for record in found if task is None or record["task"] == str(task)]

    def wait(self, event: str, task: int, number: int = 1) -> dict[str, Any]:
        what = f"{event} {number} of task {task}"
        return wait_for(lambda: len(self.said(event, task)) >= number, what, 120) and self.said(event, task)[number - 1]

    def tell(self, task: int, what: str) -> None:
        order = self.directory / f"task-{task}"
        order.with_suffix(".new").write_text(what)
        order.with_suffix(".new").rename(order)

    def state(self, task: int) -> dict[str, str]:
        return self.cluster.job(f"{self.id}_{task}")


@pytest.mark.slurm
def test_the_last_task_of_an_array_reads_requeues_follows_and_cancels_itself_alone(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    array = Array(slurm_cluster, tmp_path, "--array=1-3%2", "--nodes=1")
    for task in (1, 2):
        array.wait("started", task)
    array.tell(1, "end")  # it makes room
    last = array.wait("started", 3)
    assert (last["raw"], last["job"]) == (array.id, f"{array.id}_3")

    array.tell(3, "facts")
    facts = array.wait("facts", 3)
    assert (facts["state"], facts["named"], facts["cause"]) == ("RUNNING", f"{array.id}_3", "unknown")

    array.tell(3, "successor")
    successor = array.wait("successor", 3)["id"]
    waits_for = slurm_cluster.job(successor.partition("_")[0])["Dependency"]
    assert waits_for.startswith(f"afterany:{array.id}_3")
    array.tell(3, "requeue")
    assert array.wait("started", 3, number=2)["restarts"] == 1
    slurm_cluster.wait_for_job(f"{array.id}_3")
    follower = array.wait("started", 3, number=3)  # the same task of an array of its own
    assert follower["job"] == successor

    assert array.state(2)["ExcNodeList"] == "(null)" and array.state(3)["ExcNodeList"].startswith("fhpc")
    assert array.state(2)["JobState"] == "RUNNING"
    assert [array.state(task)["Restarts"] for task in (1, 2, 3)] == ["0", "0", "1"]
    jobs.cancel_job(array.wait("started", 2)["job"])
    slurm_cluster.wait_for_job(f"{array.id}_2", ["CANCELLED"])
    assert [len(array.said("started", task)) for task in (1, 2)] == [1, 1]


@pytest.mark.slurm
def test_cancelling_the_last_task_leaves_the_others_alone(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    array = Array(slurm_cluster, tmp_path, "--array=1-2", "--nodes=1")
    first, last = array.wait("started", 1), array.wait("started", 2)
    assert last["raw"] == array.id
    jobs.cancel_job(last["job"])
    slurm_cluster.wait_for_job(last["job"], ["CANCELLED"])
    assert jobs.is_active(first["job"]) and not jobs.is_active(last["job"])
    array.tell(1, "end")
    slurm_cluster.wait_for_job(f"{array.id}_1")


@pytest.mark.slurm
def test_a_job_inside_a_task_of_an_array_is_not_that_task(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    inner, outer = tmp_path / "inner.sh", tmp_path / "outer.sh"
    inner.write_text(f"#!/bin/bash\n#SBATCH --mem=1 --output=/dev/null\nenv -0 > {tmp_path}/new\nsleep 600\n")
    outer.write_text(
        "#!/bin/bash\n#SBATCH --mem=1 --array=7 --requeue --output=/dev/null\n"
        f"[[ $SLURM_RESTART_COUNT ]] || exec sleep 600\nsbatch --parsable {inner} > {tmp_path}/id\n"
    )
    array = slurm_cluster.run("sbatch", "--parsable", str(outer)).stdout.strip()
    slurm_cluster.wait_for_job(f"{array}_7", ["RUNNING"])
    slurm_cluster.run("scontrol", "requeue", f"{array}_7")
    wait_for(lambda: (tmp_path / "new").exists() and (tmp_path / "new").stat().st_size, "the inner job", 120)
    job = (tmp_path / "id").read_text().strip()
    environ = dict(pair.split("=", 1) for pair in (tmp_path / "new").read_text().split("\0") if "=" in pair)
    assert own_job_id(environ) == f"{array}_7", "Slurm hands the outer job's variables on"
    right = corrections(job_facts(job), environ)
    mended = {key: value for key, value in (environ | right).items() if value is not None}
    allocation = Allocation.from_environment(mended)
    assert (allocation.job_id, allocation.requeues, int(environ["SLURM_RESTART_COUNT"])) == (job, 0, 1)
    assert own_job_id({k: v for k, v in (environ | corrections(None, environ)).items() if v is not None}) == job
    slurm_cluster.run("scancel", job)


@pytest.mark.slurm
def test_each_task_of_an_array_finds_the_project_where_its_script_lies(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    command = ["sbatch", "--parsable", "--nodes=1", "--array=1-2", f"--output={tmp_path}/out-%A_%a"]
    command += [str(PROJECT / "sbatch/sft.sh"), "slurm.setup=[exit 3]", "slurm.requeue=never"]
    env = {**slurm_cluster.env, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    array = slurm_cluster.run(*command, env=env, cwd=tmp_path).stdout.strip()
    for task in (1, 2):
        slurm_cluster.wait_for_job(f"{array}_{task}", ["FAILED"])
    found = sorted(path.name.partition("-")[2] for path in (tmp_path / "runs").iterdir())
    logs = "".join(path.read_text() for path in tmp_path.glob("out-*"))
    assert [name.rpartition("-")[2] for name in found] == [f"{array}_1", f"{array}_2"], logs


def test_a_task_of_an_array_goes_by_the_array_and_its_number() -> None:
    last = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}
    assert Allocation.from_environment(last).job_id == "70_3"
    assert corrections(None, last) == {}
    assert [jobs.is_job_id(job_id) for job_id in ("70", "70_3", "local", None, "")] == [True, True, False, False, False]
