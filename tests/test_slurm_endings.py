"""How a run ends in a job that was preempted, on a real cluster: what it ended with is what Slurm shows, and the last.

All but the controller is real. The tables behind it are made by slurm_endings.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, read, status
from slurm_cluster import SlurmCluster, missing_requirement

from forge_hpc.config import load_config, save_config
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm import parse_release

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
GRACE_S = 30
SHORT_S = 8
PARTITIONS = (
    "PartitionName=main Nodes={nodes} Default=YES PreemptMode=OFF PriorityTier=1",
    "PartitionName=urgent Nodes={nodes} PreemptMode=OFF PriorityTier=10",
    f"PartitionName=requeue Nodes={{nodes}} PreemptMode=REQUEUE PriorityTier=1 GraceTime={GRACE_S}",
    f"PartitionName=cancel Nodes={{nodes}} PreemptMode=CANCEL PriorityTier=1 GraceTime={GRACE_S}",
    f"PartitionName=requeue-soon Nodes={{nodes}} PreemptMode=REQUEUE PriorityTier=1 GraceTime={SHORT_S}",
)

# The supervisor of a run whose controller does what it is told to: `leave`, `complete`, … when the run is asked to
# leave, `then fail` by itself, one action a start.
TASK = """
import json, os, sys, time
from pathlib import Path
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.supervisor.ending import Cause, Ending
from forge_hpc.supervisor.first_node import FirstNode
from forge_hpc.supervisor.supervisor import Supervisor
from forge_hpc.run_dir import RunDir

run_dir, plan = RunDir(Path(sys.argv[1])), sys.argv[2:]

def say(**fields):
    with (run_dir.path / "said").open("a") as file:
        file.write(json.dumps(fields) + "\\n")

class Run(FirstNode):
    def start(self, config, *rest):
        number = sum(record["event"] == "begin" for record in StartLog(run_dir).read())
        action = plan[number - 1] if number <= len(plan) else "then complete"
        waits = not action.startswith("then ")
        say(start=number, waits=waits, host=os.environ["SLURMD_NODENAME"])
        cause, message = "", ""
        if waits:
            while (request := self._requests.next()) is None:
                time.sleep(0.02)
            say(request=number, cause=request.cause, within_s=request.within_s)
            cause, message = request.cause, request.message
        action = action.removeprefix("then ")
        while action == "stay":
            time.sleep(1)
        if action == "complete":
            self.run_dir.write_status(step=config.trainer.training.steps)
        cause = {"leave": cause, "complete": Cause.COMPLETED, "fail": Cause.FAILED}[action]
        return Ending(cause, message or action)

supervisor = Supervisor(run_dir, Allocation.from_environment(), summary=False)
supervisor.first = Run(supervisor.node, supervisor.job, supervisor.requests, summary=False)
sys.exit(supervisor.run())
"""


@dataclass
class Run:
    """One run with its plan, in as many jobs as it takes."""

    cluster: SlurmCluster
    path: Path
    plan: tuple[str, ...]
    options: tuple[str, ...]
    first_job: str = ""
    dependent: str = ""
    urgent: set[int] = field(default_factory=set)

    def submit(self) -> None:
        run_dir = RunDir(self.path).create()
        save_config(load_config(None, ["model.path=builtin:qwen3-tiny"]), run_dir.config)
        run_dir.logs.mkdir()
        task, script = self.path / "task.py", self.path / "job.sh"
        task.write_text(TASK)
        words = " ".join(f"'{action}'" for action in self.plan)
        script.write_text(
            "#!/bin/bash\n#SBATCH --nodes=1 --exclusive --mem=0 --requeue --open-mode=append\n"
            f"#SBATCH --output={self.path}/out\n"
            f"srun --kill-on-bad-exit=1 --wait=0 {sys.executable} {task} {self.path} {words} "
            f"|| {sys.executable} -m forge_hpc.run --run-dir {self.path} --after $?\n"
        )
        env = {**self.cluster.env, "PYTHONPATH": str(PROJECT)}
        command = ["sbatch", "--parsable", *self.options, str(script)]
        self.first_job = self.cluster.run(*command, env=env).stdout.strip()
        after = ["sbatch", "--parsable", f"--dependency=afterok:{self.first_job}", "--output=/dev/null", "--mem=1"]
        self.dependent = self.cluster.run(*after, "--wrap", "true").stdout.strip()

    def said(self, what: str) -> list[dict[str, Any]]:
        return [record for record in read(self.path, "said") if what in record]

    def preempt(self) -> None:
        """Where a start waits for it: a job that must have its node, and that is soon over."""
        for start in self.said("start"):
            if start["waits"] and start["start"] not in self.urgent:
                self.urgent.add(start["start"])
                command = ["sbatch", "--partition=urgent", "--exclusive", f"--nodelist={start['host']}"]
                self.cluster.run(*command, "--output=/dev/null", "--wrap", "sleep 1")

    @property
    def starts(self) -> int:
        return len(self.said("start"))

    @property
    def state(self) -> str:
        return status(self.path).get("state", "")

    def job_state(self, job: str | None = None) -> str:
        return self.cluster.job(job or status(self.path).get("job_id") or self.first_job)["JobState"]

    def is_over(self) -> bool:
        over = ("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED", "NODE_FAIL")
        return self.job_state(self.first_job) in over and self.job_state() in over

    def told(self) -> str:
        out = self.path / "out"
        jobs = f"{self.first_job} {self.job_state(self.first_job)}, now {self.job_state()}"
        return f"{jobs}\n{out.read_text() if out.exists() else ''}"


RUNS = {
    "leaves, requeue": (("leave", "then complete"), "--partition=requeue", "--time=60"),
    "leaves, cancel": (("leave", "then complete"), "--partition=cancel", "--time=60"),
    "leaves, requeue, no limit": (("leave", "then complete"), "--partition=requeue", "--time=0"),
    "leaves, cancel, no limit": (("leave", "then complete"), "--partition=cancel", "--time=0"),
    "leaves and fails, requeue": (("leave", "then fail"), "--partition=requeue"),
    "leaves and fails, cancel": (("leave", "then fail"), "--partition=cancel"),
    "leaves twice, requeue": (("leave", "leave", "then complete"), "--partition=requeue"),
    "leaves twice, cancel": (("leave", "leave", "then complete"), "--partition=cancel"),
    "fails in the grace time, requeue": (("fail",), "--partition=requeue"),
    "fails in the grace time, cancel": (("fail",), "--partition=cancel"),
    "completes in the grace time, requeue": (("complete",), "--partition=requeue"),
    "completes in the grace time, cancel": (("complete",), "--partition=cancel"),
    "is killed and completes": (("stay", "then complete"), "--partition=requeue-soon"),
    "is killed and fails": (("stay", "then fail"), "--partition=requeue-soon"),
    "is cancelled in the grace time": (("stay",), "--partition=requeue"),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with SlurmCluster(nodes=len(RUNS) + 1, partitions=PARTITIONS, options={"KillWait": "5"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def release(cluster: SlurmCluster) -> tuple[int, ...]:
    return parse_release(cluster.run("scontrol", "--version").stdout)


@pytest.fixture(scope="module")
def runs(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs at once, to their ends."""
    directory = tmp_path_factory.mktemp("endings")
    found = {
        name: Run(cluster, directory / str(number), plan, options)
        for number, (name, (plan, *options)) in enumerate(RUNS.items())
    }
    for run in found.values():
        run.submit()
    cancelled = found["is cancelled in the grace time"]
    open_runs, deadline, scancelled = dict(found), time.monotonic() + 400, False
    while open_runs and time.monotonic() < deadline:
        for name, run in list(open_runs.items()):
            run.preempt()
            if run.starts and run.is_over():
                del open_runs[name]
        if cancelled.said("request") and not scancelled:
            cluster.run("scancel", cancelled.first_job)
            scancelled = True
        time.sleep(0.3)
    assert not open_runs, "\n\n".join(f"{name}: {run.told()}" for name, run in open_runs.items())
    return found


@pytest.mark.parametrize("mode", ["requeue", "cancel", "requeue, no limit", "cancel, no limit"])
def test_a_preempted_run_that_completes_later_is_complete_for_slurm_too_and_not_started_again(runs, mode) -> None:
    run = runs[f"leaves, {mode}"]
    assert (run.state, run.starts, run.job_state()) == ("completed", 2, "COMPLETED"), run.told()


def test_where_preemption_requeues_a_job_that_waits_for_the_runs_success_begins(runs) -> None:
    for name in ("leaves, requeue", "leaves twice, requeue", "completes in the grace time, requeue"):
        run = runs[name]
        assert status(run.path)["job_id"] == run.first_job
        run.cluster.wait_for_job(run.dependent)


@pytest.mark.parametrize("mode", ["requeue", "cancel"])
def test_a_preempted_run_that_fails_later_has_failed_for_slurm_too_and_is_not_started_again(runs, mode) -> None:
    run = runs[f"leaves and fails, {mode}"]
    assert (run.state, run.starts, run.job_state()) == ("failed", 2, "FAILED"), run.told()


@pytest.mark.parametrize("mode", ["requeue", "cancel"])
def test_a_run_that_is_preempted_twice_has_three_starts(runs, mode) -> None:
    run = runs[f"leaves twice, {mode}"]
    assert (run.state, run.starts, run.job_state()) == ("completed", 3, "COMPLETED"), run.told()
    assert [record["cause"] for record in run.said("request")] == ["preempted", "preempted"]


@pytest.mark.parametrize("mode", ["requeue", "cancel"])
def test_a_run_that_fails_in_the_grace_time_is_not_started_again(runs, release, mode) -> None:
    run = runs[f"fails in the grace time, {mode}"]
    of_slurm = "PREEMPTED" if release >= (24, 5) else "FAILED"  # which cannot be helped
    assert (run.state, run.starts, run.job_state()) == ("failed", 1, of_slurm), run.told()


@pytest.mark.parametrize("mode", ["requeue", "cancel"])
def test_a_run_that_completes_in_the_grace_time_is_complete(runs, release, mode) -> None:
    run = runs[f"completes in the grace time, {mode}"]
    # Requeued by Slurm it finds that there is nothing to do.
    of_slurm = "PREEMPTED" if release >= (24, 5) and mode == "cancel" else "COMPLETED"
    assert (run.state, run.starts, run.job_state()) == ("completed", 1, of_slurm), run.told()


def test_a_run_that_was_killed_when_its_grace_time_was_over_completes(runs) -> None:
    run = runs["is killed and completes"]
    assert (run.state, run.starts, run.job_state()) == ("completed", 2, "COMPLETED"), run.told()


def test_a_run_that_was_killed_when_its_grace_time_was_over_and_fails_later_is_not_started_again(runs) -> None:
    run = runs["is killed and fails"]
    assert (run.state, run.starts) == ("failed", 2), run.told()
    assert run.job_state() in ("FAILED", "PREEMPTED"), run.told()


def test_a_run_that_is_cancelled_in_the_grace_time_is_not_started_again(runs) -> None:
    run = runs["is cancelled in the grace time"]
    assert (run.starts, run.job_state()) == (1, "CANCELLED"), run.told()


@pytest.mark.parametrize("mode", ["requeue", "cancel"])
def test_a_job_without_a_time_limit_has_the_whole_grace_time(runs, mode) -> None:
    [request] = runs[f"leaves, {mode}, no limit"].said("request")
    assert request["cause"] == "preempted"
    assert GRACE_S - 12 < request["within_s"] <= GRACE_S + 1  # whole seconds of Slurm
