"""What the endpoint knows of one episode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Prompt
from forge_hpc.endpoint.conversations import Conversations


class EndpointEpisode:
    """An episode that is open, and whose key holds.

    Args:
        sampling, seed: where the requests do not say otherwise.
        obeys: whether requests may say otherwise. Not in an evaluation, which is greedy where it says so.
    """

    def __init__(
        self, key: str, prompt: Prompt, sample_index: int, sampling: SamplingConfig, seed: int, obeys: bool
    ) -> None:
        self.key, self.prompt, self.sample_index = key, prompt, sample_index
        self.sampling, self.seed, self.obeys = sampling, seed, obeys
        self.conversations = Conversations()
        self.num_turns = 0
        """Responses that were asked for."""
        self.limit: str | None = None
        """What a request was refused for last, if that was a limit on turns or tokens."""
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """What went wrong on the run's side."""
        self.on_busy: Callable[[bool], None] = lambda busy: None
        """Called when the first request of those at a time comes, and when the last one has ended."""
        self.is_closed = False
        self._requests: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request is under way."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        if len(self._requests) == 1:
            self.on_busy(True)
        try:
            yield
        finally:
            self._requests.discard(task)
            if not self._requests:
                self.on_busy(False)

    def close(self) -> None:
        """End what is still under way."""
        self.is_closed = True
        for task in self._requests:
            task.cancel()
