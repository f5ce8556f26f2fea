"""What the endpoint samples with: the run's generators, whichever of them is least loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Turn

if TYPE_CHECKING:
    from forge_hpc.controller.service import Service

Token = tuple[int, float]
"""An id and its log-probability."""


class Sampler(Protocol):
    """Answers turns; a turn that cannot be answered has its ValueError. Whatever else is raised ends the run.

    Cancelling a call, or closing the stream, ends the request in the generator.
    """

    async def respond(
        self, turns: Sequence[Turn], sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> list[Completion | ValueError]:
        """The response of each."""

    def stream(
        self, turn: Turn, sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> AsyncIterator[Token | Completion | ValueError]:
        """Its tokens as they come, and at last the whole."""


class GeneratorSampler:
    """A ``Sampler`` over the generators' service."""

    def __init__(self, generators: Service) -> None:
        self._generators = generators
        self._tasks: set[asyncio.Task[Any]] = set()

    async def respond(
        self, turns: Sequence[Turn], sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> list[Completion | ValueError]:
        try:
            return await self._generators.generate_turns.route(list(turns), sampling, seed, share, name)
        except asyncio.CancelledError:
            self._give_up(name)
            raise

    async def stream(
        self, turn: Turn, sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> AsyncIterator[Token | Completion | ValueError]:
        whole: Completion | ValueError | None = None
        try:
            pairs = self._generators.stream_turn.stream(turn, sampling, seed, share, name)
            async with contextlib.aclosing(pairs) as pairs:  # type: ignore[type-var]
                num, early = 0, {}
                async for place, result in pairs:
                    if place < 0:
                        whole = result
                        continue
                    early[place] = result
                    while num in early:
                        yield early.pop(num)
                        num += 1
            assert whole is not None
            yield whole
        finally:
            if whole is None:
                self._give_up(name)

    def _give_up(self, name: str) -> None:
        task = asyncio.ensure_future(self._generators.give_up.fanout(name))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of a generator that is lost: it has nothing to give up
