"""Computes one reward in worker processes: what hangs or dies in one of them is nobody else's business.

Every reward has workers of its own, so one that hangs delays no other. A worker is ended and replaced at once when it
dies or a call in it exceeds the limit. Of a sync reward each worker computes one call at a time; with W workers, a
share h of calls that hang, t seconds for the others, a limit of T and a start of S seconds, they compute

    W / ((1 - h) t + h (T + S))   calls a second,

and W / (T + S) where all of them hang. The calls of an async reward run in one worker at the same time: one that
exceeds the limit is cancelled and harms none. When such a worker is lost (a call that blocks the event loop, or ends
the process) nobody can tell which call it was, so each one that was waited for is tried once more, alone in a worker.

Where nobody says how long a call may take, the limit is learned (``limit``), and one late call at a time is watched:
its caller gives it up, but it runs on, beside the other workers. If it gives a value after all, the reward is slow and
does not hang, and its limit is raised.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import RewardConfig
from forge_hpc.rewards.errors import RewardError
from forge_hpc.rewards.limit import CallLimit
from forge_hpc.workers.channel import Answer
from forge_hpc.workers.pool import WorkerPool
from forge_hpc.workers.process import Call, WorkerLost, WorkerProcess

logger = logging.getLogger(__name__)

_CONCURRENCY = 64
"""Default number of calls in a worker of an async reward."""
_CANCEL_GRACE_S = 2.0
"""From the cancellation of an async call to the end of its worker, if it is not cancelled by then."""
_ISOLATING_WORKERS = 4


class RewardWorkers:
    """The processes that compute `reward`, and who of them gets which call.

    Example:
        workers = RewardWorkers(RewardConfig("math"))
        await workers.start()
        answer = await workers.call({"prompt": "1+1=", "response": "2", "target": "2", "fields": {}})
        await workers.close()
    """

    def __init__(
        self, reward: RewardConfig, num_workers: int | None = None, isolated_within: CallLimit | None = None
    ) -> None:
        """``num_workers`` overrides what the reward's configuration says. ``isolated_within`` means one call in a
        worker, even of an async reward, and is their limit."""
        self._reward = reward
        load = {"name": reward.name, "args": reward.args, "memory_gib": reward.memory_gib}
        self._pool = WorkerPool("forge_hpc.rewards.worker", f"the reward {reward.name}", load)
        self._num_workers = num_workers or reward.workers or 0
        self._isolates = isolated_within is not None
        self._limit = isolated_within or CallLimit(reward.timeout_s)
        self._is_async = False
        self._concurrency = 1
        self._is_watching = False
        self._starting: asyncio.Task[None] | None = None
        self._closed = False
        self._free: asyncio.Queue[WorkerProcess | RewardError] = asyncio.Queue()
        """A worker once for each call that it can take now; an error for each worker that could not be started."""
        self._isolated: RewardWorkers | None = None
        """Those for calls that a worker was lost with, and nobody knows whose fault it was."""

    async def start(self, check: bool = True) -> None:
        """Start a worker and have it load the reward and, with `check`, check it; the other workers follow.

        Raises UserError where the reward cannot be loaded or its own check fails.
        """
        if self._starting is None:
            self._starting = self._pool.create_task(self._start(check))
        await asyncio.shield(self._starting)

    async def call(self, request: dict[str, Any]) -> Answer:
        """The answer to `request` (``prompt``, ``response``, ``target``, ``fields``), from the next free worker.

        Raises RewardError where the call exceeds the limit, or its process dies or cannot be started.
        """
        await self.start(check=False)
        worker = await self._next_free()
        is_first, started = worker.num_answered == 1, time.monotonic()
        limit_s = self._limit.seconds(is_first)
        is_watched, call = False, None
        try:
            call = worker.send(request)
            if await _is_answered(call, limit_s):
                return self._learn(call, started, is_first)
            is_watched = limit_s < self._limit.ceiling_s and not self._is_watching and not worker.ended
            if is_watched:
                self._watch(worker, call, started, is_first)
            if is_watched or await self._end(worker, call):
                limit = self._limit.describe(limit_s)
                raise RewardError(f"reward {self._reward.name} took longer than {limit}", "timeout")
        except WorkerLost as lost:
            if lost.num_calls == 1:
                raise RewardError(f"reward {self._reward.name}: its process {lost}", "died") from None
        except asyncio.CancelledError:
            if call is not None:
                call.answer.cancel()
                if self._concurrency == 1:
                    worker.kill()
                else:
                    worker.cancel(call)
            raise
        finally:
            if not is_watched:
                self._release(worker)
        if self._closed:
            raise RewardError(f"reward {self._reward.name}: its process was ended", "died")
        if self._isolated is None:
            self._isolated = RewardWorkers(self._reward, _ISOLATING_WORKERS, isolated_within=self._limit)
        return await self._isolated.call(request)

    async def close(self) -> None:
        """End all workers and everything that they started, and wait for it."""
        self._closed = True
        if self._isolated is not None:
            await self._isolated.close()
        await self._pool.close()

    async def _start(self, check: bool) -> None:
        worker, traits = await self._pool.start_worker(check=check)
        reward, is_async = self._reward, traits["is_async"]
        self._is_async = is_async
        if not self._isolates:
            if is_async:
                self._concurrency = reward.concurrency or traits["concurrency"] or _CONCURRENCY
            self._limit = CallLimit(reward.timeout_s or traits["timeout_s"], self._concurrency)
        self._offer(worker)
        num_workers = self._num_workers or (1 if is_async else max(4, min(8, os.cpu_count() or 1)))
        for _ in range(num_workers - 1):
            self._add()

    def _learn(self, call: Call, started: float, is_first: bool) -> Answer:
        """The answer to a call, whose time counts if it gave a value. Raises WorkerLost."""
        answer = call.answer.result()
        if "value" in answer:
            self._limit.learn(time.monotonic() - started, is_first)
        return answer

    async def _end(self, worker: WorkerProcess, call: Call) -> bool:
        """End a late call, with its worker where there is no other way. False where other calls ran there, so that
        nobody knows whose fault it was. Raises WorkerLost."""
        if self._is_async:
            worker.cancel(call)
            if await _is_answered(call, _CANCEL_GRACE_S):
                call.answer.result()
                return True
        num_calls = worker.num_calls
        call.answer.cancel()
        worker.kill()
        return num_calls == 1

    def _watch(self, worker: WorkerProcess, call: Call, started: float, is_first: bool) -> None:
        """Let a late call run on, for the limit to learn from it. A worker that is busy with it alone is replaced."""
        self._is_watching = True
        if self._concurrency == 1:
            worker.on_end = lambda: None
            self._add()

        async def watch() -> None:
            try:
                if not await _is_answered(call, started + self._limit.ceiling_s - time.monotonic()):
                    await self._end(worker, call)
                elif "value" in self._learn(call, started, is_first):
                    took_s, limit = time.monotonic() - started, self._limit.describe(self._limit.seconds(is_first))
                    text = "a call of the reward %s that was given up took %.3g s; from now on they have %s"
                    logger.warning(text, self._reward.name, took_s, limit)
            except WorkerLost:
                pass
            finally:
                self._is_watching = False
                call.answer.cancel()  # nobody waits for it any more
                if self._concurrency == 1:
                    worker.kill()
                self._release(worker)

        self._pool.create_task(watch())

    def _release(self, worker: WorkerProcess) -> None:
        """A call has ended in the worker, which can take another unless it has ended too."""
        if not worker.ended:
            self._free.put_nowait(worker)

    def _add(self) -> None:
        """Start one more worker, in the background."""

        async def add() -> None:
            try:
                worker, _ = await self._pool.start_worker(check=False)
            except UserError as error:
                self._free.put_nowait(RewardError(str(error), "load"))
            else:
                self._offer(worker)

        if not self._closed:
            self._pool.create_task(add())

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


async def _is_answered(call: Call, within_s: float) -> bool:
    """Wait for the answer to a call, which may be an exception."""
    await asyncio.wait({call.answer}, timeout=max(0.0, within_s))
    return call.answer.done()
