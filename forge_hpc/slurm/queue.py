"""What waits and runs in Slurm's queue, for a table of runs: many jobs by one question."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from forge_hpc.slurm.client import PATIENT_S, SlurmRefused, ask, is_unknown
from forge_hpc.slurm.job import is_active_state, is_waiting_state

# squeue's letters: neither names nor comments, which may hold anything. %i is ARRAY_TASK, or LEADER+COMPONENT of a
# heterogeneous job; -r gives the waiting tasks of an array a line each. %E is such as afterok:7(unfulfilled).
_FORMAT = "%i|%T|%r|%L|%S|%D|%N|%E"


_SHORT = {
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": (
        "nodes that are down, drained or reserved"
    )
}
"""The reason that is a sentence."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job in the queue, or one that has ended and that Slurm still knows."""

    job_id: str
    state: str
    """Such as PENDING; COMPLETING as long as processes end."""
    reason: str
    """Why it waits, in Slurm's word; empty where there is no reason."""
    time_left_s: float | None
    """None: no limit, or not known."""
    start_time: float | None
    """When it began, or is expected to, in unix seconds; None where Slurm has not planned it yet."""
    num_nodes: int
    nodes: str
    """Slurm's list; empty before it runs."""
    dependency: str = ""
    """What it waits for, as sbatch takes it: ``afterok:7``; empty where it waits for no job."""

    @property
    def is_active(self) -> bool:
        return is_active_state(self.state)

    @property
    def waits(self) -> bool:
        return is_waiting_state(self.state)

    def waits_for(self) -> str:
        """Why it waits, and until when or for how it goes on, for a user."""
        why = self.reason or self.state
        if self.dependency and why.startswith("Dependency"):
            why += f" {self.dependency}"
        if self.reason == "JobHeldUser" or "requeued held" in self.reason:
            return f"{why}; to let it go: scontrol release {self.job_id}"
        if self.reason == "DependencyNeverSatisfied":
            return f"{why}: forge-hpc cancel {self.job_id}"
        if self.start_time is None:
            expected = "Slurm has not planned its start"
        else:
            expected = f"expected to start {_when(self.start_time)}"
        return f"{why}; {expected}"


def queued_jobs(job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Those of the jobs that Slurm knows, by id. The id of an array, or of a heterogeneous job, finds all parts.

    Raises:
        SlurmAbsent: there is no squeue here.
        SlurmRefused: Slurm does not answer.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    command = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}", f"--format={_FORMAT}")
    try:
        lines = ask(*command, timeout_s=PATIENT_S).splitlines()
    except SlurmRefused as refused:
        if is_unknown(refused):  # of a single job; of several it says nothing
            return {}
        raise
    jobs = (_parse(line) for line in lines)
    return {job.job_id: job for job in jobs if job is not None}


def _parse(line: str) -> QueuedJob | None:
    fields = line.strip().split("|")
    if len(fields) != 8:  # another line than ours
        return None
    job_id, state, reason, left, start, num_nodes, nodes, dependency = fields
    return QueuedJob(
        job_id,
        state,
        "" if reason in ("None", "N/A") else _SHORT.get(reason, reason),
        duration_s(left),
        float(start) if start.isdigit() else None,
        int(num_nodes) if num_nodes.isdigit() else 0,
        nodes,
        "" if dependency == "(null)" else dependency.replace("(unfulfilled)", ""),
    )


def duration_s(text: str) -> float | None:
    """Seconds of Slurm's ``[DAYS-][[HOURS:]MINUTES:]SECONDS``; None of UNLIMITED, INVALID and the like."""
    found = re.fullmatch(r"-?(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return -1.0 if text.startswith("-") else float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _when(moment: float) -> str:
    return time.strftime("%H:%M" if abs(moment - time.time()) < 12 * 3600 else "%a %d %b %H:%M", time.localtime(moment))
