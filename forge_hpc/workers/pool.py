"""Worker processes that have loaded the same thing, a reward or a class of environments.

    pool ──► keeper ──► worker ──► whatever a user's code starts      (one of these for each worker)
     └──TLS──► host ──► keeper ──► worker ──► …                       (on another node: ``remote``, ``host``)

The pool starts them, knows them, and ends them with all that is below them; where the pool's own process is killed,
their keepers do. Which of them gets a call, and what becomes of one that is late, is up to those who call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from forge_hpc.cluster.hangs import write_stacks
from forge_hpc.config.errors import UserError
from forge_hpc.served import announced
from forge_hpc.workers.channel import Answer
from forge_hpc.workers.places import THIS_NODE, Place
from forge_hpc.workers.process import WorkerLost, WorkerProcess

_START_TIMEOUT_S = 300.0


class WorkerPool:
    """Processes of a module, ``python -m MODULE``, that reads its requests from a ``Channel``.

    Example:
        pool = WorkerPool("forge_hpc.rewards.worker", "the reward math", {"name": "math", "args": {}})
        worker, traits = await pool.start_worker()
        answer = await worker.send({"prompt": "1+1=", "response": "2"}).answer
        await pool.close()
    """

    def __init__(self, module: str, what: str, load: Mapping[str, Any], venv: str | None = None) -> None:
        """``what`` the workers load, for messages; ``load`` is their first request. ``venv`` is a virtual
        environment to run in; None is this one."""
        self._module, self._what, self._load, self._venv = module, what, load, venv
        self._workers: set[WorkerProcess] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def start_worker(self, place: Place = THIS_NODE, **more: Any) -> tuple[WorkerProcess, Answer]:
        """A worker on a node that has loaded, and its answer to that; ``more`` is added to the request.

        Raises UserError where the system has no process to give, the worker cannot load, or the pool is closed.
        """
        if self._closed:
            raise UserError(f"a process for {self._what} cannot be started: the run is ending")
        try:
            worker = await WorkerProcess.start(self._module, place, self._venv)
        except OSError as error:
            raise UserError(f"a process for {self._what} cannot be started: {error}") from None
        self._workers.add(worker)
        self.create_task(self._forget(worker))
        hint = None
        try:
            answer = await self._loaded(worker, more)
        except TimeoutError as late:
            cause = str(late)
        except WorkerLost as lost:
            cause = f"its process {lost}"
            if self._venv is not None:
                hint = f"{self._venv} must have Python 3.11 or newer, numpy and psutil; its own words are in the log"
        except BaseException:
            worker.kill()
            raise
        else:
            if "error" not in answer:
                return worker, answer
            cause, hint = answer["error"], answer.get("hint")
        worker.kill()
        raise UserError(f"{self._what} cannot be loaded: {cause}", hint)

    async def _loaded(self, worker: WorkerProcess, more: Mapping[str, Any]) -> Answer:
        """A new worker's first answer. Raises WorkerLost, and TimeoutError: then stacks have been written."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                return await worker.send({**self._load, "environ": announced(), **more}).answer
        except TimeoutError:
            late = f"that took longer than {_START_TIMEOUT_S:g} s"
            raise TimeoutError(late + await write_stacks(f"{self._what} is loaded: {late}")) from None

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Work beside the calls, which ends with the pool."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End all workers and everything that they started, and wait for it."""
        self._closed, tasks = True, list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.wait() for worker in workers))

    async def _forget(self, worker: WorkerProcess) -> None:
        await worker.wait()
        self._workers.discard(worker)
