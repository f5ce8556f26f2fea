"""What Slurm does with a job that another one takes the nodes of, which depends on its release and on the site.

Since 24.05 Slurm takes a job whose processes end in the grace time of a preemption for preempted, whatever they ended
with: with PreemptMode=REQUEUE it starts the job again, with CANCEL the job is PREEMPTED. Some of these releases keep
that mark when the owner requeues the job, or when the grace time runs out, and act on it at the job's next end: a
completed or failed job is started once more, or shows PREEMPTED. docs/slurm.md has the measured tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forge_hpc.slurm.client import ANSWER_S, SlurmRefused, ask
from forge_hpc.slurm.facts import JobFacts, Release, cluster_facts, seconds, word
from forge_hpc.supervisor.ending import Return

_ENDS_IN_GRACE_ARE_PREEMPTED: Release = (24, 5)
_OWN_REQUEUE_CLEARS_THE_MARK: Release = (26, 5, 5)
"""Measured: kept by 24.11.5, not by 26.05.5. What lies between is taken for the former: a successor where a requeue
would have done costs little, and a run that is started again after its end much."""
RETURNS: tuple[tuple[Release, Mapping[str, Return]], ...] = (
    ((), {"REQUEUE": Return.REQUEUE, "CANCEL": Return.REQUEUE, "": Return.REQUEUE}),
    (_ENDS_IN_GRACE_ARE_PREEMPTED, {"REQUEUE": Return.SLURM, "CANCEL": Return.SUCCESSOR, "": Return.REQUEUE}),
    (_OWN_REQUEUE_CLEARS_THE_MARK, {"REQUEUE": Return.SLURM, "CANCEL": Return.REQUEUE, "": Return.REQUEUE}),
)
"""How a run comes back that leaves in the grace time of a preemption, by the release from which on that holds and
PreemptMode; empty where Slurm does not say it. A part of ``supervisor.ending.RULES``, shown in docs/slurm.md."""
_TESTED = {(22, 5): "22.05.8", (24, 11): "24.11.5", (26, 5): "26.05.5"}
_OLDEST: Release = (21, 8)


@dataclass(frozen=True)
class Preemption:
    """How a job is preempted."""

    release: Release
    """Of slurmctld, such as (24, 11, 5)."""
    mode: str
    """PreemptMode in capitals, such as REQUEUE; empty where Slurm does not say."""
    grace_s: float | None
    """GraceTime; None where Slurm does not say."""

    def way_back(self, facts: JobFacts) -> Return:
        """How the job comes back where it ends now: by ``RETURNS`` in the grace time, else by a requeue.

        SLURM: whatever it ends with. SUCCESSOR: a job that its owner requeues now would be PREEMPTED at its end,
        however that comes.
        """
        if not self._in_grace(facts):
            return Return.REQUEUE
        of_release = next(row for since, row in reversed(RETURNS) if self.release >= since)
        way = next(way for mode, way in of_release.items() if mode in self.mode)
        return way if facts.can_requeue or way is not Return.SLURM else Return.REQUEUE

    def may_start_again(self, facts: JobFacts) -> bool:
        """Whether it might do so: also where it has kept the mark of an earlier preemption, which cannot be seen."""
        marked = self._in_grace(facts) or (facts.restarts > 0 and self._keeps_marks())
        return marked and facts.can_requeue and facts.state == "RUNNING" and self.mode not in ("CANCEL", "OFF")

    def _in_grace(self, facts: JobFacts) -> bool:
        new = self.release >= _ENDS_IN_GRACE_ARE_PREEMPTED
        return new and facts.preempted and facts.state == "RUNNING" and self.grace_s != 0

    def _keeps_marks(self) -> bool:
        return _ENDS_IN_GRACE_ARE_PREEMPTED <= self.release < _OWN_REQUEUE_CLEARS_THE_MARK

    def end_of_grace(self, facts: JobFacts) -> float | None:
        """When Slurm kills, in unix seconds of its clock. EndTime tells, except of a job without a time limit."""
        since = facts.said.get("PreemptTime", "")
        if not facts.preempted or facts.end_time is not None:
            return facts.end_time
        return float(since) + self.grace_s if since.isdigit() and self.grace_s is not None else None


def preemption(facts: JobFacts, timeout_s: float = ANSWER_S) -> Preemption | None:
    """How the job is preempted where it runs; None where Slurm does not answer."""
    try:
        cluster = cluster_facts(timeout_s)
        if cluster.preempt_type == "preempt/qos":
            mode, grace = _of_qos(facts, timeout_s)
            mode = cluster.preempt_mode if mode == "CLUSTER" else mode
        else:
            partition = ask("scontrol", "show", "partition", facts.partition, timeout_s=timeout_s)
            mode, grace = word(partition, "PreemptMode"), word(partition, "GraceTime")
    except SlurmRefused:
        return None
    return Preemption(cluster.release, mode.upper(), seconds(grace))


def _of_qos(facts: JobFacts, timeout_s: float) -> tuple[str, str]:
    """PreemptMode and GraceTime of the job's QOS, which only the accounting knows; empty where it does not say."""
    command = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", facts.qos or "normal")
    try:
        answer = ask(*command, "format=preemptmode,gracetime", timeout_s=timeout_s)
    except SlurmRefused:
        return "", ""
    mode, _, grace = answer.strip().partition("|")
    return mode.upper(), grace


def release_text(release: Release) -> str:
    """As Slurm writes it: the month has two digits."""
    return ".".join(f"{number:02}" if place == 1 else str(number) for place, number in enumerate(release))


def known_of(release: Release) -> str:
    """What this project knows of a release, in a line."""
    series = release[:2]
    if series in _TESTED:
        tested = f"tested with {_TESTED[series]}"
    elif _OLDEST <= series <= max(_TESTED):
        tested = f"not tested; {', '.join(_TESTED.values())} are"
    else:
        tested = f"untried: {', '.join(_TESTED.values())} are tested"
    if release < _ENDS_IN_GRACE_ARE_PREEMPTED:
        return f"{tested}; a preempted run requeues itself"
    leaves = "a run preempted with PreemptMode=REQUEUE leaves, and Slurm starts it again"
    if release < _OWN_REQUEUE_CLEARS_THE_MARK:
        return f"{tested}; {leaves}; with CANCEL a successor goes on, since a requeued job would end as PREEMPTED"
    return f"{tested}; {leaves}; with CANCEL it requeues itself"
