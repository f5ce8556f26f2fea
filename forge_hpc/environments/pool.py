"""Runs environments in worker processes, with a time limit for each episode.

An environment that raises, hangs or blocks costs its episode, which the caller counts and leaves out. A worker in which
one hangs takes no new environments and is killed when its others have ended, with all that they started.

Where a run has several nodes the workers are on all of them, and an environment is opened where the fewest are. One
whose node is lost is none of its own fault: its episode begins again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.data.types import Prompt
from forge_hpc.environments.agent import AgentResult
from forge_hpc.environments.base import Opening, Step
from forge_hpc.workers.places import THIS_NODE, Place
from forge_hpc.workers.pool import WorkerPool
from forge_hpc.workers.process import WorkerLost, WorkerProcess

logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 10.0
_MAX_WORKERS = 4
"""Default number on a node, if it has so many cores."""


class EnvironmentFailed(Exception):
    """An episode's environment gave no answer, and the episode must be left out.

    ``kind`` is ``raised``, ``timeout``, ``died`` (its process ended), ``lost`` (its node did, or starts no process),
    ``load`` (a process could not be started), ``full`` (no room for another episode: EnvironmentFull) or ``reward``
    (it never gave one). ``place`` is where a process has died: its node may be going down.
    """

    def __init__(
        self,
        message: str,
        kind: str = "raised",
        hint: str | None = None,
        limit: int | None = None,
        place: Place | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.hint, self.limit, self.place = kind, hint, limit, place


class EnvironmentPool:
    """Environments of ``config.environment``, as many at once as are opened.

    Example:
        pool = await EnvironmentPool(config).start()
        async with pool.open() as environment:
            opening = await environment.reset(prompt)
            step = await environment.step("42")
        await pool.close()
    """

    def __init__(
        self,
        config: Config,
        num_workers: int | None = None,
        warn: Callable[[str], None] = logger.warning,
        others: Sequence[Place] = (),
    ) -> None:
        """``num_workers`` processes on this node, by default as many as cores, 4 at most; and as many on each of the
        ``others``, by their cores. ``warn`` tells the user."""
        assert config.environment.name is not None
        self._warn = warn
        self._name, args = config.environment.name, dict(config.environment.args)
        self._timeout_s, self._endpoint_host = config.environment.timeout_s, config.environment.endpoint_host
        if self._name == "code":
            args.setdefault("sandbox", asdict(config.sandbox))
        load = {"do": "load", "name": self._name, "args": args}
        what, venv = f"the environment {self._name}", config.environment.venv
        self._workers = WorkerPool("forge_hpc.environments.worker", what, load, venv)
        self._num_workers, self._others = num_workers, others
        self._hosts = [_Host(self._workers) for _ in range(self._share(THIS_NODE))]
        self._turns: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
        """For each call, where the environment says how many there may be at once."""
        self._retired: list[_Host] = []
        self._bounds = [bound for bound in [config.environment.max_open_episodes] if bound is not None]
        self._learned: int | None = None
        self.num_open = 0
        """Episodes that were let in and have not been closed."""

    async def start(self) -> Self:
        """Start the workers of this node; those of others follow. Raises UserError where the class cannot be loaded, or
        does not take its arguments."""
        try:
            await asyncio.gather(*(host.started() for host in self._hosts))
        except BaseException:
            await self.close()
            raise
        bounds = self._hosts[0].bounds
        if (concurrency := bounds["concurrency"]) is not None:
            self._turns = asyncio.Semaphore(concurrency)
        if (most := bounds["max_open_episodes"]) is not None:
            self._bounds.append(most)
        for place in self._others if self._is_reached_from_others else ():
            self._workers.create_task(self._start_at(place))
        return self

    def _share(self, place: Place) -> int:
        return self._num_workers or min(_MAX_WORKERS, place.num_cpus)

    @property
    def _is_reached_from_others(self) -> bool:
        """Agents reach the policy by an address, which may be this node's alone."""
        if not self.is_agent:
            return True
        from forge_hpc.endpoint.server import is_loopback

        return not is_loopback(self._endpoint_host)

    async def _start_at(self, place: Place) -> None:
        """Start workers on another node, unless the first one shows that it cannot have these environments."""
        first = _Host(self._workers, place)
        try:
            await first.started()
        except UserError as error:
            if not place.is_lost:
                self._warn(f"{place.name} has no environments {self._name}, the other nodes do: {error}")
            return
        self._hosts += [first, *(_Host(self._workers, place) for _ in range(self._share(place) - 1))]

    @property
    def is_on_several_nodes(self) -> bool:
        """Whether an episode whose process has died may be better off elsewhere."""
        return any(host.place is not THIS_NODE for host in self._hosts)

    @property
    def is_agent(self) -> bool:
        """Whether these are agents, to be ``run``, and no environments."""
        return bool(self._hosts[0].bounds.get("agent"))

    @property
    def max_open_episodes(self) -> int | None:
        """Not more may be open at once; None is no bound. A server may say so on the way."""
        return min([*self._bounds, *([] if self._learned is None else [self._learned])], default=None)

    def _count_open(self) -> None:
        self.num_open += 1
        if self._learned is not None:  # what refused one may be one of several servers behind an address
            self._learned = max(self._learned, self.num_open)

    def _learn_bound(self, limit: int) -> None:
        """The environment says that it takes so many episodes at once."""
        if self._learned is None and (self.max_open_episodes or limit + 1) > limit:
            self._learned = max(limit, self.num_open)
            self._warn(
                f"environment {self._name} takes {limit} episode{'s' * (limit != 1)} at once, and the others wait: let "
                f"its server take more, or set environment.max_open_episodes={limit} for a run that repeats exactly"
            )

    def open(self, away_from: Place | None = None) -> RemoteEnvironment:
        """A new environment, to be used as an asynchronous context manager; on another node than one that is named,
        where there is another."""
        best = min(self._hosts, key=lambda host: (host.place is away_from, host.num_open))
        return RemoteEnvironment(self, best, self._timeout_s)

    async def close(self) -> None:
        """End the workers and everything that they started, and wait for it."""
        self._hosts, self._retired = [], []
        await self._workers.close()

    def _retire(self, host: _Host) -> None:
        """No new environments for a worker that does not answer, or has ended; another takes its place, where its node
        is not lost."""
        if host in self._hosts:
            if host.place.is_lost:
                self._hosts.remove(host)
            else:
                self._hosts[self._hosts.index(host)] = _Host(self._workers, host.place)
            self._retired.append(host)

    def _leave_out(self, host: _Host) -> None:
        """Its node starts no process."""
        self._hosts = [other for other in self._hosts if other.place is not host.place]

    def _end(self, host: _Host, number: int) -> asyncio.Task[None]:
        """Close an environment. Nobody has to wait for it, but where there is a bound the next one needs its place."""
        return self._workers.create_task(self._close_one(host, number))

    async def _close_one(self, host: _Host, number: int) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await host.ask({"do": "close", "environment": number})
        except EnvironmentFailed as error:
            logger.warning("closing an environment %s: %s", self._name, error)
        except (TimeoutError, WorkerLost):
            self._retire(host)
        host.num_open -= 1
        if host in self._retired and host.num_open == 0:
            self._retired.remove(host)
            await host.kill()


class RemoteEnvironment:
    """One environment in a worker; the methods raise EnvironmentFailed."""

    def __init__(self, pool: EnvironmentPool, host: _Host, timeout_s: float) -> None:
        self._pool, self._host, self._timeout_s = pool, host, timeout_s
        self._left_s = timeout_s
        self._number = host.add()
        self._is_open = False

    async def reset(self, prompt: Prompt) -> Opening:
        opening = await self._ask({"do": "reset", "prompt": prompt})
        self._is_open = True
        self._pool._count_open()
        return opening

    async def step(self, response: str) -> Step:
        return Step(**await self._ask({"do": "step", "response": response}))

    async def run(self, example: dict[str, Any], base_url: str, api_key: str, busy: Busy) -> AgentResult:
        """Have an agent play its episode. What it takes while its requests are under way (``busy``) is not its time."""
        arguments = {"base_url": base_url, "api_key": api_key, "example": example}
        self._is_open = True
        self._pool._count_open()
        return AgentResult(**await self._ask({"do": "run", "arguments": arguments}, busy))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType) -> None:
        closing = self._pool._end(self._host, self._number)
        try:
            if self._pool.max_open_episodes is not None:
                await asyncio.wait({closing})
        finally:
            self._pool.num_open -= self._is_open

    async def _ask(self, request: dict[str, Any], busy: Busy | None = None) -> Any:
        try:
            await self._host.started()  # a replaced one starts first
            async with self._pool._turns:  # neither is the environment's time
                start = time.monotonic()
                async with asyncio.timeout(self._left_s) as limit:
                    if busy is not None:
                        busy.holds(limit, self._left_s)
                    answer = await self._host.ask(request | {"environment": self._number})
            self._left_s -= time.monotonic() - start
            return answer
        except EnvironmentFailed as error:
            if error.kind == "full" and error.limit is not None:
                self._pool._learn_bound(error.limit)
            raise
        except UserError as error:
            if self._host.place is THIS_NODE:
                raise EnvironmentFailed(error.message, "load", error.hint) from None
            self._pool._leave_out(self._host)
            raise EnvironmentFailed(error.message, "lost", error.hint) from None
        except TimeoutError:
            lives = await self._host.place.answers()
            self._pool._retire(self._host)
            message = f"the environment took longer than {self._timeout_s:g} s over an episode"
            raise EnvironmentFailed(message, "timeout" if lives else "lost") from None
        except WorkerLost as lost:
            self._pool._retire(self._host)
            kind = "lost" if lost.with_node else "died"
            raise EnvironmentFailed(f"the environment's process {lost}", kind, place=self._host.place) from None


class Busy:
    """Holds an agent's time limit while its requests are under way."""

    def __init__(self) -> None:
        self._limit: asyncio.Timeout | None = None
        self._left_s, self._since, self._is_busy = 0.0, 0.0, False

    def holds(self, limit: asyncio.Timeout, left_s: float) -> None:
        """``limit`` has begun, and ends in ``left_s`` seconds of the agent's own."""
        self._limit, self._left_s, self._since = limit, left_s, asyncio.get_running_loop().time()

    def __call__(self, is_busy: bool) -> None:
        """Requests are under way from now on, or none is."""
        now = asyncio.get_running_loop().time()
        if self._limit is None or self._limit.expired() or is_busy == self._is_busy:
            return
        self._is_busy = is_busy
        if is_busy:
            self._left_s -= now - self._since
            self._limit.reschedule(None)
        else:
            self._since = now
            self._limit.reschedule(now + self._left_s)


class _Host:
    """One seat of the pool: a worker process, started when it is first needed, and the environments in it."""

    def __init__(self, workers: WorkerPool, place: Place = THIS_NODE) -> None:
        self._workers, self.place = workers, place
        self._worker: WorkerProcess | None = None
        self._starting: asyncio.Task[None] | None = None
        self._environments = itertools.count()
        self.num_open = 0
        self.bounds: Mapping[str, int | None] = {}
        """What the environment asks for, over all workers: ``concurrency`` and ``max_open_episodes``."""

    def add(self) -> int:
        """The number of one more environment in it."""
        self.num_open += 1
        return next(self._environments)

    async def started(self) -> None:
        """Start it, unless that has been done. Raises UserError where that does not work.

        A failed start is the failure of the one who began it; the next one tries again.
        """
        while True:
            begins = self._starting is None
            starting = self._starting = self._starting or self._workers.create_task(self._start())
            try:
                return await asyncio.shield(starting)
            except UserError:
                if self._starting is starting:
                    self._starting = None
                if begins:
                    raise

    async def ask(self, request: dict[str, Any]) -> Any:
        """What the worker answers. Raises EnvironmentFailed where the environment raised, and WorkerLost."""
        if self._worker is None:
            raise WorkerLost("was never started", 0)
        answer = await self._worker.send(request).answer
        if "error" in answer:
            kind = "full" if "limit" in answer else "raised"
            raise EnvironmentFailed(answer["error"], kind, answer.get("hint"), answer.get("limit"))
        return answer["value"]

    async def kill(self) -> None:
        """End the process, and whatever it started, at once."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._worker is not None:
            self._worker.kill()
            await self._worker.wait()

    async def _start(self) -> None:
        self._worker, answer = await self._workers.start_worker(self.place)
        self.bounds = answer["value"]
