"""What the supervisor asks of the controller, on its standard input."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from typing import Any

from forge_hpc.controller.recovery import Departure, Leave
from forge_hpc.supervisor.ending import Cause

logger = logging.getLogger("forge_hpc.controller")


class Orders:
    """What the supervisor asks on the standard input, a line each: ``stop`` cancels the run, ``leave REASON`` asks it
    to save and leave; ``run JSON`` begins the next one where engines are kept. The supervisor's death ends
    the process."""

    def __init__(self) -> None:
        self.runs: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._leave = Leave()

    def follow(self, task: asyncio.Task[Any] | None, leave: Leave) -> None:
        """Orders are for this run from now on."""
        self._task, self._leave = task, leave

    def listen(self) -> None:
        """Listen from now on, in a thread."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._loop.call_soon_threadsafe(self._obey, *line.strip().partition(" ")[::2])
        os._exit(1)

    def _obey(self, word: str, rest: str) -> None:
        if word == "run":
            self.runs.put_nowait(json.loads(rest))
            return
        logger.info("the supervisor asks to %s %s", word, rest)
        if word == "leave":
            self._leave.request(Departure(Cause.ASKED, rest))
        if self._task is not None and (word == "stop" or not self._leave.is_attended):  # nothing to save yet
            self._task.cancel()
