"""How many episodes are open at once: servers take few sessions, and processes cost memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Slots:
    """Lets in as many as ``limit`` says, in the order in which they asked.

    Args:
        limit: asked anew each time, since it may be learned on the way; None is no bound.
        within: the slots of a whole of which these are a share: who has one here asks there too.

    Who is let in is told at once, by a call: nothing happens between the giving back of a slot and its taking. So a
    lockstep never goes on without the episode that takes the place of one that ended.
    """

    def __init__(self, limit: Callable[[], int | None], within: Slots | None = None) -> None:
        self._limit, self._within = limit, within
        self._waiting: deque[Callable[[], None]] = deque()
        self.num_taken = 0

    def request(self, enter: Callable[[], None]) -> None:
        """Have ``enter`` called when there is room, perhaps now. Then ``release`` is due, once."""
        self._waiting.append(enter)
        self._let_in()

    def release(self) -> None:
        """Give a slot back."""
        self.num_taken -= 1
        if self._within is not None:
            self._within.release()
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and ((limit := self._limit()) is None or self.num_taken < limit):
            enter = self._waiting.popleft()
            self.num_taken += 1
            if self._within is None:
                enter()
            else:
                self._within.request(enter)


def _nothing() -> None:
    pass


class Slot:
    """An episode's place among those that are open; requested when it is made.

    Args:
        on_enter, on_release: called when the episode is let in, and when it has given its place back.
    """

    def __init__(
        self, slots: Slots, on_enter: Callable[[], None] = _nothing, on_release: Callable[[], None] = _nothing
    ) -> None:
        self._slots, self._on_enter, self._on_release = slots, on_enter, on_release
        self.request()

    def request(self) -> None:
        """Stand in line."""
        self._entered = asyncio.get_running_loop().create_future()
        self._slots.request(self._enter)

    async def acquire(self) -> None:
        """Wait until it is this episode's turn; then ``release`` is due."""
        try:
            await self._entered
        except asyncio.CancelledError:
            if not self._entered.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give the place to the next in line, who is let in before ``on_release`` is called."""
        self._slots.release()
        self._on_release()

    def _enter(self) -> None:
        if self._entered.cancelled():
            self._slots.release()
            return
        self._entered.set_result(None)
        self._on_enter()
