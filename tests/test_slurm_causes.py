"""Why a job is signalled, and how it comes back: on a real cluster, one job for each thing that can happen to it."""

from __future__ import annotations

import json
import os
import pwd
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import DEMO, PROJECT, small_run, wait_for
from slurm_cluster import SlurmCluster, missing_requirement

from forge_hpc.slurm import JobFacts, SlurmRefused, cause_of, job_facts, requeue, submit_successor
from forge_hpc.slurm.successor import successor_options
from forge_hpc.supervisor.ending import Cause

GRACE_S = 20
PARTITIONS = (
    "PartitionName=main Nodes={nodes} Default=YES MaxTime=UNLIMITED DefaultTime=60 PreemptMode=OFF PriorityTier=1",
    f"PartitionName=requeue Nodes={{nodes}} DefaultTime=60 PreemptMode=REQUEUE PriorityTier=1 GraceTime={GRACE_S}",
    "PartitionName=requeue-now Nodes={nodes} DefaultTime=60 PreemptMode=REQUEUE PriorityTier=1 GraceTime=0",
    f"PartitionName=cancel Nodes={{nodes}} DefaultTime=60 PreemptMode=CANCEL PriorityTier=1 GraceTime={GRACE_S}",
    "PartitionName=cancel-now Nodes={nodes} DefaultTime=60 PreemptMode=CANCEL PriorityTier=1 GraceTime=0",
    "PartitionName=urgent Nodes={nodes} DefaultTime=60 PreemptMode=OFF PriorityTier=10",
)
OPTIONS = {
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "KillWait": "5",
    "SlurmdTimeout": "45",  # Slurm 24.11 takes healthy nodes for dead, too, where it is short
}

# A task that writes down each signal with its cause. On the first one it does what it is told to; in a later life of
# its job it ends well.
PROBE = """
import json, os, signal, socket, sys, time
from pathlib import Path
from forge_hpc.slurm import SlurmRefused, cause_of, job_facts, requeue, script_arguments, submit_successor

# A successor has no arguments where Slurm does not keep them (24.11).
log, then, exclude = Path(sys.argv[1]), (sys.argv[2:] or ["stay"])[0], sys.argv[3:]
job, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
host = socket.gethostname()

def say(event, **fields):
    with log.open("a") as file:
        common = {"event": event, "at": time.time(), "job": job, "restarts": restarts, "host": host}
        file.write(json.dumps(common | fields) + "\\n")

caught = []
for signum in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(signum, lambda signum, frame: caught.append(signum))
again = restarts > 0 or "FORGE_HPC_CONTINUE" in os.environ
say("started", setup=os.environ.get("FROM_THE_SCRIPT"), again=again)
arguments = script_arguments(job)
if again:
    sys.exit(0)
seen = 0
while True:
    time.sleep(0.02)
    if len(caught) == seen:
        continue
    signum, seen = caught[-1], len(caught)
    facts = job_facts(job)
    cause = cause_of(facts, signum, restarts)
    say("signal", signal=signal.Signals(signum).name, cause=cause, state=facts.state, reason=facts.reason,
        left_s=facts.end_time - time.time())
    if then != "stay":
        action, then = then, "stay"
        try:
            requeue(job, [host] if exclude else [])
            say("requeued")
        except SlurmRefused as refused:
            say("refused", text=str(refused))
            say("successor", id=submit_successor(facts, log.parent / "run", arguments=arguments))
"""


class Life:
    """One job with the probe in it, and what its task has written down."""

    def __init__(self, cluster: SlurmCluster, directory: Path, name: str, *options: str, then: str = "stay") -> None:
        self.cluster, self.name, self.directory = cluster, name, directory / name.replace(" ", "-")
        (self.directory / "run" / "logs").mkdir(parents=True)
        self.log, probe, script = (self.directory / f for f in ("log", "probe.py", "job.sh"))
        probe.write_text(PROBE)
        script.write_text(
            "#!/bin/bash\n#SBATCH --nodes=1 --exclusive --mem=0 --requeue --signal=USR2@20\n"
            f"#SBATCH --output={self.directory}/out-%j\nexport FROM_THE_SCRIPT=yes\n"
            f'srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 {sys.executable} {probe} {self.log} "$@"\n'
        )
        command = ["sbatch", "--parsable", *options, str(script), *then.split()]
        self.job = cluster.run(*command, env={**cluster.env, "PYTHONPATH": str(PROJECT)}).stdout.strip()

    def said(self, event: str, job: str | None = None) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines]
        return [record for record in found if record["event"] == event and record["job"] == (job or self.job)]

    def wait_for(self, event: str, number: int = 1, job: str | None = None) -> dict[str, Any]:
        """The record of the ``number``-th event of its kind."""
        what = f"{self.name}: {event} {number}"
        return wait_for(lambda: len(self.said(event, job)) >= number, what, 150) and self.said(event, job)[number - 1]

    def causes(self, number: int = 1) -> list[Cause]:
        self.wait_for("signal", number)
        return [Cause(record["cause"]) for record in self.said("signal")][:number]

    def host(self) -> str:
        return self.wait_for("started")["host"]

    def preempt(self) -> None:
        """A job that must have this one's node, and that is soon over."""
        command = ["sbatch", "--partition=urgent", "--exclusive", f"--nodelist={self.host()}", "--output=/dev/null"]
        self.cluster.run(*command, "--wrap", "sleep 1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    up = SlurmCluster(nodes=18, partitions=PARTITIONS, options=OPTIONS)
    with up as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield cluster


@pytest.fixture(scope="module")
def lives(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Life]:
    """All jobs at once, and to each of them what it is named after."""
    directory = tmp_path_factory.mktemp("lives")

    def life(name: str, *options: str, then: str = "stay") -> Life:
        return Life(cluster, directory, name, *options, then=then)

    jobs = [
        life("requeueing preemption", "--partition=requeue"),
        life("requeueing preemption without grace", "--partition=requeue-now"),
        life("cancelling preemption", "--partition=cancel", then="requeue exclude"),
        life("cancelling preemption without grace", "--partition=cancel-now", then="requeue"),
        life("scancel in the grace time", "--partition=cancel"),
        life("preemption without requeue", "--partition=cancel-now", "--no-requeue", "--time=7", then="requeue"),
        life("walltime", "--time=5"),
        life("warning", "--time=1", then="requeue"),
        life("scancel"),
        life("requeue by somebody"),
        life("TERM by somebody"),
        life("node down", "--no-requeue"),
        life("lost node", "--nodes=2"),
    ]
    found = {job.name: job for job in jobs}
    for job in jobs:
        job.host()
    for name in ("requeueing", "cancelling"):
        found[f"{name} preemption"].preempt()
        found[f"{name} preemption without grace"].preempt()
    found["scancel in the grace time"].preempt()
    found["preemption without requeue"].preempt()
    cluster.run("scancel", found["scancel"].job)
    cluster.run("scontrol", "requeue", found["requeue by somebody"].job)
    cluster.run("scancel", "--signal=TERM", found["TERM by somebody"].job)
    cluster.run("scontrol", "update", f"JobId={found['walltime'].job}", "EndTime=now+5")  # not past yet
    cluster.run("scontrol", "update", f"NodeName={found['node down'].host()}", "State=DOWN", "Reason=test")
    wait_for(lambda: len(found["lost node"].said("started")) == 2, "two tasks", 60)
    lost = cluster.run("scontrol", "show", "hostnames", cluster.job(found["lost node"].job)["NodeList"]).stdout.split()
    [slurmd] = [p for p in psutil.process_iter() if p.name() == "slurmd" and lost[1] in p.cmdline()]
    slurmd.kill()
    preempted = found["scancel in the grace time"].wait_for("signal")["at"]
    wait_for(lambda: time.time() > preempted + 1, "the next second", 5)  # Slurm counts in seconds
    cluster.run("scancel", found["scancel in the grace time"].job)
    found["lost node"].wait_for("signal")
    requeue(found["lost node"].job, [lost[1]])  # it is in the queue already
    return found


@pytest.mark.slurm
def test_a_preemption_is_known_at_its_first_signal_and_its_end_time_is_that_of_the_grace_time(lives) -> None:
    life = lives["requeueing preemption"]
    assert life.causes(2) == [Cause.PREEMPTED, Cause.REQUEUED]
    first = life.wait_for("signal")
    assert first["state"] == "RUNNING" and GRACE_S - 5 < first["left_s"] <= GRACE_S
    assert life.wait_for("started", 2)["restarts"] == 1


@pytest.mark.slurm
def test_a_preemption_without_grace_that_requeues_needs_no_help(lives) -> None:
    life = lives["requeueing preemption without grace"]
    assert life.causes() == [Cause.REQUEUED]
    assert life.wait_for("started", 2)["restarts"] == 1


@pytest.mark.slurm
def test_a_requeue_in_the_grace_time_saves_a_job_that_preemption_would_cancel_and_keeps_it_off_a_node(lives) -> None:
    life = lives["cancelling preemption"]
    assert life.causes(2) == [Cause.PREEMPTED, Cause.REQUEUED]
    again = life.wait_for("started", 2)
    assert again["restarts"] == 1 and again["host"] != life.host()
    assert job_facts(life.job).excluded == life.host()
    # 24.11 shows what its owner has requeued as PREEMPTED, whatever it ended with (test_slurm_endings.py).
    life.cluster.wait_for_job(life.job, ["COMPLETED", "PREEMPTED"])


@pytest.mark.slurm
def test_a_requeue_saves_a_job_that_is_being_cancelled_by_a_preemption_without_grace(lives) -> None:
    life = lives["cancelling preemption without grace"]
    assert life.causes() == [Cause.PREEMPTED]
    assert life.wait_for("signal")["state"] == "COMPLETING"
    assert life.wait_for("started", 2)["restarts"] == 1


@pytest.mark.slurm
def test_a_scancel_is_told_from_the_preemption_that_it_follows(lives) -> None:
    life = lives["scancel in the grace time"]
    assert life.causes(2) == [Cause.PREEMPTED, Cause.CANCELLED]
    life.cluster.wait_for_job(life.job, ["CANCELLED"])
    assert cause_of(job_facts(life.job), signal.SIGTERM, 0) == Cause.CANCELLED


@pytest.mark.slurm
def test_a_scancel_is_a_scancel(lives) -> None:
    assert lives["scancel"].causes() == [Cause.CANCELLED]
    assert lives["scancel"].wait_for("signal")["state"] == "COMPLETING"


@pytest.mark.slurm
def test_the_warning_before_the_walltime_leaves_time_to_requeue(lives) -> None:
    life = lives["warning"]
    assert life.causes() == [Cause.WALLTIME]
    first = life.wait_for("signal")
    assert first["signal"] == "SIGUSR2" and first["left_s"] > 15
    assert life.wait_for("started", 2)["restarts"] == 1


@pytest.mark.slurm
def test_the_walltime_is_known_by_its_reason(lives) -> None:
    life = lives["walltime"]  # its end came so suddenly that USR2 and TERM came nearly together
    assert life.causes() == [Cause.WALLTIME]
    life.cluster.wait_for_job(life.job, ["TIMEOUT"])
    assert {record["cause"] for record in life.said("signal")} == {Cause.WALLTIME}
    assert life.said("signal")[-1]["reason"] == "TimeLimit"
    assert cause_of(job_facts(life.job), signal.SIGTERM, 0) == Cause.WALLTIME


@pytest.mark.slurm
def test_a_requeue_by_somebody_is_left_alone(lives) -> None:
    life = lives["requeue by somebody"]
    assert life.causes() == [Cause.REQUEUED]
    requeue(life.job)  # nothing happens: it is in the queue already, or has ended well
    assert life.wait_for("started", 2)["restarts"] == 1


@pytest.mark.slurm
def test_a_signal_by_hand_has_no_cause_and_the_job_runs_on(lives) -> None:
    life = lives["TERM by somebody"]
    assert life.causes() == [Cause.UNKNOWN]
    assert life.cluster.job(life.job)["JobState"] == "RUNNING"


@pytest.mark.slurm
def test_a_node_that_goes_down_takes_its_job_with_it_where_there_is_no_requeue(lives) -> None:
    life = lives["node down"]
    assert life.causes() == [Cause.NODE_FAIL]
    life.cluster.wait_for_job(life.job, ["NODE_FAIL"])
    facts = job_facts(life.job)
    assert not facts.can_requeue
    assert cause_of(facts, signal.SIGTERM, 0) == Cause.NODE_FAIL


@pytest.mark.slurm
def test_a_lost_node_requeues_the_job_and_can_still_be_excluded(lives) -> None:
    life = lives["lost node"]
    assert life.causes() == [Cause.REQUEUED]
    first, second = life.said("started")[:2]
    [alive] = {record["host"] for record in life.said("signal")}  # the task on the lost host hears nothing
    lost = first["host"] if second["host"] == alive else second["host"]
    assert job_facts(life.job).excluded == lost
    life.wait_for("started", 4)
    assert lost not in {record["host"] for record in life.said("started")[2:]}


@pytest.mark.slurm
def test_a_job_that_may_not_be_requeued_has_a_successor_with_its_script_and_its_options(lives) -> None:
    life = lives["preemption without requeue"]
    assert life.causes() == [Cause.PREEMPTED]
    assert "disabled" in life.wait_for("refused")["text"]  # Slurm's own words
    successor = life.wait_for("successor")["id"]
    assert successor != life.job
    started = life.wait_for("started", job=successor)
    assert started["setup"] == "yes" and started["again"]
    life.cluster.wait_for_job(successor)
    before, after = life.cluster.job(life.job), life.cluster.job(successor)
    assert before["JobState"] == "PREEMPTED"
    keys = ["JobName", "Partition", "TimeLimit", "NumNodes", "OverSubscribe", "MinMemoryNode", "Requeue", "WorkDir"]
    for key in keys:
        assert after[key] == before[key], key
    assert after["TimeLimit"] == "00:07:00" and after["Partition"] == "cancel-now"  # of sbatch's command line
    assert Path(after["StdOut"]) == Path(before["StdOut"]).with_name(f"out-{successor}")


def hold(cluster: SlurmCluster, directory: Path, *command: str) -> str:
    """Queue a job that stays in the queue."""
    options = ["--parsable", "--hold", "--partition=requeue", "--time=9", f"--output={directory}/slurm-%j.out"]
    return cluster.run("sbatch", *options, *command, cwd=directory).stdout.strip()


@pytest.mark.slurm
def test_the_successor_goes_on_with_the_run_through_both_doors(cluster: SlurmCluster, tmp_path: Path) -> None:
    from forge_hpc.config import load_config, save_config
    from forge_hpc.run_dir import RunDir
    from launchers.slurm import RunExecutor

    run_dir = RunDir(tmp_path / "my run").create()
    cfg = load_config(DEMO, [*small_run(tmp_path, steps=3), "cluster.nodes=1", "slurm.setup=[test -n '$HOME']"])
    save_config(cfg, run_dir.config)
    run_dir.write_status(state="completed", step=3)  # what there is to do is soon done
    run_dir.logs.mkdir(exist_ok=True)
    rendered = tmp_path / "submitted.sh"
    rendered.write_text(RunExecutor(cfg, run_dir.path).script())
    jobs = [
        hold(cluster, tmp_path, str(rendered)),
        # The arguments are no longer true; sbatch is not called where the project lies.
        hold(cluster, tmp_path, "--nodes=1", str(PROJECT / "sbatch/grpo.sh"), "--config", "gone.yaml", "no.such=key"),
    ]
    successors = [submit_successor(job_facts(job), run_dir.path) for job in jobs]
    waits_for = [cluster.job(successor)["Dependency"] for successor in successors]
    assert waits_for == [f"afterany:{job}(unfulfilled)" for job in jobs]
    cluster.run("scancel", *jobs)
    for successor in successors:
        facts = cluster.wait_for_job(successor)
        assert (facts["Partition"], facts["TimeLimit"]) == ("requeue", "00:09:00")
        assert f"{run_dir} is complete: nothing to do" in (tmp_path / f"slurm-{successor}.out").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["my run"]  # no other run was begun


def as_user(name: str, job: str) -> str:
    """What Slurm answers where this user requeues the job."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        answer = "requeued"
        try:
            os.setgid(pwd.getpwnam(name).pw_gid)
            os.setuid(pwd.getpwnam(name).pw_uid)
            requeue(job)
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.slurm
def test_an_owner_may_requeue_and_nobody_else(cluster: SlurmCluster) -> None:
    command = ["sbatch", "--parsable", "--output=/dev/null", "--chdir=/", "--mem=1", "--wrap", "sleep 300"]
    own, other = cluster.run(*command, user="daemon", cwd="/").stdout.strip(), cluster.run(*command).stdout.strip()
    for job in (own, other):
        cluster.wait_for_job(job, ["RUNNING"])
    assert as_user("daemon", own) == "requeued"
    assert "denied" in as_user("daemon", other)
    assert (job_facts(own).restarts, job_facts(other).restarts) == (1, 0)


@pytest.mark.slurm
def test_a_node_stays_where_too_few_others_are_left(cluster: SlurmCluster, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sbatch", "--parsable", "--hold", f"--nodes={len(cluster.hosts)}", "--output=/dev/null"]
    job = cluster.run(*command, "--wrap", "true").stdout.strip()
    requeue(job, [cluster.hosts[0].name])  # it is in the queue already
    assert f"{cluster.hosts[0].name} cannot be excluded" in capfd.readouterr().err
    assert job_facts(job).excluded == ""
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1")
    for host in cluster.hosts[:2]:
        requeue(job, [host.name])
    assert job_facts(job).excluded == ",".join(host.name for host in cluster.hosts[:2])
    cluster.run("scontrol", "update", f"JobId={job}", f"ReqNodeList={cluster.hosts[2].name}")
    requeue(job, [cluster.hosts[2].name])
    assert f"job {job} asks for {cluster.hosts[2].name}" in capfd.readouterr().err


@pytest.mark.slurm
def test_what_slurm_does_not_know_or_do_is_said_in_its_words(cluster: SlurmCluster) -> None:
    assert job_facts("999999") is None
    with pytest.raises(SlurmRefused, match=r"scontrol requeue: Invalid job id"):
        requeue("999999")


def test_no_answer_is_no_facts_and_has_no_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nexec sleep 60\n")
    scontrol.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = time.monotonic()
    assert job_facts("1", timeout_s=0.2) is None
    assert time.monotonic() - begin < 10
    monkeypatch.setenv("PATH", "/nonexistent")
    assert job_facts("1") is None
    assert cause_of(None, signal.SIGTERM, 0) == Cause.UNKNOWN


# As Slurm 22.05 prints a job of two nodes in the grace time of a preemption, and texts that a user made difficult.
CAPTURED = """\
JobId=31 JobName=my run Reason=TimeLimit
   UserId=games(5) GroupId=games(60) MCS_label=N/A
   Priority=4294901754 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:03 TimeLimit=UNLIMITED TimeMin=N/A
   SubmitTime=1795263000 EligibleTime=1795263000
   AccrueTime=1795263000
   StartTime=1795263001 EndTime=1795263031 Deadline=N/A
   PreemptEligibleTime=1795263001 PreemptTime=1795263011
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=1795263001 Scheduler=Backfill
   Partition=low AllocNode:Sid=localhost:2467
   ReqNodeList=(null) ExcNodeList=n[7-8]
   NodeList=n[1-2]
   BatchHost=n1
   NumNodes=2 NumCPUs=16 NumTasks=2 CPUs/Task=8 ReqB:S:C:T=0:0:*:*
   TRES=cpu=16,mem=32G,node=2,billing=16
   Socks/Node=* NtasksPerN:B:S:C=1:0:*:* CoreSpec=*
   MinCPUsNode=1 MinMemoryNode=16G MinTmpDiskNode=0
   Features=fast&ib DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/x/sbatch/grpo.sh --run-dir /x/my run note=JobState=CANCELLED Restarts=9
   WorkDir=/work
   StdErr=/x/31/slurm-31.out
   StdIn=/dev/null
   StdOut=/x/31/slurm-31.out
   Power=
   TresPerNode=gres:gpu:h100:4
"""


def facts(**changes: str) -> JobFacts:
    """The captured job with other values."""
    lines = CAPTURED
    for key, value in changes.items():
        words = lines.partition("\n")[2].partition("Command=")[0].split()
        [old] = [word for word in words if word.startswith(f"{key}=")]
        lines = lines.replace(f" {old}", f" {key}={value}")
    return JobFacts.parse(lines)


def test_facts_are_read_past_what_users_write() -> None:
    found = facts()
    assert (found.job_id, found.state, found.reason, found.restarts) == ("31", "RUNNING", "None", 2)
    assert found.preempted and found.can_requeue and found.end_time == 1795263031
    assert (found.partition, found.account, found.qos, found.num_nodes) == ("low", None, None, 2)
    assert (found.nodes, found.excluded, found.said["JobName"]) == ("n[1-2]", "n[7-8]", "my run Reason=TimeLimit")
    assert facts(PreemptTime="None").end_time is None  # no limit
    assert facts(JobState="SIGNALING").state == "RUNNING"  # seen for the moment of a signal
    assert not facts(Requeue="0").can_requeue and not facts(BatchFlag="0").can_requeue


@pytest.mark.parametrize(
    "cause, own_restarts, changes",
    [
        (Cause.PREEMPTED, 2, {}),
        (Cause.PREEMPTED, 2, {"JobState": "COMPLETING", "EndTime": "1795263011"}),
        (Cause.PREEMPTED, 2, {"JobState": "PREEMPTED", "EndTime": "1795263011"}),
        (Cause.CANCELLED, 2, {"JobState": "COMPLETING", "EndTime": "1795263015"}),
        (Cause.REQUEUED, 1, {"JobState": "COMPLETING", "PreemptTime": "None"}),
        (Cause.REQUEUED, 1, {"JobState": "PENDING", "Reason": "BeginTime", "PreemptTime": "None"}),
        (Cause.WALLTIME, 2, {"JobState": "COMPLETING", "Reason": "TimeLimit", "PreemptTime": "None"}),
        (Cause.NODE_FAIL, 2, {"JobState": "COMPLETING", "Reason": "NodeDown", "PreemptTime": "None"}),
        (Cause.UNKNOWN, 2, {"JobState": "COMPLETING", "Reason": "NonZeroExitCode", "PreemptTime": "None"}),
        (Cause.UNKNOWN, 2, {"PreemptTime": "None"}),
    ],
)
def test_each_cause_is_told_by_what_slurm_says(cause: Cause, own_restarts: int, changes: dict[str, str]) -> None:
    assert cause_of(facts(**changes), signal.SIGTERM, own_restarts) == cause


def test_usr2_is_the_walltime_where_there_is_one_and_nothing_else_is_said() -> None:
    limited = {"PreemptTime": "None", "TimeLimit": "01:00:00"}
    assert cause_of(facts(**limited), signal.SIGUSR2, 2) == Cause.WALLTIME
    assert cause_of(facts(**limited), signal.SIGTERM, 2) == Cause.UNKNOWN
    assert cause_of(facts(PreemptTime="None"), signal.SIGUSR2, 2) == Cause.UNKNOWN
    assert cause_of(facts(), signal.SIGUSR2, 2) == Cause.PREEMPTED  # a site may send it in place of TERM


def test_a_successor_asks_for_what_the_job_has() -> None:
    options = successor_options(facts(), "#!/bin/bash\n#SBATCH --partition=low,lower\ntrue\n")
    assert set(options) >= {
        "--job-name=my run Reason=TimeLimit",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--mem=16G",
        "--constraint=fast&ib",
        "--gpus-per-node=h100:4",
        "--exclusive",
        "--requeue",
        "--output=/x/31/slurm-%j.out",
        "--open-mode=append",
    }
    # The job runs in one of the partitions that its script asks for: the successor may run in the others, too.
    assert not [option for option in options if option.startswith(("--partition", "--error", "--account", "--qos"))]
    assert "--partition=low" in successor_options(facts(), "#!/bin/bash\n#SBATCH -p main\n")
    # sbatch adds --gres and --gpus-per-node up: only the one that the script has replaces it.
    of_the_job = CAPTURED.replace("TresPerNode=gres:gpu:h100:4", "TresPerJob=gres:gpu:8")
    assert "--gpus=8" in successor_options(JobFacts.parse(of_the_job), "")
    with_gres = successor_options(facts(), "#!/bin/bash\n#SBATCH --gres=gpu:h100:4\n")
    assert "--gres=gpu:h100:4" in with_gres and "--gpus-per-node=h100:4" not in with_gres
