"""The worker processes of one reward: what hangs or dies in one of them is nobody else's business.

Every reward has a crew of its own, so one that hangs delays no other. A worker is ended and replaced at once when it
dies or a call in it exceeds the limit. Of a sync reward each worker computes one call at a time; with W workers, a
share h of calls that hang, t seconds for the others, a limit of T and a start of S seconds, a crew computes

    W / ((1 - h) t + h (T + S))   calls a second,

and W / (T + S) where all of them hang. The calls of an async reward run in one worker at the same time: one that
exceeds the limit is cancelled and harms none. When such a worker is lost (a call that blocks the event loop, or ends
the process) nobody can tell which call it was, so each one that ran in it is tried once more, alone in a worker.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import RewardConfig
from forge_hpc.rewards.compute import Answer
from forge_hpc.rewards.errors import RewardError
from forge_hpc.rewards.process import WorkerLost, WorkerProcess

_START_TIMEOUT_S = 120.0
_TIMEOUT_S = 10.0
"""Default limit of a call."""
_CONCURRENCY = 64
"""Default number of calls in a worker of an async reward."""
_CANCEL_GRACE_S = 2.0
"""From the cancellation of an async call to the end of its worker, if it is not cancelled by then."""
_LONE_WORKERS = 4


class Crew:
    """The processes that compute `reward`.

    Example:
        crew = Crew(RewardConfig("math"))
        await crew.start()
        answer = await crew.call({"prompt": "1+1=", "response": "2", "target": "2", "fields": {}})
        await crew.close()
    """

    def __init__(self, reward: RewardConfig, num_workers: int | None = None, alone: bool = False) -> None:
        """``num_workers`` overrides what the reward's configuration says; `alone` means one call in a worker."""
        self._reward = reward
        self._num_workers = num_workers or reward.workers or 0
        self._concurrency = 1
        self._timeout_s = self._deadline_s = 0.0
        self._is_alone = alone
        self._starting: asyncio.Task[None] | None = None
        self._closed = False
        self._workers: set[WorkerProcess] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._free: asyncio.Queue[WorkerProcess | RewardError] = asyncio.Queue()
        """A worker once for each call that it can take now; an error for each worker that could not be started."""
        self._lone_crew: Crew | None = None

    async def start(self, check: bool = True) -> None:
        """Start a worker and have it load the reward and, with `check`, check it; the other workers follow.

        Raises UserError where the reward cannot be loaded or its own check fails.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(check))
        await asyncio.shield(self._starting)

    async def call(self, request: dict[str, Any]) -> Answer:
        """The answer to `request` (``prompt``, ``response``, ``target``, ``fields``), from the next free worker.

        Raises RewardError where the call exceeds the limit, or its process dies or cannot be started.
        """
        await self.start(check=False)
        worker = await self._next_free()
        try:
            return await worker.ask({**request, "timeout_s": self._timeout_s}, self._deadline_s)
        except TimeoutError:
            num_calls = worker.num_calls
            worker.kill()
            if num_calls == 1:
                raise RewardError(
                    f"reward {self._reward.name} took longer than {self._timeout_s:g} s", "timeout"
                ) from None
        except WorkerLost as lost:
            if lost.num_calls == 1:
                raise RewardError(f"reward {self._reward.name}: its process {lost}", "died") from None
        except asyncio.CancelledError:
            if self._concurrency == 1:
                worker.kill()  # it is still busy with the call
            raise
        finally:
            if not worker.ended:
                self._free.put_nowait(worker)
        if self._lone_crew is None:
            self._lone_crew = Crew(self._reward, _LONE_WORKERS, alone=True)
        return await self._lone_crew.call(request)

    async def close(self) -> None:
        """End all workers and everything that they started, and wait for it."""
        self._closed = True
        if self._lone_crew is not None:
            await self._lone_crew.close()
        tasks = [*self._tasks, *([self._starting] if self._starting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.wait() for worker in workers))

    async def _start(self, check: bool) -> None:
        worker, traits = await self._launch(check)
        reward, is_async = self._reward, traits["is_async"]
        self._timeout_s = reward.timeout_s or traits["timeout_s"] or _TIMEOUT_S
        self._deadline_s = self._timeout_s + (_CANCEL_GRACE_S if is_async else 0)
        if is_async and not self._is_alone:
            self._concurrency = reward.concurrency or traits["concurrency"] or _CONCURRENCY
        self._offer(worker)
        num_workers = self._num_workers or (1 if is_async else max(4, min(8, os.cpu_count() or 1)))
        for _ in range(num_workers - 1):
            self._add()

    async def _launch(self, check: bool) -> tuple[WorkerProcess, dict[str, Any]]:
        """A worker that has loaded the reward, and the reward's traits. Raises UserError."""
        reward, hint = self._reward, None
        request = {"name": reward.name, "args": reward.args, "memory_gib": reward.memory_gib, "check": check}
        worker = await WorkerProcess.start()
        self._workers.add(worker)
        self._follow(self._forget(worker))
        try:
            answer = await worker.ask(request, _START_TIMEOUT_S)
        except TimeoutError:
            error = f"that took longer than {_START_TIMEOUT_S:g} s"
        except WorkerLost as lost:
            error = f"its process {lost}"
        else:
            if "error" not in answer:
                return worker, answer
            error, hint = answer["error"], answer.get("hint")
        worker.kill()
        raise UserError(f"the reward {reward.name} cannot be loaded: {error}", hint)

    async def _forget(self, worker: WorkerProcess) -> None:
        await worker.wait()
        self._workers.discard(worker)

    def _add(self) -> None:
        """Start one more worker, in the background."""

        async def add() -> None:
            try:
                worker, _ = await self._launch(check=False)
            except (UserError, OSError) as error:
                self._free.put_nowait(RewardError(str(error), "load"))
            else:
                self._offer(worker)

        if not self._closed:
            self._follow(add())

    def _offer(self, worker: WorkerProcess) -> None:
        for _ in range(self._concurrency):
            self._free.put_nowait(worker)
        worker.on_end = lambda: self._replace(worker)
        if worker.ended:
            self._replace(worker)

    def _replace(self, worker: WorkerProcess) -> None:
        if worker.num_asked > 1:
            self._add()
        else:  # it died with nothing to do, as the next one may: the next call says so and starts another
            self._free.put_nowait(RewardError(f"a process of the reward {self._reward.name} died unused", "died"))

    async def _next_free(self) -> WorkerProcess:
        while True:
            free = await self._free.get()
            if isinstance(free, RewardError):
                self._add()
                raise free
            if not free.ended:
                return free

    def _follow(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
