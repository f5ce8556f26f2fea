"""What keeps published weights whole: no optimizer step begins while they are read from the parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Publishing:
    """One publication at a time, under way beside whatever the trainer does next.

    Where all wait for the new weights (staleness 0) the parameters themselves are published, without a copy. A recipe
    that trains on without waiting for the delivery then waits here, at its next step, until they are in the store.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._reads_weights = False

    def begin(self, publication: Coroutine[Any, Any, Any], *, reads_weights: bool) -> None:
        """Start it; ``reads_weights`` where it reads the parameters and not a copy of them. ``done`` comes first."""
        self._task, self._reads_weights = asyncio.create_task(publication), reads_weights

    async def has_read(self) -> None:
        """Return once the parameters may change. What went wrong is ``done``'s to tell."""
        if self._task is not None and self._reads_weights:
            await asyncio.wait({self._task})

    async def done(self) -> None:
        """Wait until what was begun is in the store. Raises what went wrong, once."""
        if (task := self._task) is None:
            return
        try:
            await task
        finally:
            if self._task is task:  # until here it is what ``has_read`` waits for
                self._task = None
