"""The Slurm job that a supervisor runs in: what Slurm said of it last, when it is over, and how it is preempted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from forge_hpc import slurm
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Cause
from forge_hpc.supervisor.walltime import SlurmClock, Walltime


class OwnJob:
    """The first node asks; an answer of Slurm that does not come changes nothing of what is known."""

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.clock = SlurmClock()
        self.walltime: Walltime | None = None
        self.facts: slurm.JobFacts | None = None
        """What Slurm said last."""
        self.kill_at: float | None = None
        """Monotonic time at which Slurm kills, where it has told."""
        self.arguments: list[str] | None = None
        """Of the job script."""
        self._preemption: slurm.Preemption | None = None

    @property
    def is_interactive(self) -> bool:
        """Of salloc or srun: nobody starts it again."""
        return self.facts is not None and not self.facts.is_batch

    def remember_arguments(self) -> None:
        """To be called early: a job that is preempted or cancelled loses its script first."""
        self.arguments = slurm.script_arguments(os.environ["SLURM_JOB_ID"])

    def follow_walltime(self, lead_s: Callable[[], float]) -> None:
        """See the walltime coming, and leave ``lead_s()`` before it."""
        self.walltime = Walltime(self.allocation.job_id, lead_s, self.clock)
        self.facts = self.walltime.facts or self.facts

    def waited_s(self, ago_s: float) -> dict[str, float]:
        """How long the job waited in the queue, and how long it took until ``ago_s`` seconds before now to come from
        there to its first node; nothing where Slurm has not told."""
        facts = self.facts
        if facts is None or facts.start_time is None or not (submitted := facts.said.get("SubmitTime", "")).isdigit():
            return {}
        queue, launch = facts.start_time - float(submitted), self.clock.now() - ago_s - facts.start_time
        return {"queue": max(0.0, queue), "launch": max(0.0, launch)}

    def ask(self) -> slurm.JobFacts | None:
        """What Slurm says of the job now."""
        facts = slurm.job_facts(self.allocation.job_id, timeout_s=deadlines.ANSWER_S)
        self.facts = facts or self.facts
        return facts

    def cause_of(self, signum: int) -> tuple[Cause, slurm.JobFacts | None]:
        """Why the job got a signal, and what Slurm says of it."""
        facts = self.ask()
        return slurm.cause_of(facts, signum, self.allocation.requeues), facts

    def is_cancelled(self) -> bool:
        """Whether somebody has cancelled the job by now."""
        return self.allocation.in_slurm and self.cause_of(signal.SIGTERM)[0] is Cause.CANCELLED

    def how_preempted(self, facts: slurm.JobFacts) -> slurm.Preemption | None:
        """How the job is, or was, preempted: asked once, since there is little time later."""
        if self._preemption is None:
            self._preemption = slurm.preemption(facts, timeout_s=deadlines.ANSWER_S)
        return self._preemption

    def killed_in(self, left_s: float) -> float:
        """Slurm has told that it kills so many seconds from now."""
        self.kill_at = time.monotonic() + left_s
        return left_s

    def stay_ended(self) -> None:
        """Keep Slurm from starting a run again that has failed, or was stopped: it may still act on a preemption."""
        facts = self.ask() if self.allocation.in_slurm else None
        if facts is None or not (facts.preempted or facts.restarts):
            return
        if (how := self.how_preempted(facts)) is not None and how.may_start_again(facts):
            try:
                slurm.forbid_requeue(self.allocation.job_id)
            except slurm.SlurmRefused as refusal:
                print(f"Slurm may start the job again: {refusal}", file=sys.stderr)
