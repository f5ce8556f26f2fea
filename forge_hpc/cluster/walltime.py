"""When the job's time is up, by our own clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from forge_hpc.cluster import slurm

ASK_S = 300.0
"""How often Slurm is asked whether somebody has moved the end of the job: one call a job, whatever its size."""
WARNING_S = 300.0
EARLY_S = 90.0
LEAD_S = 5.0
"""How often the lead time is looked up."""


class Walltime:
    """The end of a job as Slurm told it, counted down by the monotonic clock: this host's wall clock may jump.

    Args:
        job_id: the job.
        lead_s: how many seconds before the end a run must begin to leave.
    """

    def __init__(self, job_id: str, lead_s: Callable[[], float]) -> None:
        self._job_id = job_id
        self._lead = lead_s
        self._lead_s, self._looked = 0.0, -LEAD_S
        self._end_time: float | None = None
        self._end: float | None = None
        self._total_s = 0.0
        self._ask()

    def remaining_s(self) -> float | None:
        """Seconds until the end; None where there is none, or Slurm has not told."""
        if time.monotonic() - self._asked > ASK_S:
            self._ask()
        return None if self._end is None else self._end - time.monotonic()

    def is_near(self) -> bool:
        """Whether it is time to leave. In a short job no more than half of its time goes into that."""
        remaining = self.remaining_s()
        if remaining is None:
            return False
        if time.monotonic() - self._looked > LEAD_S:
            self._lead_s, self._looked = self._lead(), time.monotonic()
        return remaining < min(self._lead_s, self._total_s / 2)

    def is_announced(self) -> bool:
        """Whether the end is so close that Slurm's warning (``--signal``) may have come for it. The job scripts ask for
        300 s or for what was measured, and Slurm may send it a minute early; in a job that is shorter, at once."""
        remaining = self.remaining_s()
        return remaining is not None and remaining < max(WARNING_S, self._lead()) + EARLY_S

    def _ask(self) -> None:
        self._asked = time.monotonic()
        facts = slurm.job_facts(self._job_id)
        if facts is None or facts.end_time is None or facts.preempted:
            return
        if self._end_time is None:
            self._total_s = facts.end_time - time.time()
            self._end = self._asked + self._total_s
        elif self._end is not None:  # moved by so much, whatever this host's clock says now
            self._total_s += facts.end_time - self._end_time
            self._end += facts.end_time - self._end_time
        self._end_time = facts.end_time
