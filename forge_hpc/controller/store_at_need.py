"""The weight store of an attempt, whose processes are started when something needs them.

Generators mostly read a version where the trainers have copied it. The store serves those that cannot, and trainers
that have no memory for a copy; its processes, and torch in each, cost seconds of CPU that most runs need not spend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge_hpc.weights import StoreSpec, WeightStore


class StoreAtNeed:
    """A ``WeightStore`` that ``open`` starts, once.

    Args:
        start: starts it, with a deadline of its own.
    """

    def __init__(self, start: Callable[[], Awaitable[WeightStore]]) -> None:
        self._start = start
        self._starting: asyncio.Task[WeightStore] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has been started."""
        task = self._starting
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    @property
    def spec(self) -> StoreSpec | None:
        """What actors need to reach it; None before it is open."""
        return self._starting.result().spec if self._starting is not None and self.is_open else None

    async def open(self) -> StoreSpec:
        """Have it started. Raises what ``start`` raises."""
        return (await self._opened()).spec

    async def commit(self, version: int) -> None:
        """As ``WeightStore.commit``."""
        await (await self._opened()).commit(version)

    async def stop(self) -> None:
        """As ``WeightStore.stop``."""
        await (await self._opened()).stop()

    async def close(self) -> None:
        """Its processes are ended with the others; what became of its start tells nobody anything any more."""
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})

    async def _opened(self) -> WeightStore:
        if self._starting is None:
            self._starting = asyncio.create_task(_awaited(self._start()))
        return await asyncio.shield(self._starting)


async def _awaited(start: Awaitable[WeightStore]) -> WeightStore:
    return await start
