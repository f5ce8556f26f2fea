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

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

from forge_hpc.slurm.client import ANSWER_S, PATIENT_S, SlurmAbsent, SlurmRefused, ask, at_a_terminal, is_unknown
from forge_hpc.slurm.facts import JobFacts
from forge_hpc.supervisor.ending import Cause

_ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
          "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT")  # fmt: skip
_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")


def job_facts(job_id: str, timeout_s: float = ANSWER_S) -> JobFacts | None:
    """What Slurm says of the job now; None where it does not answer in time, or does not know the job."""
    try:
        return JobFacts.parse(ask("scontrol", "show", "job", job_id, timeout_s=timeout_s), job_id)
    except SlurmRefused:
        return None


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
    excluded = set(host_names(everything))
    known = set(ask("sinfo", "--noheader", "--Node", f"--partition={facts.partition}", "--format=%N").split())
    if asked := excluded.intersection(host_names(facts.said.get("ReqNodeList", ""))):
        reason = f"job {facts.job_id} asks for {','.join(sorted(asked))}"
    elif len(known - excluded) < facts.num_nodes:
        reason = f"partition {facts.partition} has {len(known)} nodes, and job {facts.job_id} needs {facts.num_nodes}"
    else:
        return everything
    print(f"{','.join(nodes)} cannot be excluded: {reason}", file=sys.stderr)
    return ""


def host_names(nodes: str) -> list[str]:
    """The names in Slurm's list, in its order. Raises SlurmRefused."""
    return ask("scontrol", "show", "hostnames", nodes).split() if nodes else []


def is_job_id(job_id: str | None) -> TypeGuard[str]:
    """Whether a run's ``job_id`` is one of Slurm's, and not None or ``local``; ``ARRAY_TASK`` names an array's task,
    ``LEADER+COMPONENT`` a part of a heterogeneous job."""
    return re.fullmatch(r"\d+([_+]\d+)?", job_id or "") is not None


def is_active_state(state: str) -> bool:
    """Whether a job in this state waits, runs, or may run again. What a later release adds counts as that: the names of
    ends are as old as Slurm, those on the way (EXPEDITING, in 26.05) are not."""
    return state not in _ENDED


def is_waiting_state(state: str) -> bool:
    """Whether a job in this state is in the queue and nothing of it runs."""
    return state in _WAITS


def job_state(job_id: str) -> tuple[str, str] | None:
    """Slurm's state of the job and the reason it gives; None for a job that Slurm does not know (any more).

    Raises:
        UserError: Slurm does not answer.
    """
    with at_a_terminal("try `sinfo`"):
        try:
            facts = JobFacts.parse(ask("scontrol", "show", "job", job_id, timeout_s=PATIENT_S), job_id)
        except SlurmAbsent:
            return None
        except SlurmRefused as refused:
            if is_unknown(refused):
                return None
            raise
    return facts.state, facts.reason


def is_active(job_id: str) -> bool:
    """Whether the job waits, runs, or may run again."""
    state = job_state(job_id)
    return state is not None and is_active_state(state[0])


def cancel_job(job_id: str) -> None:
    """End the job, also one that is held or that would be requeued; one that has ended is left alone. Raises UserError
    where Slurm refuses."""
    with at_a_terminal("try again"), _it_may_have_ended():
        ask("scancel", job_id, timeout_s=PATIENT_S)


def ask_to_cancel(job_id: str) -> None:
    """Have the run of the job save and end as cancelled: SIGINT to its steps, not to the job script. A step that ends
    already has had it, and so has a job that has ended. Raises UserError where Slurm refuses."""
    with at_a_terminal("forge-hpc cancel --now ends it at once"), _it_may_have_ended():
        ask("scancel", "--signal=INT", job_id, timeout_s=PATIENT_S)


@contextmanager
def _it_may_have_ended() -> Iterator[None]:
    try:
        yield
    except SlurmRefused as refused:
        # 26.05 says "already completing" by a code alone: 2021 % 256
        if not is_unknown(refused) and not re.search(r"already complet|exit code 229$", str(refused)):
            raise
