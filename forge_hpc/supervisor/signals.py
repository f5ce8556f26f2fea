"""Signals, and what they mean: what is wanted of the run, by whom, and how much time there is for it.

Handlers only set a flag, and only the first node acts on it: it asks Slurm what the signal means. A ``scancel`` ends
the run; SIGINT, of Ctrl-C or ``forge-hpc cancel``, lets it finish its step and save, and a second one ends it at once;
preemption, the walltime and what nobody explains let it save and leave, and the job is requeued. The walltime is also
seen coming by our own clock.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forge_hpc.config import Config
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm import outside
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import RULES, Cause
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.lead import lead_s

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class StopRequest:
    """What a signal, or the clock, wants of the run."""

    cause: Cause
    """CANCELLED: end at once. Anything else: save, leave, and come back."""
    message: str
    within_s: float | None
    """Then Slurm kills; None where nobody does. Of a run that is cancelled: how long it may take to save; None where it
    is not to save at all."""

    @property
    def cancels(self) -> bool:
        return self.cause is Cause.CANCELLED


class Stopped(Exception):
    """The run is to end before there is anything to save."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(request.message)
        self.request = request


class StopRequests:
    """What is wanted of the run, one request after the other."""

    def __init__(self, run_dir: RunDir, job: OwnJob) -> None:
        self._run_dir = run_dir
        self._job = job
        self._signals: list[tuple[int, float]] = []
        self.config: Config | None = None
        """Of the run, as soon as it is known."""
        self.current: StopRequest | None = None
        """The one that is being followed."""
        comes_from_outside = outside.SIGNALS in os.environ  # then Slurm, or the container's parent, may do so as well
        for signum in SIGNALS:
            signal.signal(signum, _nothing if comes_from_outside else self._on_signal)
        if comes_from_outside:
            outside.follow_signals(self._on_signal)

    def _on_signal(self, signum: int, frame: Any = None) -> None:
        self._signals.append((signum, time.monotonic()))

    @property
    def has_signals(self) -> bool:
        """Whether a signal has come that nobody has asked about."""
        return bool(self._signals)

    def next(self) -> StopRequest | None:
        """What signals and the clock want, when it is new."""
        request, walltime = None, self._job.walltime
        while self._signals and (request is None or not request.cancels):
            signum, came = self._signals.pop(0)
            if signum == signal.SIGUSR2 and walltime is not None and walltime.is_announced():
                continue  # Slurm's warning, which may come much too early: our own clock decides
            request = self._meaning(signum, came)
        if request is None and self.current is None and walltime is not None and walltime.is_near():
            left_s = walltime.remaining_s()
            within_s = None if left_s is None else self._job.killed_in(left_s)
            request = StopRequest(Cause.WALLTIME, RULES[Cause.WALLTIME].meaning, within_s)
        return request

    def check(self) -> None:
        """Raise Stopped where there is nothing to save yet, and somebody wants the run to end."""
        if (request := self.next()) is not None:
            raise Stopped(request)

    def check_interrupt(self) -> None:
        """On the other nodes: the first one decides, and in Slurm it has every signal too; elsewhere who sits at a
        terminal is obeyed."""
        if self._job.allocation.in_slurm:
            return
        if {signal.SIGINT, signal.SIGHUP} & {signum for signum, _ in self._signals}:
            raise Stopped(StopRequest(Cause.CANCELLED, "stopped by hand", None))

    def _meaning(self, signum: int, came: float) -> StopRequest:
        name = signal.Signals(signum).name
        if signum in (signal.SIGINT, signal.SIGHUP):
            return StopRequest(Cause.CANCELLED, f"stopped by {name}", self._time_to_save_s(signum))
        if not self._job.allocation.in_slurm:
            return StopRequest(Cause.ASKED, f"{RULES[Cause.ASKED].meaning} by {name}", None)
        cause, facts = self._job.cause_of(signum)
        within_s: float | None = None
        if facts is not None and facts.state == "RUNNING" and cause in (Cause.PREEMPTED, Cause.WALLTIME):
            self._job.clock.has_seen(facts.start_time)
            end_time = facts.end_time
            if cause is Cause.PREEMPTED and (how := self._job.how_preempted(facts)) is not None:
                end_time = how.end_of_grace(facts)
            if end_time is not None and (left_s := end_time - self._job.clock.now()) > 0:
                within_s = self._job.killed_in(left_s)
        if within_s is None and signum == signal.SIGUSR2:  # nothing follows it
            within_s = deadlines.SILENT_S
        elif within_s is None:  # the kill follows SIGTERM
            within_s = deadlines.KILL_WAIT_S - (time.monotonic() - came)
        return StopRequest(cause, f"{RULES[cause].meaning} ({name})", within_s)

    def _time_to_save_s(self, signum: int) -> float:
        """How long a run that somebody at its terminal stops may take to save: what step and save have taken before,
        and nothing when it is asked for a second time (a terminal that is closed may send SIGHUP twice)."""
        if signum == signal.SIGINT and self.current is not None and self.current.cancels:
            return 0.0
        if self.config is None:
            return deadlines.STOP_S
        return max(deadlines.STOP_S, min(deadlines.SILENT_S, lead_s(self.config, self._run_dir)))


def _nothing(signum: int, frame: Any) -> None:
    """A handler, since what is ignored would be ignored by all that this process starts."""


def ignoring_signals(command: Sequence[str]) -> list[str]:
    """``command``, deaf to signals that ask to stop, as are all processes that it starts.

    Slurm signals every process of a step, and a terminal all of its job; only the supervisor is to answer.
    """
    return ["sh", "-c", "trap '' TERM INT USR1 USR2; exec \"$@\"", "sh", *command]
