"""Why Slurm signals this job, and how the job comes back.

What `scontrol show job` says at the signal, measured on Slurm 22.05, 24.11 and 26.05, which agree in it. It is the same
on the node and elsewhere, and true from the first signal on: slurmctld changes the job before it signals. "Tasks" are
srun's, "batch" is the job script.

    event                       who is signalled                      state       reason     PreemptTime  restarts
    preemption, GraceTime > 0   tasks TERM at once (1)                RUNNING     None       set          same
      its end, REQUEUE          tasks and batch TERM                  COMPLETING  None       None         one more
      its end, CANCEL           tasks and batch TERM                  COMPLETING  None       = EndTime    same
    preemption, GraceTime = 0   as at the two ends above
    walltime, --signal=USR2@N   tasks USR2, up to 60 s early          RUNNING     None       None         same
    walltime                    tasks and batch TERM, up to 30 s late COMPLETING  TimeLimit  None         same
    scancel                     tasks and batch TERM                  COMPLETING  None       None (2)     same
    scontrol requeue            tasks and batch TERM                  COMPLETING  None       None         one more
    lost node, Requeue=1        what lives gets TERM (3)              COMPLETING  None       None         one more
    lost node, Requeue=0        what lives gets TERM (3)              COMPLETING  NodeDown   None         same
    scancel --signal=TERM       tasks TERM                            RUNNING     None       None         same
    lost node, --no-kill (4)    nobody                                RUNNING     None       None         same

CONT comes with TERM, and KILL follows TERM after KillWait (30 s unless the site says otherwise).
(1) EndTime moves to the end of the grace time, but is Unknown where the job has no time limit: PreemptTime and the
    partition's GraceTime tell. The kill came up to 22 s after it. Where the site has set preempt_send_user_signal the
    first signal is that of --signal.
(2) In the grace time PreemptTime stays and EndTime is the moment of the scancel: in the same second as the preemption
    the two look alike.
(3) SlurmdTimeout after the host fell silent, or somewhat later. Processes on a host whose slurmd alone has died get no
    signal and live on: the run's lock keeps them from the run.
(4) On sbatch and on srun: NumNodes is one less after SlurmdTimeout, srun says "Node failure on X" and waits for the
    other tasks, and a requeue starts the job on as many nodes as it asked for.

What becomes of a job whose tasks end in the grace time, or that its owner requeues there, depends on the release
(`preemption`, and the tables in docs/slurm.md):

    in the grace time, and then       before 24.05           24.11                           26.05.5
    it ends, REQUEUE                  as it ended            requeued, whatever it ended with    as 24.11
    it ends, CANCEL                   as it ended            PREEMPTED                           as 24.11
    own requeue, ends later           as it ended            requeued again; CANCEL: PREEMPTED   as it ended
    stays, REQUEUE, ends later        as it ended            requeued again                      as it ended
    Requeue=0, then it ends           as it ended            PREEMPTED, not started again        as 24.11
    own requeue, Requeue=0, ends      as it ended            PREEMPTED, not started again        as it ended

`scontrol requeue` by its owner saves a job that Slurm does not requeue: in the grace time, after it (while KillWait
lasts), with PreemptMode=CANCEL too. It ends the job at once, only KillWait remains, and in 22.05 not even that for the
batch shell: requeue last, when everything is saved. Slurm starts the job again when cred_expire (two minutes unless the
site says otherwise) has passed since its last process ended. With Requeue=0 it is refused; a job's Requeue is 1 where
--requeue was given, whatever the site's JobRequeue.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from forge_hpc.supervisor.ending import Cause

ANSWER_S = 10.0
"""How long Slurm may take for an answer; KillWait may be all the time that there is."""
_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SILENCE = re.compile(
    r"unable to contact|timed? ?out|zero bytes|communication|connection (refused|reset)|standby mode|temporarily", re.I
)
_ABSENT = ("", "(null)", "N/A")


class SlurmRefused(Exception):
    """Slurm did not do what it was asked for; the text is its own."""


class SlurmSilent(SlurmRefused):
    """Slurm does not answer, or not now: slurmctld is down, busy, or being taken over by its backup."""


@dataclass(frozen=True)
class JobFacts:
    """What Slurm says of a job at one moment."""

    job_id: str
    """What names this job alone: ``ARRAY_TASK`` for the task of an array (see `environment`)."""
    state: str
    """Such as RUNNING; COMPLETING as long as processes end, whatever the final state will be."""
    reason: str
    """``None`` (the word) where there is no reason."""
    preempted: bool
    """Preempted and not requeued."""
    end_time: float | None
    """When the job's time is over, or was, in unix seconds of slurmctld's clock: in the grace time its end. None: no
    limit."""
    start_time: float | None
    """When this start of the job began, by the same clock."""
    restarts: int
    can_requeue: bool
    """A batch job with Requeue=1."""
    partition: str
    """The one that it runs in; while pending, all that were asked for."""
    account: str | None
    qos: str | None
    time_limit: str | None
    num_nodes: int
    nodes: str
    """Slurm's list, such as ``n[1-4,7]``; a lost node is no longer in it."""
    excluded: str
    """Nodes that the job never takes, in the same form."""
    said: Mapping[str, str] = field(repr=False)
    """All of `scontrol show job`, by key."""

    @classmethod
    def parse(cls, text: str, job_id: str | None = None) -> JobFacts:
        """Read the output of `scontrol show job` with times as unix seconds (SLURM_TIME_FORMAT=%s).

        Args:
            job_id: SLURM_JOB_ID of the job. That of an array's last task is the array's own, for which Slurm prints a
                record for each of its tasks.
        """
        said, users = _record(text, job_id)
        state, end, preempt_time = said["JobState"], said.get("EndTime", ""), said.get("PreemptTime", "None")
        start = said.get("StartTime", "")
        if state == "SIGNALING":  # for the moment that it takes to send a signal
            state = "RUNNING"
        # A scancel in the grace time leaves PreemptTime as it was and moves EndTime.
        cancelled = state == "CANCELLED" or (state == "COMPLETING" and preempt_time != end)
        preempted = preempt_time != "None" and not cancelled
        task = said.get("ArrayTaskId", "")  # such as 2-7%1 while they wait together
        return cls(
            job_id=f"{said['ArrayJobId']}_{task}" if task.isdigit() else said["JobId"],
            state=state,
            reason=said.get("Reason", "None"),
            preempted=preempted,
            end_time=float(end) if end.isdigit() and (preempted or said.get("TimeLimit") != "UNLIMITED") else None,
            start_time=float(start) if start.isdigit() else None,
            restarts=int(said["Restarts"]),
            can_requeue=said.get("Requeue") == "1" and said.get("BatchFlag", "1") != "0",
            partition=said["Partition"],
            account=said.get("Account"),
            qos=said.get("QOS"),
            time_limit=said.get("TimeLimit"),
            num_nodes=int(said["NumNodes"].partition("-")[0]),
            nodes=said.get("NodeList", ""),
            excluded=said.get("ExcNodeList", ""),
            said=users | said,
        )


def _record(text: str, job_id: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Two parts of a job's record: what Slurm says, and what stands below that, where users' texts are.

    The first part is lines of ``key=value``; below it each line is one key and its text, whatever that holds. Names and
    comments may hold line breaks, too: a name goes on to the line of its UserId.
    """
    records = re.split(r"\n(?=JobId=\d+ )", text.strip())
    own = next((record for record in records if record.startswith(f"JobId={job_id} ")), records[0])
    ids, _, own = own.partition("JobName=")
    name, _, own = own.partition("\n   UserId=" if "\n   UserId=" in own else "\n")
    head, command, rest = own.partition("\n   Command=")
    said, users = {"JobName": name}, dict[str, str]()
    for line in [ids, *head.splitlines()]:
        line, _, network = line.partition(" Network=")  # free text as well, and the last of its line
        said.update(re.findall(r"(\S+?)=(\S*)", line))
        if network:
            said["Network"] = network
    for key, value in re.findall(r"^   (\w+)=(.*)", command + rest, re.MULTILINE):
        users.setdefault(key, value.rstrip())
    return _without_absent(said), _without_absent(users)


def _without_absent(said: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in said.items() if value not in _ABSENT}


def job_facts(job_id: str, timeout_s: float = ANSWER_S) -> JobFacts | None:
    """What Slurm says of the job now; None where it does not answer in time, or does not know the job."""
    try:
        return JobFacts.parse(ask("scontrol", "show", "job", job_id, timeout_s=timeout_s), job_id)
    except SlurmRefused:
        return None


def controller_time(timeout_s: float = ANSWER_S) -> float | None:
    """slurmctld's clock, in unix seconds to about a second; None where Slurm does not answer, or does not say."""
    try:
        said = re.match(r"Configuration data as of (\d+)\s", ask("scontrol", "show", "config", timeout_s=timeout_s))
    except SlurmRefused:
        return None
    return float(said[1]) + 0.5 if said else None  # whole seconds


def cause_of(facts: JobFacts | None, signum: int, own_restarts: int) -> Cause:
    """Why the job got a signal, by what Slurm says right after it.

    Args:
        facts: asked for after the signal came.
        signum: the signal. Only SIGUSR2 counts: it is what the job scripts have Slurm send before the walltime. A
            `scancel --signal=USR2` cannot be told from that, and asks for the same: save, and come back.
        own_restarts: SLURM_RESTART_COUNT of this start of the job; a job that Slurm has requeued has more.
    """
    if facts is None:
        return Cause.UNKNOWN
    if facts.restarts > own_restarts:
        return Cause.REQUEUED
    if facts.preempted:
        return Cause.PREEMPTED
    if facts.reason == "TimeLimit" or facts.state == "TIMEOUT":
        return Cause.WALLTIME
    if facts.reason == "NodeDown" or facts.state == "NODE_FAIL":
        return Cause.NODE_FAIL
    if facts.state == "CANCELLED" or (facts.state == "COMPLETING" and facts.reason == "None"):
        return Cause.CANCELLED
    if signum == signal.SIGUSR2 and facts.state == "RUNNING" and facts.end_time is not None:
        return Cause.WALLTIME
    return Cause.UNKNOWN


def requeue(job_id: str, exclude_nodes: Iterable[str] = ()) -> None:
    """Put the job back into the queue, which ends it at once; nothing happens to one that is there already.

    Args:
        exclude_nodes: names of nodes that it must not take again. Where too few others are left, or Slurm refuses, a
            line on stderr says so, and the job may get them.

    Raises:
        SlurmSilent: Slurm does not answer; it may have done it all the same, and a second call is harmless.
        SlurmRefused: the job is not requeued (Requeue=0, no batch job, somebody else's …).
    """
    try:
        ask("scontrol", "requeue", job_id)
    except SlurmRefused as refused:
        if "pending execution" not in str(refused):
            raise
    if nodes := tuple(exclude_nodes):
        try:
            facts = JobFacts.parse(ask("scontrol", "show", "job", job_id), job_id)
            if excluded := exclusion(facts, nodes):
                ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={excluded}")
        except SlurmRefused as refused:
            print(f"job {job_id} may get {','.join(nodes)} again: {refused}", file=sys.stderr)


def forbid_requeue(job_id: str) -> None:
    """Have Slurm start the job no second time by itself, whatever its script asked for. Raises SlurmRefused."""
    ask("scontrol", "update", f"JobId={job_id}", "Requeue=0")


def exclusion(facts: JobFacts, nodes: tuple[str, ...]) -> str:
    """The job's excluded nodes with ``nodes`` added; empty if nothing is to be changed.

    A job that too few nodes are left for, or that asks for one of them by name, would wait for ever (BadConstraints),
    or not be taken at all: then a line on stderr says so.
    """
    if not nodes:
        return ""
    everything = ",".join([*filter(None, [facts.excluded]), *nodes])
    excluded = _hosts(everything)
    known = set(ask("sinfo", "--noheader", "--Node", f"--partition={facts.partition}", "--format=%N").split())
    if asked := _hosts(facts.said.get("ReqNodeList", "")) & excluded:
        reason = f"job {facts.job_id} asks for {','.join(sorted(asked))}"
    elif len(known - excluded) < facts.num_nodes:
        reason = f"partition {facts.partition} has {len(known)} nodes, and job {facts.job_id} needs {facts.num_nodes}"
    else:
        return everything
    print(f"{','.join(nodes)} cannot be excluded: {reason}", file=sys.stderr)
    return ""


def _hosts(nodes: str) -> set[str]:
    """The names in Slurm's list."""
    return set(ask("scontrol", "show", "hostnames", nodes).split()) if nodes else set()


def ask(
    *command: str, timeout_s: float = ANSWER_S, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> str:
    """What a command of Slurm prints. Raises SlurmRefused with what it says where it fails, SlurmSilent where Slurm
    does not answer."""
    name = " ".join(command[:2])
    # Slurm signals every process of a step, this command too: it is born with the signals blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"} if env is None else env,
            cwd=cwd,
        )
    except OSError as error:
        raise SlurmRefused(f"{name}: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{name} does not answer within {timeout_s:.0f} s") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        said = " ".join((err or out).split()) or f"exit code {process.returncode}"
        raise (SlurmSilent if _SILENCE.search(said) else SlurmRefused)(f"{name}: {said}")
    return out
