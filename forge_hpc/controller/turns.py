"""Trainers and generators on the same GPUs in turns (``split.takes_turns``): one side computes, and the other has given
up what memory it can.

    generators compute ──► they sleep ──► trainers compute ──► they release what is cached ──► new weights, KV cache ──┐
            ▲                                                                                                          │
            └──────────────────────────────────────────────────────────────────────────────────────────────────────────┘

Nobody says whose turn it is: who wants to compute takes it, once the other side is done. So a recipe's order of calls
is the order of the turns, and evaluations and replacements of generators need no rule of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

logger = logging.getLogger(__name__)
Side = Literal["generators", "trainers"]


class Turns:
    """Whose turn it is; lives in the controller's event loop. Generators start awake.

    Many of one side compute at once. One that comes while its own side computes is let in, also where the other side
    waits: what is under way may depend on it. A change that fails, or whose caller is cancelled, is made again, whole,
    by who comes next: ``sleep`` and ``wake`` must bear being repeated.
    """

    def __init__(self) -> None:
        self._side: Side | None = "generators"  # None: a change is not complete
        self._num = 0  # callers that compute
        self._is_changing = False
        self._changed = asyncio.Event()
        self._seconds: dict[str, float] = {}
        self.sleep: Callable[[], Awaitable[None]] = _nothing
        """Makes room for the trainers: all generators sleep when it returns."""
        self.wake: Callable[[], Awaitable[None]] = _nothing
        """Makes room for the generators, brings them the newest weights and wakes them."""

    @contextlib.asynccontextmanager
    async def generating(self) -> AsyncIterator[None]:
        """The body computes on generators. Raises what ``wake`` raises."""
        await self._enter("generators")
        try:
            yield
        finally:
            self._leave()

    @contextlib.asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """The body computes on trainers. Raises what ``sleep`` raises."""
        await self._enter("trainers")
        try:
            yield
        finally:
            self._leave()

    def metrics(self) -> dict[str, float]:
        """How long the changes of turns took since this was asked last."""
        seconds, self._seconds = self._seconds, {}
        return {"time/sleep_s": seconds.get("trainers", 0.0), "time/wake_s": seconds.get("generators", 0.0)}

    async def _enter(self, side: Side) -> None:
        while self._is_changing or (self._num and self._side != side):
            await self._changed.wait()
        if self._side != side:
            await self._change_to(side)
        self._num += 1

    async def _change_to(self, side: Side) -> None:
        start = time.perf_counter()
        self._is_changing, self._side = True, None
        try:
            await (self.sleep() if side == "trainers" else self.wake())
            self._side = side
        finally:
            self._is_changing = False
            self._tell()
        seconds = time.perf_counter() - start
        self._seconds[side] = self._seconds.get(side, 0.0) + seconds
        logger.info("the %s' turn after %.2f s", side, seconds)

    def _leave(self) -> None:
        self._num -= 1
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _nothing() -> None:
    """Before anybody has connected the two sides there is nothing to do."""
