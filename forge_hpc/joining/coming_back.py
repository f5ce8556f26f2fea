"""Whether a job that lends is started again when Slurm has wanted its nodes back."""

from __future__ import annotations

import sys

from forge_hpc import slurm
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.supervisor.ending import RULES, Cause, Return
from forge_hpc.supervisor.job import OwnJob


def come_back(allocation: Allocation, signum: int) -> None:
    """Put the job back into the queue where it was preempted or its walltime is over, it was submitted with a requeue,
    and Slurm does not do so itself. It ends with this."""
    job = OwnJob(allocation)
    cause, facts = job.cause_of(signum)
    if facts is None or not facts.can_requeue or cause not in (Cause.PREEMPTED, Cause.WALLTIME, Cause.NODE_FAIL):
        return
    how = job.how_preempted(facts) if facts.preempted else None
    if how is not None and how.way_back(facts) is not Return.REQUEUE:
        return  # Slurm starts it again, or would take a requeue amiss
    print(f"job {allocation.job_id} is requeued: {RULES[cause].meaning}", file=sys.stderr, flush=True)
    try:
        slurm.requeue(allocation.job_id)
    except slurm.SlurmRefused as refused:
        print(f"job {allocation.job_id} is not requeued: {refused}", file=sys.stderr, flush=True)
