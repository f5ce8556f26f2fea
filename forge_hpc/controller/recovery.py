"""What the controller knows of failures: how many were mended, and whether it has been asked to leave."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from forge_hpc.controller.service import ActorLost
from forge_hpc.supervisor.ending import Cause

logger = logging.getLogger(__name__)


class GivenUp(ActorLost):
    """An actor was lost more often than ``cluster.max_restarts`` has it mended: the run ends."""


class Recoveries:
    """Mended losses, by kind. ``cluster.max_restarts`` bounds how often the same one is mended without a completed step
    in between: a node that takes eight generators with it is eight losses, each the first of its kind."""

    KINDS = ("generators", "trainers", "frozen", "served", "calls")

    def __init__(self, limit: int) -> None:
        self.counts: Counter[str] = Counter()
        self._limit = limit
        self._since_step: Counter[str] = Counter()

    def use_retry(self, kind: str, who: str, reason: str) -> None:
        """``who`` of ``kind`` was lost and will be mended. Raises GivenUp where that has gone on for too long."""
        self._since_step[who] += 1
        times = self._since_step[who]
        if times > self._limit:
            often = "once" if times == 1 else f"{times} times"
            raise GivenUp(f"{reason} (lost {often} without a completed step in between)")
        self.counts[kind] += 1
        logger.warning("recovering (%d of %d until the next step): %s", times, self._limit, reason)

    def call_retried(self) -> None:
        """A call was given to another replica."""
        self.counts["calls"] += 1

    def step_done(self) -> None:
        """An optimizer step was completed: whatever failed before, the run makes progress."""
        self._since_step.clear()

    def metrics(self) -> dict[str, float]:
        """Counts over the whole run."""
        return {f"recoveries/{kind}": float(self.counts[kind]) for kind in self.KINDS}

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting from a checkpoint, without forgetting what this start has counted itself."""
        for kind, count in state.items():
            self.counts[kind] = max(self.counts[kind], count)


@dataclass(frozen=True)
class Departure:
    """Why the run saves and leaves its nodes before it is done."""

    cause: Cause
    """ASKED by the supervisor (preemption, walltime), or NODE_LOST."""
    message: str
    lost_nodes: tuple[int, ...] = ()
    """Nodes that answer no more: the next start is to do without them."""


class Leave:
    """Whether somebody wants the run to save and leave."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.departure: Departure | None = None
        self.is_attended = False
        """An attempt has begun, and will see the request."""

    def request(self, departure: Departure) -> None:
        """Ask to leave; the first reason stands."""
        if self.departure is None:
            logger.warning("leaving after this step: %s", departure.message)
            self.departure = departure
            self.requested.set()
