"""Why a start of a run ends, and what follows from that: the one vocabulary of `status.json`, `starts.jsonl`, exit
codes, the supervisor, the controller and the launchers.

    what happens ─► Cause ─► RULES: state, whether it counts as a failure, how the run comes back ─► exit code

docs/endings.md shows the tables to users, and a test holds it to them. What depends on Slurm's release and preempt mode
is a table of its own: ``slurm.preemption.RETURNS``. How long before the walltime a run leaves: ``supervisor.lead``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from forge_hpc.config.errors import EXIT_USAGE


class Exit(IntEnum):
    """Exit codes, of the doors and of ``forge_hpc.run`` (a node's supervisor)."""

    DONE = 0
    FAILED = 1
    USAGE = EXIT_USAGE
    """Wrong usage or configuration."""
    LEFT = 75
    """The run has saved and left, and is neither done nor failed (EX_TEMPFAIL)."""
    CANCELLED = 130
    """As a shell has it of a program that Ctrl-C ended."""
    TERMINATED = 143


class ControllerExit(IntEnum):
    """Exit codes of the controller's process, and ``code`` of the outcome that it publishes to all nodes."""

    DONE = 0
    FAILED = 1
    STOPPED = 3
    """The supervisor has told it to end at once."""
    LEFT = 4
    """It has saved what could be saved, and left."""


class Cause(StrEnum):
    """Why a start ends. Stands in `starts.jsonl`: a value, once given, stays."""

    COMPLETED = "completed"
    FAILED = "failed"
    """What another start would meet again: a wrong configuration, a NaN, an error of the user's code."""
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    """Another job takes the nodes, and Slurm has not put this one back into the queue (yet)."""
    REQUEUED = "requeued"
    """Slurm has put the job back into the queue: preempted, requeued by somebody, or a node was lost."""
    WALLTIME = "walltime"
    ASKED = "asked"
    """SIGTERM outside Slurm."""
    UNKNOWN = "unknown"
    """A signal in a job that runs on: sent by hand, or Slurm does not answer."""
    NODE_LOST = "node"
    """The run has found out that a node is lost, or cut off."""
    NODE_FAIL = "node_fail"
    """Slurm says that a node is lost, and has not requeued the job."""
    GATE = "gate"
    """Before anything has begun, a node was found not to be fit."""
    CRASH = "crash"
    """The machinery has failed: a process, a device, a network, a file system."""
    TAKEN_OVER = "taken over"
    """Another start has the run directory: the state is that one's, and nothing is written."""


class Return(StrEnum):
    """How a run comes back."""

    NEVER = "does not"
    BY_HAND = "by `forge-hpc resume`"
    SLURM = "Slurm starts it again"
    REQUEUE = "requeues itself; where Slurm refuses, queues a successor"
    SUCCESSOR = "queues a successor"
    BY_RELEASE = "by Slurm's release and PreemptMode"
    """See ``slurm.preemption.RETURNS``."""


@dataclass(frozen=True)
class Rule:
    """What follows from a cause."""

    state: str
    """In ``status.json``."""
    comes_back: Return
    counts: bool = False
    """A failure: ``cluster.max_restarts`` bounds how many come in a row without a newer checkpoint."""
    state_alone: str = ""
    """The state where nobody starts the run again (``slurm.requeue=never``, or no Slurm); empty: the same."""
    meaning: str = ""
    """In a message."""

    def state_left(self, *, comes_back: bool) -> str:
        """The state that a start leaves behind, whether the run is to be started again by itself or not."""
        return self.state if comes_back else self.state_alone or self.state


RULES = {
    Cause.COMPLETED: Rule("completed", Return.NEVER),
    Cause.FAILED: Rule("failed", Return.NEVER),
    Cause.CANCELLED: Rule("cancelled", Return.NEVER, meaning="cancelled"),
    Cause.PREEMPTED: Rule("preempted", Return.BY_RELEASE, meaning="preempted by another job"),
    Cause.REQUEUED: Rule("preempted", Return.SLURM, meaning="requeued by Slurm"),
    # A walltime in which not a step can be done must end a run, too.
    Cause.WALLTIME: Rule("preempted", Return.REQUEUE, True, "preempted", "the walltime is near"),
    Cause.ASKED: Rule("preempted", Return.BY_HAND, meaning="asked to leave"),
    Cause.UNKNOWN: Rule("preempted", Return.REQUEUE, True, "failed", "asked to leave"),
    Cause.NODE_LOST: Rule("preempted", Return.REQUEUE, True, "failed", "a node is lost"),
    Cause.NODE_FAIL: Rule("preempted", Return.REQUEUE, True, "failed", "a node is lost"),
    Cause.GATE: Rule("preempted", Return.REQUEUE, True, "failed", "a node is not fit"),
    Cause.CRASH: Rule("preempted", Return.REQUEUE, True, "failed"),
    Cause.TAKEN_OVER: Rule("", Return.NEVER),
}
FAILURES = frozenset(cause for cause, rule in RULES.items() if rule.counts)
EXITS = {
    "completed": Exit.DONE,
    "failed": Exit.FAILED,
    "cancelled": Exit.CANCELLED,
    "preempted": Exit.LEFT,
}
"""Exit code of a start by the state that it leaves behind; FAILED where that is another start's."""


@dataclass(frozen=True)
class Ending:
    """How a start has ended, as far as the start itself knows."""

    cause: Cause
    message: str = ""
    hint: str | None = None
    lost_nodes: tuple[str, ...] = ()
    """Slurm's names of nodes that the next start is to do without."""
    exit: int | None = None
    """The exit code where the run has failed; None: that of its state."""
