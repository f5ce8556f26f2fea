"""Episodes that ask for their next responses together, so that a synchronous run repeats exactly."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from forge_hpc.data.types import Completion, Turn
from forge_hpc.rollouts.slots import Slot, Slots

T = TypeVar("T")
Respond = Callable[[Turn], Awaitable[Completion | ValueError]]


class Lockstep:
    """Gathers one request of every episode that is open, then sends all at once, in the order of joining."""

    def __init__(
        self,
        generate: Callable[[list[Turn]], Awaitable[list[Completion | ValueError]]],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._generate, self._tasks = generate, tasks
        self._num_joined = 0
        self._num_live = 0
        """Episodes that have their slot."""
        self._waiting: dict[int, tuple[Turn, asyncio.Future[Completion | ValueError]]] = {}

    def join(self, slots: Slots, play: Callable[[Slot, Respond], T]) -> T:
        """What ``play`` makes of a slot of ``slots`` and of what answers an episode's turns. One that is let in at once
        counts from this call."""
        number = self._num_joined
        self._num_joined += 1

        async def respond(turn: Turn) -> Completion | ValueError:
            answer = asyncio.get_running_loop().create_future()
            self._waiting[number] = turn, answer
            self._send_when_complete()
            return await answer

        return play(Slot(slots, self._entered, self._left), respond)

    def _entered(self) -> None:
        self._num_live += 1

    def _left(self) -> None:
        self._num_live -= 1
        self._send_when_complete()

    def _send_when_complete(self) -> None:
        if self._waiting and len(self._waiting) == self._num_live:
            requests = [request for _, request in sorted(self._waiting.items(), key=lambda item: item[0])]
            self._waiting = {}
            self._tasks.create_task(self._send(requests))

    async def _send(self, requests: list[tuple[Turn, asyncio.Future[Completion | ValueError]]]) -> None:
        responses = await self._generate([turn for turn, _ in requests])
        for (_, answer), response in zip(requests, responses, strict=True):
            if not answer.done():
                answer.set_result(response)
