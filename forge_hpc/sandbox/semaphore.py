"""How many sandboxes run in this process at once, over all its threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future


class Semaphore:
    """Lets in those who wait, in their order. Each says with how many it may run at once.

    Example:
        async with semaphore.acquired(parallel=2):
            ...
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = 0
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def acquired(self, parallel: int) -> AsyncIterator[None]:
        """Wait until fewer than `parallel` run, and count as one of them."""
        turn: Future[None] = Future()
        with self._lock:
            self._waiting.append((parallel, turn))
        self._next()
        try:
            await asyncio.wrap_future(turn)
        except BaseException:
            if not turn.cancel():  # it had come
                self._release()
            raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._num_running -= 1
        self._next()

    def _next(self) -> None:
        """Give turns to those at the front."""
        come = []
        with self._lock:
            while self._waiting and self._num_running < self._waiting[0][0]:
                _, turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    self._num_running += 1
                    come.append(turn)
        for turn in come:
            turn.set_result(None)
