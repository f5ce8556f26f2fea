"""One worker process, seen from the pool."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from forge_hpc.workers.channel import Answer, frame
from forge_hpc.workers.link import Link
from forge_hpc.workers.places import THIS_NODE, Place


class WorkerLost(Exception):
    """A worker process ended before it answered. ``num_calls`` of them were running in it."""

    def __init__(self, cause: str, num_calls: int, with_node: bool = False) -> None:
        """``with_node``: its node is gone, which is no fault of theirs."""
        super().__init__(cause)
        self.num_calls, self.with_node = num_calls, with_node


@dataclass(frozen=True)
class Call:
    """A request on its way."""

    number: int
    answer: asyncio.Future[Answer]
    """Its answer; WorkerLost where the worker ends before."""


class WorkerProcess:
    """A process that answers requests. Several may be under way at the same time; each answer comes when it is ready.

    Example:
        worker = await WorkerProcess.start("forge_hpc.rewards.worker")
        call = worker.send({"name": "math", "args": {}})
        answer = await call.answer
        worker.kill()
        await worker.wait()
    """

    def __init__(self, link: Link, place: Place = THIS_NODE) -> None:
        """Takes over what is at the other end of `link`; ``start`` makes one."""
        self.place = place
        self.ended = False
        """No call can be answered any more."""
        self.on_end: Callable[[], None] = lambda: None
        """Called once, when ``ended`` becomes true."""
        self._link = link
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self.num_asked = self.num_answered = 0
        """Requests so far, the one to load something included, and answers."""
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, module: str, place: Place = THIS_NODE, venv: str | None = None) -> Self:
        """Start ``python -m module`` on a node, in the virtual environment ``venv`` where it is another (``link``).

        Raises OSError where the system has no process to give, or the node does not answer.
        """
        return cls(await place.open(module, venv), place)

    @property
    def num_calls(self) -> int:
        """Requests that have no answer yet, given up or not."""
        return len(self._calls)

    def send(self, request: dict[str, Any]) -> Call:
        """Send a request, whose answer follows. Raises WorkerLost."""
        if self.ended:
            raise WorkerLost("had ended", 0)
        call = Call(self.num_asked + 1, asyncio.get_running_loop().create_future())
        self._write({**request, "id": call.number})
        self.num_asked = call.number
        self._calls[call.number] = call.answer
        return call

    def cancel(self, call: Call) -> None:
        """Tell a worker that listens for it to cancel a call, which then has an answer, whatever it is."""
        if not self.ended:
            self._write({"cancel": call.number})

    def _write(self, message: dict[str, Any]) -> None:
        self._link.write(frame(message))

    def kill(self) -> None:
        """End the process and all that it started, at once; ``wait`` waits for it."""
        self._end()
        self._link.kill()

    async def wait(self) -> None:
        """Wait until the process has ended and all calls know it."""
        await asyncio.shield(self._reading)

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self.on_end()

    async def _read(self) -> None:
        try:
            while line := await self._link.readline():
                answer = json.loads(line)
                call = self._calls.pop(answer["id"])
                self.num_answered += 1
                if not call.done():  # given up
                    call.set_result(answer)
            cause = ""
        except (ValueError, KeyError, TypeError):
            cause = "wrote into the pool's own pipe"
            self.kill()
        self._end()
        status = await self._link.wait()
        cause = f"was lost with {self.place.name}" if status is None else cause or _describe_exit(status)
        lost = WorkerLost(cause, len(self._calls), with_node=status is None)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(lost)


def _describe_exit(status: int) -> str:
    """How a process ended, from the exit status of its keeper."""
    number = -status if status < 0 else status - 128
    if number <= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"ended with exit status {status}"
    return f"was killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")
