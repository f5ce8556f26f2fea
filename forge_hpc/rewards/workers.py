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

Where a run has several nodes the workers are on all of them, once a call has waited for one, and whichever is free gets
the next call. A node that is lost takes nothing but the calls that ran there, which are made again elsewhere; and a
call whose process dies on another node is tried once more on this one: it may be the node that is sick.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import RewardConfig
from forge_hpc.rewards.errors import RewardError
from forge_hpc.rewards.limit import CallLimit
from forge_hpc.workers.channel import Answer
from forge_hpc.workers.places import THIS_NODE, Place
from forge_hpc.workers.pool import WorkerPool
from forge_hpc.workers.process import Call, WorkerLost, WorkerProcess

logger = logging.getLogger(__name__)

_CONCURRENCY = 64
"""Default number of calls in a worker of an async reward."""
_CANCEL_GRACE_S = 2.0
"""From the cancellation of an async call to the end of its worker, if it is not cancelled by then."""
_ISOLATING_WORKERS = 4
_MIN_WORKERS, _MAX_WORKERS = 4, 8
"""Default number on a node, by its cores, for a reward that is not async."""
_PATIENCE_S = 0.5
"""A call that has waited so long for a worker of this node has those of the others started, where nobody has said how
many there are to be: for a quick reward none is."""


class RewardWorkers:
    """The processes that compute `reward`, and who of them gets which call.

    Example:
        workers = RewardWorkers(RewardConfig("math"))
        await workers.start()
        answer = await workers.call({"prompt": "1+1=", "response": "2", "target": "2", "fields": {}})
        await workers.close()
    """

    def __init__(
        self,
        reward: RewardConfig,
        num_workers: int | None = None,
        isolated_within: CallLimit | None = None,
        others: Sequence[Place] = (),
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """``num_workers`` overrides what the reward's configuration says. ``isolated_within`` means one call in a
        worker, even of an async reward, and is their limit. ``others`` are nodes beside this one; ``warn`` tells of one
        that cannot compute the reward."""
        self._reward = reward
        load = {"name": reward.name, "args": reward.args, "memory_gib": reward.memory_gib}
        self._pool = WorkerPool("forge_hpc.rewards.worker", f"the reward {reward.name}", load)
        self._num_workers = num_workers or reward.workers or 0
        self._places: list[Place] = [THIS_NODE, *others]
        self._warn = warn
        self._isolates = isolated_within is not None
        self._limit = isolated_within or CallLimit(reward.timeout_s)
        self._is_async = False
        self._concurrency = 1
        self._is_watching = False
        self._starting: asyncio.Task[None] | None = None
        self._closed = False
        self._free: asyncio.Queue[WorkerProcess | RewardError] = asyncio.Queue()
        """A worker once for each call that it can take now; an error for each worker that could not be started."""
        self._elsewhere: list[tuple[Place, int]] = []
        """Other nodes where no worker has been started yet, and how many there are to be."""
        self._isolated: RewardWorkers | None = None
        """Those for calls that a worker was lost with, and nobody knows whose fault it was."""

    async def start(self, check: bool = True) -> None:
        """Start a worker and have it load the reward and, with `check`, check it; the other workers follow, the first
        on each node checking it too.

        Raises UserError where the reward cannot be loaded or its own check fails on this node.
        """
        if self._starting is None:
            self._starting = self._pool.create_task(self._start(check))
        await asyncio.shield(self._starting)

    async def call(self, request: dict[str, Any]) -> Answer:
        """The answer to `request` (``prompt``, ``response``, ``target``, ``fields``), from the next free worker.

        Raises RewardError where the call exceeds the limit, or its process dies or cannot be started.
        """
        await self.start(check=False)
        while not self._closed:
            try:
                if (answer := await self._try(request)) is not None:
                    return answer
                break
            except _NodeGone:
                continue
        if self._closed:
            raise RewardError(f"reward {self._reward.name}: its process was ended", "died")
        if self._isolated is None:
            self._isolated = RewardWorkers(self._reward, _ISOLATING_WORKERS, isolated_within=self._limit)
        return await self._isolated.call(request)

    async def _try(self, request: dict[str, Any]) -> Answer | None:
        """The answer of the next free worker; None where it was lost and that may not have been the call's fault.

        Raises RewardError where it was, and _NodeGone."""
        worker = await self._next_free()
        is_first, started = worker.num_answered == 1, time.monotonic()
        limit_s = self._limit.seconds(is_first)
        is_watched, call = False, None
        try:
            call = worker.send(request)
            if await _is_answered(call, limit_s):
                return self._learn(call, started, is_first)
            if not await worker.place.answers():
                call.answer.cancel()
                raise _NodeGone
            is_watched = limit_s < self._limit.ceiling_s and not self._is_watching and not worker.ended
            if is_watched:
                self._watch(worker, call, started, is_first)
            if is_watched or await self._end(worker, call):
                limit = self._limit.describe(limit_s)
                raise RewardError(f"reward {self._reward.name} took longer than {limit}", "timeout")
        except WorkerLost as lost:
            if lost.with_node:
                raise _NodeGone from None
            if lost.num_calls == 1 and worker.place is THIS_NODE:
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
        return None

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
        here, *elsewhere = self._shares(is_async, bool(traits["per_node"]))
        for _ in range(here - 1):
            self._add(THIS_NODE)
        self._elsewhere = [(place, num) for place, num in zip(self._places[1:], elsewhere, strict=True) if num]
        if self._num_workers:
            self._spread()

    def _shares(self, is_async: bool, per_node: bool) -> list[int]:
        """How many workers each place gets."""
        num_places = len(self._places)
        if self._num_workers:
            share, more = divmod(self._num_workers, num_places)
            return [share + (place < more) for place in range(num_places)]
        if is_async:
            return [1] + [int(per_node)] * (num_places - 1)
        return [max(_MIN_WORKERS, min(_MAX_WORKERS, place.num_cpus)) for place in self._places]

    def _spread(self) -> None:
        """Start the workers of the other nodes, in the background, once."""
        elsewhere, self._elsewhere = self._elsewhere, []
        for place, num in elsewhere:
            self._pool.create_task(self._start_at(place, num))

    async def _start_at(self, place: Place, num: int) -> None:
        """Start workers on another node, unless the first one shows that it cannot compute the reward."""
        try:
            worker, _ = await self._pool.start_worker(place, check=True)
        except UserError as error:
            self._leave_out(place, error)
        else:
            self._offer(worker)
            for _ in range(num - 1):
                self._add(place)

    def _leave_out(self, place: Place, error: UserError) -> None:
        if place in self._places:
            self._places.remove(place)
            if not place.is_lost:
                self._warn(f"{place.name} computes no {self._reward.name}, the other nodes do: {error}")

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
            self._add(worker.place)

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

    def _add(self, place: Place) -> None:
        """Start one more worker, in the background: on a node, or on this one where that starts none. Those of a lost
        node are missed only where it was said how many there are to be."""

        async def add(place: Place) -> None:
            try:
                worker, _ = await self._pool.start_worker(place, check=False)
            except UserError as error:
                if place is THIS_NODE:
                    self._free.put_nowait(RewardError(str(error), "load"))
                else:
                    self._leave_out(place, error)
                    self._add(place)
            else:
                self._offer(worker)

        if place.is_lost or place not in self._places:
            if not self._num_workers:
                return
            place = THIS_NODE
        if not self._closed:
            self._pool.create_task(add(place))

    def _offer(self, worker: WorkerProcess) -> None:
        for _ in range(self._concurrency):
            self._free.put_nowait(worker)
        worker.on_end = lambda: self._replace(worker)
        if worker.ended:
            self._replace(worker)

    def _replace(self, worker: WorkerProcess) -> None:
        if worker.num_asked > 1 or worker.place is not THIS_NODE:
            self._add(worker.place)
        else:  # it died with nothing to do, as the next one may: the next call says so and starts another
            self._free.put_nowait(RewardError(f"a process of the reward {self._reward.name} died unused", "died"))

    async def _next_free(self) -> WorkerProcess:
        while True:
            free = await self._take()
            if isinstance(free, RewardError):
                self._add(THIS_NODE)
                raise free
            if not free.ended:
                return free

    async def _take(self) -> WorkerProcess | RewardError:
        if self._elsewhere:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    return await self._free.get()
            except TimeoutError:
                self._spread()
        return await self._free.get()


class _NodeGone(Exception):
    """A call has gone with the node that it ran on."""


async def _is_answered(call: Call, within_s: float) -> bool:
    """Wait for the answer to a call, which may be an exception."""
    await asyncio.wait({call.answer}, timeout=max(0.0, within_s))
    return call.answer.done()
