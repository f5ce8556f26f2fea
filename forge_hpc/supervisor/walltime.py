"""When the job's time is up, by our own clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from forge_hpc import slurm
from forge_hpc.supervisor.deadlines import ANSWER_S
from forge_hpc.supervisor.lead import capped_s, warning_s

ASK_S = 300.0
"""How often Slurm is asked whether somebody has moved the end of the job: one call a job, whatever its size."""
LOOK_S = 5.0
"""How often the lead is looked up."""


class SlurmClock:
    """slurmctld's clock, by which jobs end: read once, then counted on by the monotonic clock.

    This host's own clock may be wrong, and may jump. It stands in until slurmctld has told its time, and is then at
    least known not to lie before a moment that slurmctld has seen.
    """

    def __init__(self) -> None:
        self._is_read = False
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Unix seconds."""
        return self._offset + time.monotonic()

    def read(self) -> None:
        """Ask slurmctld, until it has answered once."""
        if self._is_read:
            return
        before = time.monotonic()
        said = slurm.controller_time(timeout_s=ANSWER_S)
        if said is not None:
            self._is_read, self._offset = True, said - (before + time.monotonic()) / 2

    def has_seen(self, moment: float | None) -> None:
        """``moment`` lies in the past of slurmctld."""
        if moment is not None and not self._is_read:
            self._offset = max(self._offset, moment - time.monotonic())


class Walltime:
    """The end of a job as Slurm told it.

    Args:
        job_id: the job.
        lead_s: how many seconds before the end a run must begin to leave.
        clock: by which Slurm's times are read.
    """

    def __init__(self, job_id: str, lead_s: Callable[[], float], clock: SlurmClock) -> None:
        self.facts: slurm.JobFacts | None = None
        """What Slurm last said of the job."""
        self._job_id = job_id
        self._lead = lead_s
        self._lead_s, self._looked = 0.0, -LOOK_S
        self._clock = clock
        self._end_time: float | None = None
        self._began = time.monotonic()
        self._ask()

    def remaining_s(self) -> float | None:
        """Seconds until the end; None where there is none, or Slurm has not told."""
        if time.monotonic() - self._asked > ASK_S:
            self._ask()
        return None if self._end_time is None else self._end_time - self._clock.now()

    def is_near(self) -> bool:
        """Whether it is time to leave."""
        remaining = self.remaining_s()
        if remaining is None:
            return False
        if time.monotonic() - self._looked > LOOK_S:
            self._lead_s, self._looked = self._lead(), time.monotonic()
        total_s = remaining + time.monotonic() - self._began
        return remaining < capped_s(self._lead_s, total_s)

    def is_announced(self) -> bool:
        """Whether the end is so close that Slurm's warning (``--signal``) may have come for it."""
        remaining = self.remaining_s()
        return remaining is not None and remaining < warning_s(self._lead())

    def _ask(self) -> None:
        self._asked = time.monotonic()
        self._clock.read()
        facts = slurm.job_facts(self._job_id, timeout_s=ANSWER_S)
        if facts is None:
            return
        self.facts = facts
        self._clock.has_seen(facts.start_time)
        if not facts.preempted:  # else it is the end of the grace time
            self._end_time = facts.end_time
