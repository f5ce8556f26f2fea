"""Runs environments in worker processes, with a time limit for each episode.

An environment that raises, hangs or blocks costs its episode, which the caller counts and leaves out. A worker in which
one hangs takes no new environments and is killed when its others have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Opening, Step

logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 10.0
_MAX_LINE_BYTES = 1 << 26


class EnvironmentFailed(Exception):
    """An episode's environment gave no answer, and the episode must be left out.

    ``kind`` is ``raised``, ``timeout``, ``died`` (its process ended), ``load`` (a process could not be started),
    ``full`` (no room for another episode: EnvironmentFull) or ``reward`` (it never gave one).
    """

    def __init__(self, message: str, kind: str = "raised", hint: str | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.hint, self.limit = kind, hint, limit


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
        self, config: Config, num_workers: int | None = None, warn: Callable[[str], None] = logger.warning
    ) -> None:
        """``num_workers`` processes; by default as many as cores, 4 at most. ``warn`` tells the user."""
        assert config.environment.name is not None
        self._warn = warn
        self._name, self._args = config.environment.name, dict(config.environment.args)
        self._timeout_s = config.environment.timeout_s
        if self._name == "code":
            self._args.setdefault("sandbox", asdict(config.sandbox))
        self._workers = [self._worker() for _ in range(num_workers or min(4, os.cpu_count() or 1))]
        self._turns: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
        """For each call, where the environment says how many there may be at once."""
        self._retired: list[_Worker] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._bounds = [bound for bound in [config.environment.max_open_episodes] if bound is not None]
        self._learned: int | None = None
        self.num_open = 0
        """Episodes that were let in and have not been closed."""

    async def start(self) -> Self:
        """Start the workers. Raises UserError where the class cannot be loaded, or does not take its arguments."""
        try:
            await asyncio.gather(*(worker.started() for worker in self._workers))
        except BaseException:
            await self.close()
            raise
        bounds = self._workers[0].bounds
        if (concurrency := bounds["concurrency"]) is not None:
            self._turns = asyncio.Semaphore(concurrency)
        if (most := bounds["max_open_episodes"]) is not None:
            self._bounds.append(most)
        return self

    @property
    def max_open_episodes(self) -> int | None:
        """Not more may be open at once; None is no bound. A server may say so on the way."""
        return min([*self._bounds, *([] if self._learned is None else [self._learned])], default=None)

    def _opened(self) -> None:
        self.num_open += 1
        if self._learned is not None:  # what refused one may be one of several servers behind an address
            self._learned = max(self._learned, self.num_open)

    def _is_full(self, limit: int) -> None:
        """The environment says that it takes so many episodes at once."""
        if self._learned is None and (self.max_open_episodes or limit + 1) > limit:
            self._learned = max(limit, self.num_open)
            self._warn(
                f"environment {self._name} takes {limit} episode{'s' * (limit != 1)} at once, and the others wait: let "
                f"its server take more, or set environment.max_open_episodes={limit} for a run that repeats exactly"
            )

    def open(self) -> RemoteEnvironment:
        """A new environment, to be used as an asynchronous context manager."""
        return RemoteEnvironment(self, min(self._workers, key=lambda worker: worker.num_open), self._timeout_s)

    async def close(self) -> None:
        """Kill the workers and wait for their end."""
        for task in self._closing:
            task.cancel()
        workers, self._workers, self._retired = self._workers + self._retired, [], []
        for worker in workers:
            await worker.kill()

    def _worker(self) -> _Worker:
        return _Worker(self._name, self._args)

    def _retire(self, worker: _Worker) -> None:
        """No new environments for a worker that does not answer, or has ended; another takes its place."""
        if worker in self._workers:
            self._workers[self._workers.index(worker)] = self._worker()
            self._retired.append(worker)

    def _end(self, worker: _Worker, number: int) -> asyncio.Task[None]:
        """Close an environment. Nobody has to wait for it, but where there is a bound the next one needs its place."""
        task = asyncio.create_task(self._close_one(worker, number))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _close_one(self, worker: _Worker, number: int) -> None:
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await worker.ask({"do": "close", "environment": number})
        except EnvironmentFailed as error:
            logger.warning("closing an environment %s: %s", self._name, error)
        except (TimeoutError, EOFError, ConnectionError):
            self._retire(worker)
        worker.num_open -= 1
        if worker in self._retired and worker.num_open == 0:
            self._retired.remove(worker)
            await worker.kill()


class RemoteEnvironment:
    """One environment in a worker; the methods raise EnvironmentFailed."""

    def __init__(self, pool: EnvironmentPool, worker: _Worker, timeout_s: float) -> None:
        self._pool, self._worker, self._timeout_s = pool, worker, timeout_s
        self._left_s = timeout_s
        self._number = worker.add()
        self._is_open = False

    async def reset(self, prompt: Prompt) -> Opening:
        opening = await self._ask({"do": "reset", "prompt": prompt})
        self._is_open = True
        self._pool._opened()
        return opening

    async def step(self, response: str) -> Step:
        return Step(**await self._ask({"do": "step", "response": response}))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType) -> None:
        closing = self._pool._end(self._worker, self._number)
        try:
            if self._pool.max_open_episodes is not None:
                await asyncio.wait({closing})
        finally:
            self._pool.num_open -= self._is_open

    async def _ask(self, request: dict[str, Any]) -> Any:
        try:
            await self._worker.started()  # a replaced one starts first
            async with self._pool._turns:  # neither is the environment's time
                start = time.monotonic()
                async with asyncio.timeout(self._left_s):
                    answer = await self._worker.ask(request | {"environment": self._number})
            self._left_s -= time.monotonic() - start
            return answer
        except EnvironmentFailed as error:
            if error.kind == "full" and error.limit is not None:
                self._pool._is_full(error.limit)
            raise
        except UserError as error:
            raise EnvironmentFailed(error.message, "load", error.hint) from None
        except TimeoutError:
            self._pool._retire(self._worker)
            message = f"the environment took longer than {self._timeout_s:g} s over an episode"
            raise EnvironmentFailed(message, "timeout") from None
        except (EOFError, ConnectionError):
            self._pool._retire(self._worker)
            raise EnvironmentFailed("the environment's process ended", "died") from None


class _Worker:
    """One process of ``forge_hpc.environments.worker``, started when it is first needed."""

    def __init__(self, name: str, args: dict[str, Any]) -> None:
        self._name, self._args = name, args
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._requests, self._environments = itertools.count(), itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
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
            starting = self._starting = self._starting or asyncio.create_task(self._start())
            try:
                return await asyncio.shield(starting)
            except UserError:
                if self._starting is starting:
                    self._starting = None
                if begins:
                    raise

    async def ask(self, request: dict[str, Any]) -> Any:
        """What the worker answers.

        Raises:
            EnvironmentFailed: the environment raised.
            EOFError, ConnectionError: the process has ended.
        """
        process = self._process
        if process is None or self._reading is None or self._reading.done():
            raise EOFError
        assert process.stdin is not None
        number = next(self._requests)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            payload = pickle.dumps(request | {"id": number})
            process.stdin.write(struct.pack("<Q", len(payload)) + payload)
            await process.stdin.drain()
            answer = await future
        finally:
            del self._waiting[number]
        if "error" in answer:
            kind = "full" if "limit" in answer else "raised"
            raise EnvironmentFailed(answer["error"], kind, answer.get("hint"), answer.get("limit"))
        return answer["value"]

    async def kill(self) -> None:
        """End the process, and whatever it started, at once."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await self._end()

    async def _end(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _start(self) -> None:
        try:
            await self._load()
        except BaseException:
            await self._end()
            raise

    async def _load(self) -> None:
        what = f"the environment {self._name}"
        try:
            self._process = await self._spawn()
        except OSError as error:
            raise UserError(f"a process for {what} cannot be started: {error}") from None
        self._reading = asyncio.create_task(self._read(self._process))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                self.bounds = await self.ask({"do": "load", "name": self._name, "args": self._args})
        except TimeoutError:
            raise UserError(f"{what} did not load within {_START_TIMEOUT_S:g} s") from None
        except (EOFError, ConnectionError):
            raise UserError(f"{what} ended its process while it was loaded") from None
        except EnvironmentFailed as error:
            raise UserError(f"{what} cannot be loaded: {error}", error.hint) from None

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "forge_hpc.environments.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,  # killed with whatever an environment started
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand answers to those who wait; when there are no more, all who wait get EOFError."""
        assert process.stdout is not None
        try:
            while (line := await process.stdout.readline()).endswith(b"\n"):
                answer = json.loads(line)
                if (future := self._waiting.get(answer["id"])) is not None and not future.done():
                    future.set_result(answer)
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(EOFError())
